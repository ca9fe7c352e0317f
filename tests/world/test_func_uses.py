"""Uses of a pure step: ensembles, per-sample gradients, curvature, MAML, rollback, compile."""

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn

from faccel import func
from faccel.errors import ConfigError, DonatedError, PurityError
from faccel.testing import assert_pure, fake_context, simulate
from tests.functional import batch_of, loss_of, net, transformation
from tests.world.test_func import close

CTX = fake_context(0, 1)


def states_of(ctx, optimizer, num=3, **options):
    return [func.init_state(net(seed=i, **options), optimizer, ctx, seed=i) for i in range(num)]


def run_ensemble(ctx, num_steps=3):
    optimizer = transformation()
    step = func.ensemble(func.make_step(loss_of(net()), optimizer, ctx), ctx)
    states = func.stack(states_of(ctx, optimizer))
    for i in range(num_steps):
        metrics, states = step(states, batch_of(i, ctx))
    return func.tensordicts.named_leaves(func.train_state.state_to_dict(states)), metrics["loss"]


def test_an_ensemble_equals_its_models_trained_separately():
    optimizer = transformation()
    step = func.make_step(loss_of(net()), optimizer, CTX)
    together, losses = run_ensemble(CTX)
    for number, state in enumerate(states_of(CTX, optimizer)):
        for i in range(3):
            metrics, state = step(state, batch_of(i, CTX))
        alone = func.tensordicts.named_leaves(func.train_state.state_to_dict(state))
        close(alone, {name: tensor[number] for name, tensor in together.items()})
        assert torch.allclose(metrics["loss"], losses[number])


def test_an_ensemble_on_ranks_equals_one_rank_with_one_all_reduce_per_step():
    expected, losses = run_ensemble(CTX)
    for world_size in (2, 4):
        results = simulate(run_ensemble, world_size)
        for state, seen in results:
            close(expected, state)
            assert torch.allclose(losses, seen)
        reduces = [event for event in results.trace if event.rank == 0 and event.op == "all_reduce"]
        assert len(reduces) == 3


def test_models_of_an_ensemble_draw_differently_and_can_have_separate_batches():
    optimizer = func.sgd(0.1)
    step = func.make_step(loss_of(net(dropout=0.5)), optimizer, CTX)
    same = func.stack([func.init_state(net(dropout=0.5), optimizer, CTX, seed=i) for i in range(3)])
    before = torch.get_rng_state()
    metrics, _ = func.ensemble(step, CTX)(same, batch_of(0, CTX))
    assert len(set(metrics["loss"].tolist())) == 3
    assert torch.equal(metrics["loss"], func.ensemble(step, CTX)(same, batch_of(0, CTX))[0]["loss"])
    assert torch.equal(before, torch.get_rng_state())
    x, y = zip(*(batch_of(i, CTX) for i in range(3)), strict=True)
    single = func.make_step(loss_of(net()), optimizer, CTX)
    separate, _ = func.ensemble(single, CTX, batch_dim=0)(same, (torch.stack(x), torch.stack(y)))
    for i, state in enumerate(func.unstack(same)):
        assert torch.allclose(separate["loss"][i], single(state, (x[i], y[i]))[0]["loss"])


def test_vmap_and_grad_trace_a_step():
    optimizer = func.sgd(0.1)
    step = func.make_step(loss_of(net()), optimizer, CTX)
    states = func.stack(states_of(CTX, optimizer))
    metrics, after = torch.vmap(step, in_dims=(0, None))(states, batch_of(0, CTX))
    expected, _ = func.ensemble(step, CTX)(states, batch_of(0, CTX))
    assert torch.allclose(metrics["loss"], expected["loss"])
    assert after.params["out.bias"].shape == (3, 3)

    def after_a_step(scale, state):
        x, y = batch_of(0, CTX)
        return step(step(state, (x * scale, y))[1], (x, y))[0]["loss"]

    slope = torch.func.grad(after_a_step)(
        torch.ones((), dtype=torch.float64), states_of(CTX, optimizer)[0]
    )
    rise = [after_a_step(1 + e, states_of(CTX, optimizer)[0]) for e in (1e-4, -1e-4)]
    assert torch.isclose(slope, (rise[0] - rise[1]) / 2e-4, rtol=1e-5)


