"""The functional step on simulated worlds equals one rank, the module path and PyTorch."""

import runpy

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel import func
from faccel.errors import ConfigError, DataError, ModelError
from faccel.testing import assert_pure, fake_context, simulate
from tests.functional import (
    batch_of,
    loss_of,
    loss_with_buffers,
    module_path,
    net,
    run,
    run_uneven,
    transformation,
)

OPTIONS = [{}, {"num_micro_batches": 2}, {"donate": True}, {"bucket_cap_mb": 1e-4}]


def close(a, b, atol=1e-12):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.allclose(value, b[name], rtol=0, atol=atol), name


@pytest.mark.parametrize("tied", [False, True], ids=["plain", "tied"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_equals_one_rank_on_the_global_batch(world_size, options, tied):
    expected, losses = run(fake_context(0, 1), tied=tied)
    for state, seen in simulate(lambda ctx: run(ctx, options=options, tied=tied), world_size):
        close(expected, state)
        assert torch.allclose(losses, seen, rtol=0, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_equals_the_module_path(world_size):
    results = simulate(module_path, world_size)
    for (state, _), params in zip(simulate(run, world_size), results, strict=True):
        close(
            {f"['params'][{name!r}]": p for name, p in params.items()},
            {k: state[k] for k in state if "params" in k},
        )


def test_weights_are_exact_for_any_rows_per_rank():
    expected, loss = run_uneven(fake_context(0, 1))
    for world_size in (2, 4):
        for state, seen in simulate(run_uneven, world_size):
            close(expected, state)
            assert torch.allclose(loss, seen, rtol=0, atol=1e-12)


def test_a_weight_of_zero_gives_zero_gradients():
    def step(ctx):
        params = TensorDict({"w": torch.ones(2)})
        grad_fn = func.value_and_grad(lambda p, b, g: (p["w"] * b).sum(), ctx, weight=lambda b: 0)
        return grad_fn(params, torch.ones(2), torch.Generator())

    for loss, grads in simulate(step, 2):
        assert loss == 0
        assert grads["w"].tolist() == [0, 0]


def test_one_all_reduce_per_bucket_has_gradients_loss_weight_and_buffers():
    def step(ctx):
        model = net(norm=True)
        state = func.init_state(model, func.sgd(0.1), ctx, seed=0)

        def loss_fn(params, batch, generator, buffers):
            loss, buffers = loss_with_buffers(model)(params, batch, generator, buffers)
            return loss * len(batch[1]), buffers

        options = {"has_buffers": True, "weight": lambda batch: len(batch[1])}
        func.make_step(loss_fn, func.sgd(0.1), ctx, **options)(state, batch_of(0, ctx))

    trace = [
        event for event in simulate(step, 2).trace if event.rank == 0 and event.op != "broadcast"
    ]
    assert [event.op for event in trace] == [
        "all_reduce",
        "all_reduce",
    ]  # the first compares buffers, once
    floats = (
        sum(p.numel() for p in net(norm=True).parameters()) + 2 + 12
    )  # loss, count; two running statistics
    assert trace[-1].num_bytes == 8 * floats


def test_bucket_cap_mb_limits_the_buckets():
    def step(ctx):
        params = TensorDict({name: torch.ones(1000) for name in "abcd"})
        func.value_and_grad(
            lambda p, b, g: sum(v.sum() for v in p.values()), ctx, bucket_cap_mb=8000 / 2**20
        )(params, None, torch.Generator())

    sizes = [event.num_bytes for event in simulate(step, 2).trace if event.rank == 0]
    assert sizes == [8000, 8000, 4]


def test_new_buffers_are_averaged_and_integers_kept():
    def step(ctx):
        model, optimizer = net(norm=True), func.sgd(0.1)
        state = func.init_state(model, optimizer, ctx, seed=0)
        step = func.make_step(loss_with_buffers(model), optimizer, ctx, has_buffers=True)
        x = torch.full((4, 6), float(ctx.rank), dtype=torch.float64)
        return dict(step(state, (x, torch.zeros(4, dtype=torch.int64)))[1].buffers.items())

    first, second = simulate(step, 2)
    close(first, second)
    means = [
        torch.tanh(net(norm=True).first(torch.full((6,), float(r), dtype=torch.float64)))
        for r in range(2)
    ]
    assert torch.allclose(first["norm.running_mean"], 0.1 * (means[0] + means[1]) / 2)
    assert first["norm.num_batches_tracked"] == 1


def test_batch_norm_equals_the_module_with_sequential_micro_batches():
    model, ctx, optimizer = net(norm=True), fake_context(0, 1), func.sgd(0.1)
    state = func.init_state(model, optimizer, ctx, seed=0)
    x, y = batch_of(0, ctx)
    step = func.make_step(
        loss_with_buffers(model), optimizer, ctx, has_buffers=True, num_micro_batches=2
    )
    _, state = step(state, (x, y))
    for rows in (slice(0, 4), slice(4, 8)):
        (F.cross_entropy(model(x[rows]), y[rows]) / 2).backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            assert torch.allclose(state.params[name], p - 0.1 * p.grad, atol=1e-12), name
    for name, buffer in model.named_buffers():
        assert torch.allclose(state.buffers[name], buffer, atol=1e-12), name


def dropped(ctx, num_steps=3, **options):
    model, optimizer = net(dropout=0.5), func.sgd(0.1)
    state = func.init_state(model, optimizer, ctx, seed=5)
    step = func.make_step(loss_of(model), optimizer, ctx, **options)
    losses = []
    for _ in range(num_steps):
        metrics, state = step(state, batch_of(0, ctx))
        losses.append(metrics["loss"].item())
    return losses, state


def test_dropout_masks_differ_between_ranks_and_steps_and_repeat():
    def masks(ctx):
        seen = []

        def loss_fn(params, batch, generator):
            seen.append(torch.rand((), generator=generator).item())
            return params["weight"].sum()

        optimizer = func.sgd(0.0)
        state = func.init_state(nn.Linear(1, 1), optimizer, ctx, seed=0)
        step = func.make_step(loss_fn, optimizer, ctx, num_micro_batches=2)
        for _ in range(2):
            _, state = step(state, torch.zeros(2))
        return seen

    results = simulate(masks, 2)
    assert len({draw for seen in results for draw in seen}) == 8
    assert simulate(masks, 2) == results
    assert dropped(fake_context(0, 1))[0] == dropped(fake_context(0, 1))[0]


def test_dropout_does_not_change_the_default_generator():
    before = torch.get_rng_state()
    losses, _ = dropped(fake_context(0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert len(set(losses)) == 3


@pytest.mark.parametrize("options", [{}, {"num_micro_batches": 2}, {"has_buffers": True}], ids=str)
def test_a_step_is_pure(options):
    ctx, model, optimizer = (
        fake_context(0, 1),
        net(norm="has_buffers" in options, dropout=0.2),
        transformation(),
    )
    state = func.init_state(model, optimizer, ctx, seed=0)
    loss_fn = loss_with_buffers(model) if options.get("has_buffers") else loss_of(model)
    step = func.make_step(loss_fn, optimizer, ctx, **options)
    assert_pure(step, state, batch_of(0, ctx))


def test_init_state_broadcasts_rank_0_and_does_not_change_the_model():
    def made(ctx):
        model = net(seed=ctx.rank, norm=True)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        state = func.init_state(model, func.sgd(0.1), ctx, seed=0)
        state.params["out.bias"].add_(1)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        return dict(state.params.items())

    first, second = simulate(made, 2)
    close(first, second, 0)


def test_merge_returns_a_module_and_raises_for_another_model():
    ctx, model = fake_context(0, 1), net(norm=True, tied=True)
    state = func.init_state(model, func.sgd(0.1), ctx, seed=0)
    _, state = func.make_step(loss_with_buffers(model), func.sgd(0.1), ctx, has_buffers=True)(
        state, batch_of(0, ctx)
    )
    merged = func.merge(model, state)
    assert merged.second.weight is merged.first.weight
    assert torch.equal(merged.first.weight, state.params["first.weight"])
    assert not torch.equal(merged.first.weight, model.first.weight)
    assert int(merged.norm.num_batches_tracked) == 1
    merged.out.bias.data.zero_()
    assert state.params["out.bias"].any()
    with pytest.raises(ModelError, match="`second"):
        func.merge(net(norm=True), state)


def test_frozen_parameters_are_constants_of_the_model():
    ctx, model = fake_context(0, 1), net()
    model.first.requires_grad_(False)
    state = func.init_state(model, func.sgd(0.1), ctx, seed=0)
    assert "first.weight" not in dict(state.params.items())
    _, state = func.make_step(loss_of(model), func.sgd(0.1), ctx)(state, batch_of(0, ctx))
    assert torch.equal(func.merge(model, state).first.weight, model.first.weight)


def test_a_resumed_state_is_equal_bit_for_bit(tmp_path):
    def before(ctx):
        model, optimizer = net(dropout=0.3), transformation()
        step = func.make_step(loss_of(model), optimizer, ctx)
        state = func.init_state(model, optimizer, ctx, seed=0)
        for i in range(4):
            if i == 2:
                faccel.save({"state": state}, tmp_path, ctx, step=i)
            _, state = step(state, batch_of(i, ctx))
        return func.tensordicts.named_leaves(func.train_state.state_to_dict(state))

    def after(ctx):
        model, optimizer = net(dropout=0.3), transformation()
        step = func.make_step(loss_of(model), optimizer, ctx)
        fresh = func.init_state(net(seed=9), optimizer, ctx, seed=8)
        state = faccel.load({"state": fresh}, tmp_path, ctx)["state"]
        assert isinstance(state, func.TrainState)
        for i in range(int(state.step), 4):
            _, state = step(state, batch_of(i, ctx))
        return func.tensordicts.named_leaves(func.train_state.state_to_dict(state))

    expected = simulate(before, 2)
    for a, b in zip(expected, simulate(after, 2), strict=True):
        close(a, b, 0)


def test_padded_batches_of_a_loader_are_split_and_weighted():
    model, rows = nn.Linear(1, 1, bias=False), torch.arange(10.0)[:, None]

    def train(ctx):
        loader = faccel.shard(DataLoader(TensorDataset(rows), 4), ctx)
        optimizer = func.sgd(0.01)
        state = func.init_state(model, optimizer, ctx, seed=0)

        def loss_fn(params, batch, generator):
            (x,) = batch.data
            return func.functional_call(model, params, x[: batch.num_valid]).square().sum()

        step = func.make_step(
            loss_fn, optimizer, ctx, weight=lambda batch: batch.num_valid, num_micro_batches=2
        )
        for batch in faccel.batches(loader):
            _, state = step(state, batch)
        return state.params["weight"].item()

    weight = model.weight.item()
    for global_batch in (rows[:8], rows[8:]):
        weight -= 0.01 * 2 * weight * global_batch.square().mean().item()
    for seen in simulate(train, 2):
        assert abs(seen - weight) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_keeps_states_in_fp32_and_equal_on_ranks(precision):
    def train(ctx):
        model, optimizer = net(dtype=torch.float32), func.adamw(1e-2)
        state = func.init_state(model, optimizer, ctx, seed=0)
        step = func.make_step(loss_of(model), optimizer, ctx)
        for i in range(5):
            metrics, state = step(state, batch_of(i, ctx, torch.float32))
        assert {p.dtype for p in state.params.values()} == {torch.float32}
        return dict(state.params.items()), metrics["loss"]

    config = {"mixed_precision": precision}
    expected = train(fake_context(0, 1))
    first, second = simulate(train, 2, config=config)
    close(first[0], second[0], 0)
    assert abs(first[1] - expected[1]) < 0.05


def test_an_fp16_overflow_is_skipped_and_the_scale_decreases():
    ctx = fake_context(0, 1, config={"mixed_precision": "fp16"})
    model, optimizer = nn.Linear(1, 1), func.adamw(1e-2)
    state = func.init_state(model, optimizer, ctx, seed=0)
    step = func.make_step(lambda p, b, g: func.functional_call(model, p, b).mean(), optimizer, ctx)
    metrics, after = step(state, torch.full((4, 1), 1e4))  # 65536 * 1e4 is no fp16
    assert bool(metrics["skipped"])
    assert (after.scaler.scale, after.scaler.num_skipped, int(after.step)) == (32768.0, 1, 1)
    assert torch.equal(after.params["weight"], state.params["weight"])
    assert int(after.opt["count"]) == 0


def test_the_digits_example_equals_its_module_path():
    example = runpy.run_path("examples/digits.py", run_name="digits")
    x, y = (t for t in example["datasets"]()[0].tensors)
    ctx = fake_context(0, 1)
    torch.manual_seed(0)
    model, optimizer = example["Net"](), func.sgd(0.02, momentum=0.9)
    state = func.init_state(model, optimizer, ctx, seed=0)
    step = func.make_step(loss_of(model), optimizer, ctx)
    wrapped = faccel.wrap(model, ctx)
    opt, scaler = (
        torch.optim.SGD(wrapped.parameters(), lr=0.02, momentum=0.9),
        faccel.init_scaler(ctx),
    )
    for i in range(20):
        rows = slice(i * 64 % 1280, i * 64 % 1280 + 64)
        _, state = step(state, (x[rows], y[rows]))
        scaler = faccel.scaled_backward(F.cross_entropy(wrapped(x[rows]), y[rows]), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    for name, p in model.named_parameters():
        assert torch.allclose(state.params[name], p, rtol=0, atol=1e-6), name


def test_a_sharded_mesh_raises():
    def step(ctx):
        func.init_state(net(), func.sgd(0.1), ctx, seed=0)

    with pytest.raises(ConfigError, match="replicas") as caught:
        simulate(step, 2, mesh="dp_shard=2")
    assert "faccel.wrap" in caught.value.fix


def test_a_batch_that_cannot_be_split_raises():
    ctx, model = fake_context(0, 1), net()
    state = func.init_state(model, func.sgd(0.1), ctx, seed=0)
    step = func.make_step(loss_of(model), func.sgd(0.1), ctx, num_micro_batches=3)
    with pytest.raises(DataError, match="8 rows, num_micro_batches=3"):
        step(state, batch_of(0, ctx))