def test_vmap_of_dropout_needs_a_generator():
    optimizer = func.sgd(0.1)
    step = func.make_step(loss_of(net(dropout=0.5)), optimizer, CTX)
    states = func.stack(states_of(CTX, optimizer, dropout=0.5))
    with pytest.raises(PurityError, match="ensemble"):
        torch.vmap(step, in_dims=(0, None))(states, batch_of(0, CTX))
    run = torch.vmap(
        lambda s, b: step(s, b, torch.Generator().manual_seed(0)),
        in_dims=(0, None),
        randomness="different",
    )
    assert run(states, batch_of(0, CTX))[0]["loss"].isfinite().all()


def test_per_sample_grads_equal_gradients_of_single_rows():
    model, (x, y) = net(), batch_of(0, CTX)
    params = TensorDict({n: p.detach() for n, p in model.named_parameters()})
    losses, grads = func.per_sample_grads(loss_of(model), CTX)(params, (x, y), torch.Generator())
    for i in range(len(y)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        assert torch.allclose(losses[i], loss)
        for name, grad in zip(
            params.keys(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            assert torch.allclose(grads[name][i], grad, atol=1e-12), name
    clipped = func.clip_per_sample(grads, 0.1)
    norms = torch.stack([grad.flatten(1).norm(dim=1) for grad in clipped.values()]).norm(dim=0)
    assert torch.allclose(norms, torch.full_like(norms, 0.1))


def test_samples_draw_differently():
    model = net(dropout=0.5)
    params = TensorDict({n: p.detach() for n, p in model.named_parameters()})
    row = torch.ones(1, 6, dtype=torch.float64).expand(4, 6), torch.zeros(4, dtype=torch.int64)
    losses, _ = func.per_sample_grads(loss_of(model), CTX)(params, row, torch.Generator())
    assert len(set(losses.tolist())) > 1


def run_private(ctx, noise=0.0, **options):
    model, optimizer = net(), func.sgd(0.5)
    state = func.init_state(model, optimizer, ctx, seed=0)
    step = func.dp_sgd(
        loss_of(model), optimizer, ctx, clip_norm=0.1, noise_multiplier=noise, **options
    )
    for i in range(2):
        _, state = step(state, batch_of(i, ctx))
    return dict(state.params.items())


def test_dp_sgd_without_noise_is_equal_on_ranks_and_with_micro_batches():
    expected = run_private(CTX)
    close(expected, run_private(CTX, num_micro_batches=4))
    for world_size in (2, 4):
        for params in simulate(run_private, world_size):
            close(expected, params)
    moved = torch.stack([(expected[n] - p).norm() for n, p in net().named_parameters()]).norm()
    assert 0 < moved <= 2 * 0.5 * 0.1 + 1e-9


def test_dp_sgd_accepts_a_batch_without_rows():
    # a random sample of the data may be empty
    optimizer = func.sgd(0.5)
    state = func.init_state(nn.Linear(2, 1), optimizer, CTX, seed=0)
    step = func.dp_sgd(
        lambda p, b, g: (b @ p["weight"].T).square().mean(),
        optimizer,
        CTX,
        clip_norm=1.0,
        noise_multiplier=0.0,
    )
    metrics, after = step(state, torch.zeros(0, 2))
    assert metrics["loss"] == 0
    close(dict(state.params.items()), dict(after.params.items()))


def test_the_generator_of_a_step_can_be_passed_by_name():
    optimizer = func.sgd(0.1)
    model = net(dropout=0.5)
    state = func.init_state(model, optimizer, CTX, seed=0)
    step = func.make_step(loss_of(model), optimizer, CTX)
    first, second = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    by_name, _ = step(state, batch_of(0, CTX), generator=first)
    by_position, _ = step(state, batch_of(0, CTX), second)
    assert by_name["loss"] == by_position["loss"]
    states = func.stack([state, state])
    metrics, _ = func.ensemble(step, CTX)(states, batch_of(0, CTX), generator=first)
    assert metrics["loss"].shape == (2,)


def test_dp_sgd_noise_has_the_right_deviation_on_any_number_of_ranks():
    def one(ctx):
        optimizer = func.sgd(1.0)
        state = func.init_state(nn.Linear(4000, 1, bias=False), optimizer, ctx, seed=0)
        step = func.dp_sgd(
            lambda p, b, g: p["weight"].sum() * 0,
            optimizer,
            ctx,
            clip_norm=2.0,
            noise_multiplier=3.0,
        )
        _, after = step(state, torch.zeros(4 // ctx.data_world_size, 1))
        return (after.params["weight"] - state.params["weight"]).std().item()

    for world_size in (1, 2, 4):
        for deviation in simulate(one, world_size):
            assert deviation == pytest.approx(2.0 * 3.0 / 4, rel=0.1)


def curvature(ctx):
    model = net()
    params = TensorDict({n: p.detach() for n, p in model.named_parameters()})
    vector = TensorDict({n: torch.ones_like(p) for n, p in params.items()})
    batch, generator = batch_of(0, ctx), torch.Generator()
    product = func.hessian_vector_product(loss_of(model), ctx, num_micro_batches=2)(
        params, vector, batch, generator
    )
    top = func.sharpness(loss_of(model), ctx, num_iterations=100)(params, batch, generator)
    return dict(product.items()), top


def test_hessian_vector_products_and_sharpness_equal_the_full_hessian():
    model, (x, y) = net(), batch_of(0, CTX)
    names, values = zip(*((n, p.detach()) for n, p in model.named_parameters()), strict=True)

    def loss(flat):
        chunks = flat.split([v.numel() for v in values])
        params = {n: c.view(v.shape) for n, c, v in zip(names, chunks, values, strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    hessian = torch.autograd.functional.hessian(loss, torch.cat([v.flatten() for v in values]))
    expected = hessian.sum(1)
    top = max(torch.linalg.eigvalsh(hessian), key=abs)
    for world_size in (1, 2):
        for product, value in simulate(curvature, world_size):
            assert torch.allclose(
                torch.cat([product[n].flatten() for n in names]), expected, atol=1e-12
            )
            assert torch.isclose(value, top, rtol=1e-3)


def run_sam(ctx, **options):
    model, optimizer = net(**options), func.sgd(0.1)
    state = func.init_state(model, optimizer, ctx, seed=0)
    step = func.sam(loss_of(model), optimizer, ctx, rho=0.2)
    for i in range(3):
        _, state = step(state, batch_of(i, ctx))
    return dict(state.params.items())


def test_sam_equals_its_definition_on_any_number_of_ranks():
    model = net()
    for i in range(3):
        x, y = batch_of(i, CTX)
        params = list(model.parameters())
        grads = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        norm = torch.stack([g.norm() for g in grads]).norm()
        with torch.no_grad():
            for p, g in zip(params, grads, strict=True):
                p.add_(0.2 * g / norm)
        uphill = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        with torch.no_grad():
            for p, g, u in zip(params, grads, uphill, strict=True):
                p.sub_(0.2 * g / norm).sub_(0.1 * u)
    for world_size in (1, 2, 4):
        for params in simulate(run_sam, world_size):
            close({n: p.detach() for n, p in model.named_parameters()}, params, 1e-10)


def test_both_gradients_of_sam_use_the_same_random_numbers():
    draws = []

    def loss_fn(params, batch, generator):
        draws.append(torch.rand((), generator=generator).item())
        return params["weight"].square().sum()

    optimizer = func.sgd(0.1)
    state = func.init_state(nn.Linear(2, 1), optimizer, CTX, seed=0)
    func.sam(loss_fn, optimizer, CTX)(state, None)
    assert draws[0] == draws[1]


def tasks(ctx):
    x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randint(0, 3, (4, 5), generator=torch.Generator().manual_seed(1))
    num_local = 4 // ctx.data_world_size
    rows = slice(ctx.data_rank * num_local, (ctx.data_rank + 1) * num_local)
    return (x[rows, :3], y[rows, :3]), (x[rows, 3:], y[rows, 3:])


def run_meta(ctx, inner=None):
    model, optimizer = net(), func.sgd(0.5)
    state = func.init_state(model, optimizer, ctx, seed=0)
    loss_fn = func.maml(loss_of(model), inner or func.sgd(0.3), num_steps=2)
    _, state = func.make_step(loss_fn, optimizer, ctx)(state, tasks(ctx))
    return dict(state.params.items())


def test_maml_equals_differentiating_the_inner_steps_on_any_number_of_ranks():
    model = net()
    names, params = zip(*model.named_parameters(), strict=True)
    (xs, ys), (xq, yq) = tasks(CTX)
    losses = []
    for t in range(4):
        fast = dict(zip(names, params, strict=True))
        for _ in range(2):
            loss = F.cross_entropy(torch.func.functional_call(model, fast, (xs[t],)), ys[t])
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {n: p - 0.3 * g for (n, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(F.cross_entropy(torch.func.functional_call(model, fast, (xq[t],)), yq[t]))
    grads = torch.autograd.grad(torch.stack(losses).mean(), params)
    expected = {n: p.detach() - 0.5 * g for n, p, g in zip(names, params, grads, strict=True)}
    for world_size in (1, 2, 4):
        for params in simulate(run_meta, world_size):
            close(expected, params)


@pytest.mark.parametrize(
    "inner",
    [func.adamw(0.1), func.rmsprop(0.1), func.chain(func.clip_by_global_norm(0.1), func.sgd(0.1))],
)
def test_maml_works_with_any_inner_optimizer(inner):
    for value in run_meta(CTX, inner).values():
        assert value.isfinite().all()


def test_adapt_equals_training_steps():
    model, (x, y) = net(), batch_of(0, CTX)
    state = func.init_state(model, func.adamw(0.1), CTX, seed=0)
    step = func.make_step(loss_of(model), func.adamw(0.1), CTX)
    adapted = func.adapt(loss_of(model), func.adamw(0.1), num_steps=3)(
        state.params, (x, y), torch.Generator()
    )
    for _ in range(3):
        _, state = step(state, (x, y))
    close(dict(state.params.items()), dict(adapted.items()))


def test_rollback_skips_a_poisoned_batch_and_returns_to_older_states():
    model, optimizer = net(), func.adamw(1e-2)
    step = func.make_step(loss_of(model), optimizer, CTX)
    run, poison = func.rollback(step, keep=3), torch.full((8, 6), float("nan"), dtype=torch.float64)
    history = func.init_state(model, optimizer, CTX, seed=0)
    for i in range(3):
        _, history = run(history, batch_of(i, CTX))
    states = history.states
    assert [int(s.step) for s in states] == [1, 2, 3]
    metrics, history = run(history, (poison, batch_of(0, CTX)[1]))
    assert bool(metrics["skipped"])
    assert history.states == states
    _, history = run(history, (poison, batch_of(0, CTX)[1]))
    assert history.states == states[:2]
    for _ in range(3):
        _, history = run(history, (poison, batch_of(0, CTX)[1]))
    assert (history.state, history.num_skipped) == (states[0], 5)
    _, history = run(history, batch_of(1, CTX))
    assert int(history.state.step) == 2
    assert not history.is_in_doubt


def test_rollback_of_a_donating_step_raises():
    step = func.make_step(loss_of(net()), func.sgd(0.1), CTX, donate=True)
    with pytest.raises(DonatedError, match="donate=False"):
        func.rollback(step)(func.init_state(net(), func.sgd(0.1), CTX, seed=0), batch_of(0, CTX))


@pytest.mark.parametrize(
    "make",
    [
        lambda loss_fn, tx: func.sam(loss_fn, tx, CTX),
        lambda loss_fn, tx: func.dp_sgd(loss_fn, tx, CTX, clip_norm=0.1, noise_multiplier=1.0),
        lambda loss_fn, tx: func.rollback(func.make_step(loss_fn, tx, CTX)),
    ],
    ids=["sam", "dp_sgd", "rollback"],
)
def test_sam_dp_sgd_and_rollback_are_pure(make):
    model, optimizer = net(dropout=0.2), func.adamw(1e-2)
    state = func.init_state(model, optimizer, CTX, seed=0)
    step = make(loss_of(model), optimizer)

    def once(state, batch):
        metrics, new = step(state, batch)
        return metrics, dict(getattr(new, "state", new).params.items())

    assert_pure(once, state, batch_of(0, CTX))


def compile_of(step, **options):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(step, fullgraph=True, backend="aot_eager", **options)


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def small_net(norm=False, seed=0):
    """Return a model of few parameters: the time to compile is proportional to their number."""
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 3)]
    if norm:
        layers.append(nn.BatchNorm1d(3))
    return nn.Sequential(*layers).double()


@pytest.mark.slow
@pytest.mark.parametrize("donate", [False, True])
def test_a_step_compiles_into_one_graph_for_each_shape(donate):
    model = small_net(norm=True)
    optimizer = func.chain(
        func.clip_by_global_norm(0.5),
        func.scale_by_schedule(func.cosine(9)),
        func.adamw(1e-2),
        func.ema(0.9),
    )
    step = func.make_step(loss_with(model), optimizer, CTX, has_buffers=True, donate=donate)
    eager = func.make_step(loss_with(model), optimizer, CTX, has_buffers=True)
    state = eager_state = func.init_state(model, optimizer, CTX, seed=0)
    if donate:
        state = func.init_state(model, optimizer, CTX, seed=0)
    compiled = compile_of(step)
    for rows in (8, 8, 8, 4, 4, 8):
        x, y = batch_of(0, CTX)
        before = state
        metrics, state = compiled(state, (x[:rows], y[:rows]))
        expected, eager_state = eager(eager_state, (x[:rows], y[:rows]))
        assert torch.allclose(metrics["loss"], expected["loss"], atol=1e-10)
        assert torch.allclose(metrics["grad_norm"], expected["grad_norm"], atol=1e-10)
        if donate:
            with pytest.raises(DonatedError):
                before.params["0.bias"]
    assert num_graphs() <= 2
    close(
        *(
            func.tensordicts.named_leaves(func.train_state.state_to_dict(s))
            for s in (eager_state, state)
        ),
        1e-8,
    )


def loss_with(model):
    def loss_fn(params, batch, generator, buffers):
        out, buffers = func.functional_call(
            model, params, batch[0], buffers=buffers, generator=generator
        )
        return F.cross_entropy(out, batch[1]), buffers

    return loss_fn


def test_a_compiled_step_with_dropout_is_seeded_and_restores_the_default_generator():
    model = nn.Sequential(nn.Dropout(0.5), small_net())
    optimizer = func.sgd(0.1)
    state = func.init_state(model, optimizer, CTX, seed=0)
    torch._dynamo.reset()
    step = func.compiled(func.make_step(loss_of(model), optimizer, CTX), CTX, backend="aot_eager")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, after = step(state, batch_of(0, CTX))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    again, _ = step(state, batch_of(0, CTX))
    second, _ = step(after, batch_of(0, CTX))
    assert first["loss"] == again["loss"] != second["loss"]


@pytest.mark.slow
def test_a_compiled_ensemble_with_dropout_takes_a_short_last_batch():
    optimizer = func.sgd(0.1)
    model = nn.Sequential(nn.Dropout(0.5), small_net())
    states = func.stack([func.init_state(model, optimizer, CTX, seed=i) for i in range(2)])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = func.ensemble(func.make_step(loss_of(model), optimizer, CTX), CTX)
    step = func.compiled(step, CTX, backend="aot_eager")
    x, y = batch_of(0, CTX)
    for rows in (8, 5, 8, 3):
        metrics, states = step(states, (x[:rows], y[:rows]))
        assert metrics["loss"].isfinite().all()
    assert num_graphs() == 3


def test_torch_compile_of_dropout_raises_with_a_fix():
    model, optimizer = net(dropout=0.5), func.sgd(0.1)
    state = func.init_state(model, optimizer, CTX, seed=0)
    with pytest.raises(Exception, match=r"compiled\(step, ctx\)"):
        compile_of(func.make_step(loss_of(model), optimizer, CTX))(state, batch_of(0, CTX))


@pytest.mark.slow
def test_an_ensemble_compiles():
    optimizer = transformation()
    step = func.ensemble(func.make_step(loss_of(small_net()), optimizer, CTX), CTX)
    states = func.stack(
        [func.init_state(small_net(seed=i), optimizer, CTX, seed=i) for i in range(3)]
    )
    compiled, eager_states = compile_of(step), states
    for i in range(3):
        metrics, states = compiled(states, batch_of(i, CTX))
        expected, eager_states = step(eager_states, batch_of(i, CTX))
        assert torch.allclose(metrics["loss"], expected["loss"])
    assert num_graphs() == 1


def test_fp16_under_a_transform_raises():
    ctx = fake_context(0, 1, config={"mixed_precision": "fp16"})
    optimizer = func.sgd(0.1)
    states = func.stack([func.init_state(net(dtype=torch.float32), optimizer, ctx, seed=0)])
    with pytest.raises(ConfigError, match="bf16"):
        func.ensemble(func.make_step(loss_of(net()), optimizer, ctx), ctx)(
            states, batch_of(0, ctx, torch.float32)
        )
