"""DiLoCo, compared with its algorithm on replicas in one process, with PyTorch's optimizers."""

import pytest
import torch
from torch import nn

import faccel
from faccel.checkpoint import per_rank
from faccel.errors import ConfigError, DesyncError, ModelError
from faccel.parallel import diloco, init_diloco, local_sgd
from faccel.testing import assert_replicated, fake_context, simulate
from tests.models import loss_of, model, tokens

ROWS, STEPS = 8, 8
SIZES = (10, 10, 20, 40)  # elements of the four parameters of `Parts`


def batch(step, rank, num_ranks):
    rows = tokens(ROWS, seed=step).chunk(num_ranks)[rank]
    return rows[:, :-1], rows[:, 1:]


def inner(params):
    return torch.optim.AdamW(params, lr=1e-2)


def update(net, opt, scaler, ctx, step):
    x, y = batch(step, ctx.data_rank, ctx.data_world_size)
    with faccel.grad_sync(net, on=False):
        scaler = faccel.scaled_backward(loss_of(net(x), y), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    return scaler


def train(ctx, every, options):
    net = faccel.wrap(model(), ctx)
    opt = faccel.wrap_optimizer(inner(net.parameters()), net, ctx)
    scaler = faccel.init_scaler(ctx)
    outer = init_diloco(net, ctx, every=every, **options)
    infos = []
    for step in range(1, STEPS + 1):
        scaler = update(net, opt, scaler, ctx, step)
        info, outer = diloco(outer, net, ctx, step=step)
        infos.append(info)
        assert_replicated(dict(outer.anchors), ctx)
    return {name: p.detach().clone() for name, p in net.named_parameters()}, infos, outer


def algorithm(every, num_ranks, lr=0.7, momentum=0.9, fragment_of=None):
    """The papers' algorithm: replicas in a list, and `torch.optim.SGD` as the outer optimizer.

    `fragment_of` maps names of parameters to `(offset, fragment)`; without it there is one.
    """
    replicas = [model() for _ in range(num_ranks)]
    opts = [inner(replica.parameters()) for replica in replicas]
    shared = dict(model().named_parameters())
    outers = {
        name: torch.optim.SGD([param], lr=lr, momentum=momentum, nesterov=momentum > 0)
        for name, param in shared.items()
    }
    for step in range(1, STEPS + 1):
        for rank, (net, opt) in enumerate(zip(replicas, opts, strict=True)):
            x, y = batch(step, rank, num_ranks)
            opt.zero_grad()
            loss_of(net(x), y).backward()
            opt.step()
        for name, param in shared.items():
            offset = 0 if fragment_of is None else fragment_of[name]
            if (step - offset) % every:
                continue
            locals_ = [dict(replica.named_parameters())[name].detach() for replica in replicas]
            param.grad = sum(param.detach() - local for local in locals_) / num_ranks
            outers[name].step()
            with torch.no_grad():
                for local in locals_:
                    local.copy_(param)
    return [dict(replica.named_parameters()) for replica in replicas], shared


def check_close(got, expected, atol=1e-12):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value.detach(), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("every", "num_ranks", "options"),
    [
        (3, 2, {}),
        (2, 1, {}),
        pytest.param(1, 2, {}, marks=pytest.mark.slow),
        pytest.param(3, 4, {"lr": 0.5, "momentum": 0.5}, marks=pytest.mark.slow),
        pytest.param(4, 2, {"lr": 1.0, "momentum": 0.0}, marks=pytest.mark.slow),
    ],
)
def test_it_is_the_algorithm_of_the_paper(every, num_ranks, options):
    replicas, shared = algorithm(every, num_ranks, **options)
    for (params, infos, outer), expected in zip(
        simulate(train, num_ranks, every, options), replicas, strict=True
    ):
        check_close(params, expected)
        check_close(outer.anchors, shared)
        assert [info.synced for info in infos] == [s % every == 0 for s in range(1, STEPS + 1)]
        sent = sum(param.nbytes for param in params.values()) * (num_ranks > 1)
        assert [info.num_bytes for info in infos] == [sent * info.synced for info in infos]


def by_middle(num_fragments):
    """The fragment of each parameter: the one in which its middle element is."""
    sizes = {name: param.numel() for name, param in model().named_parameters()}
    total, before, fragments = sum(sizes.values()), 0, {}
    for name, size in sizes.items():
        fragments[name] = int((before + size / 2) / total * num_fragments)
        before += size
    return fragments


SCHEDULES = [(4, 2), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(5, 2), (3, 3)])]


@pytest.mark.parametrize(("every", "num_fragments"), SCHEDULES)
def test_fragments_are_synchronised_in_turn(every, num_fragments):
    fragments = by_middle(num_fragments)
    assert len(set(fragments.values())) > 1
    offsets = {name: every * p // num_fragments for name, p in fragments.items()}
    replicas, shared = algorithm(every, 2, fragment_of=offsets)
    options = {"num_fragments": num_fragments}
    for (params, infos, outer), expected in zip(
        simulate(train, 2, every, options), replicas, strict=True
    ):
        check_close(params, expected)
        check_close(outer.anchors, shared)
        for step, info in enumerate(infos, 1):
            due = [p for p in range(num_fragments)
                   if (step - every * p // num_fragments) % every == 0]  # fmt: skip
            assert list(info.fragments) == due
            names = [name for name, p in fragments.items() if p in due]
            assert info.num_bytes == sum(params[name].nbytes for name in names)


@pytest.mark.slow
def test_without_momentum_and_with_rate_1_it_is_local_sgd():
    def averaged(ctx):
        net = faccel.wrap(model(), ctx)
        opt = faccel.wrap_optimizer(inner(net.parameters()), net, ctx)
        scaler = faccel.init_scaler(ctx)
        for step in range(1, STEPS + 1):
            scaler = update(net, opt, scaler, ctx, step)
            local_sgd(net, ctx, step=step, every=4)
        return {name: p.detach().clone() for name, p in net.named_parameters()}

    expected = simulate(averaged, 2)[0]
    check_close(simulate(train, 2, 4, {"lr": 1.0, "momentum": 0.0})[0][0], expected, atol=1e-10)


# 9 updates, saved after 5: with `every=4` in the middle of a round, and fragments have their turn
# at different steps.
def run_and_save(ctx, folder, options):
    net = faccel.wrap(model(), ctx)
    opt = faccel.wrap_optimizer(inner(net.parameters()), net, ctx)
    scaler = faccel.init_scaler(ctx)
    outer = init_diloco(net, ctx, every=4, **options)
    for step in range(1, 10):
        scaler = update(net, opt, scaler, ctx, step)
        _, outer = diloco(outer, net, ctx, step=step)
        if step == 5:
            state = {"model": per_rank(net), "opt": per_rank(opt), "outer": outer}
            faccel.save(state, folder, ctx, step=step)
    return values(net, outer)


def resume(ctx, folder):
    net = faccel.wrap(model(), ctx)
    opt = faccel.wrap_optimizer(inner(net.parameters()), net, ctx)
    scaler = faccel.init_scaler(ctx)
    # Other options: those of the checkpoint are the ones that count.
    outer = init_diloco(net, ctx, every=9, lr=0.1)
    state = {"model": per_rank(net), "opt": per_rank(opt), "outer": outer}
    outer = faccel.load(state, folder, ctx)["outer"]
    for step in range(6, 10):
        scaler = update(net, opt, scaler, ctx, step)
        _, outer = diloco(outer, net, ctx, step=step)
    return values(net, outer)


def values(net, outer):
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    return [params, dict(outer.anchors), dict(outer.velocities)]


@pytest.mark.parametrize("options", [{}, {"num_fragments": 2, "momentum": 0.5}])
def test_a_resumed_run_is_equal_bit_for_bit(tmp_path, options):
    expected = list(simulate(run_and_save, 2, tmp_path, options))
    resumed = list(simulate(resume, 2, tmp_path))
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


def test_a_round_that_ends_is_saved_as_one_model(tmp_path):
    def save(ctx):
        net = faccel.wrap(model(), ctx)
        opt = faccel.wrap_optimizer(inner(net.parameters()), net, ctx)
        outer = init_diloco(net, ctx, every=4, num_fragments=2)
        update(net, opt, faccel.init_scaler(ctx), ctx, 1)
        info, outer = diloco(outer, net, ctx, step=1, sync_all=True)
        assert info.fragments == (0, 1)
        assert_replicated(dict(net.named_parameters()), ctx)
        faccel.save({"model": net, "outer": outer}, tmp_path, ctx, step=1)
        return values(net, outer)

    def load(ctx):
        net = faccel.wrap(model(), ctx)
        state = {"model": net, "outer": init_diloco(net, ctx, every=4, num_fragments=2)}
        return values(net, faccel.load(state, tmp_path, ctx)["outer"])

    expected = simulate(save, 2)[0]
    for num_ranks in (1, 3):  # other numbers of replicas continue
        for loaded in simulate(load, num_ranks):
            torch.testing.assert_close(loaded, expected, rtol=0, atol=0)


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        for index, size in enumerate(SIZES):
            self.register_parameter(f"p{index}", nn.Parameter(torch.zeros(size)))
        self.frozen = nn.Parameter(torch.zeros(7), requires_grad=False)

    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("num_fragments", "steps"),
    [
        (1, {4: ["p0", "p1", "p2", "p3"]}),
        # 80 elements; the middles are at 5, 15, 30 and 60
        (2, {4: ["p0", "p1", "p2"], 6: ["p3"]}),
        (4, {4: ["p0", "p1"], 5: ["p2"], 7: ["p3"]}),
    ],
)
def test_a_fragment_has_consecutive_parameters_and_others_stay(num_fragments, steps):
    ctx = fake_context(0, 1)
    net = faccel.wrap(Parts(), ctx)
    outer = init_diloco(net, ctx, every=4, num_fragments=num_fragments)
    changed = {}
    for step in range(4, 8):
        with torch.no_grad():
            for param in net.parameters():
                param.fill_(1.0)
        before = dict(outer.anchors)
        _, outer = diloco(outer, net, ctx, step=step)
        names = [name for name in before if outer.anchors[name] is not before[name]]
        if names:
            changed[step] = names
        for name, param in net.named_parameters():
            assert (param == 1).all() == (name not in names)
    assert changed == steps


def test_records_are_not_modified():
    ctx = fake_context(0, 1)
    net = faccel.wrap(Parts(), ctx)
    outer = init_diloco(net, ctx, every=1)
    nn.init.ones_(net.module.p0)
    _, after = diloco(outer, net, ctx, step=1)
    assert outer.anchors["p0"].sum() == 0 == outer.velocities["p0"].sum()
    # One step of 0.7 * (1 + 0.9) in the direction in which the rank has moved.
    torch.testing.assert_close(after.anchors["p0"], torch.full((10,), 0.7 * 1.9))


def test_parameters_of_16_bits_have_anchors_of_32():
    ctx = fake_context(0, 1)
    net = faccel.wrap(nn.Linear(2, 1, bias=False).to(torch.bfloat16), ctx)
    outer = init_diloco(net, ctx, every=1, lr=1e-3, momentum=0.0)
    for _ in range(4):
        nn.init.ones_(net.module.weight)
        start = outer.anchors["weight"].clone()
        _, outer = diloco(outer, net, ctx, step=1)
        assert (outer.anchors["weight"] > start).all()
    assert outer.anchors["weight"].dtype == torch.float32
    assert net.module.weight.dtype == torch.bfloat16


OPTIONS = {
    "every": {"every": 0},
    "lr": {"lr": 0.0},
    "momentum": {"momentum": 1.5},
    "num_fragments": {"num_fragments": 0},
    "must not exceed": {"num_fragments": 4},
    "=9, 4 parameters": {"num_fragments": 5, "every": 9},
}


@pytest.mark.parametrize("message", OPTIONS)
def test_an_invalid_option_is_an_error(message):
    ctx = fake_context(0, 1)
    net = faccel.wrap(Parts(), ctx)
    with pytest.raises(ConfigError, match=message):
        init_diloco(net, ctx, **{"every": 3} | OPTIONS[message])


def test_a_model_that_does_not_fit_is_an_error():
    ctx = fake_context(0, 1)
    net = faccel.wrap(Parts(), ctx)
    outer = init_diloco(net, ctx, every=1)
    with pytest.raises(ConfigError, match="step"):
        diloco(outer, net, ctx, step=0)
    with pytest.raises(ConfigError, match="init_diloco"):
        diloco({}, net, ctx, step=1)
    net.module.p1.requires_grad_(False)
    with pytest.raises(ModelError, match="`p1`"):
        diloco(outer, net, ctx, step=1)
    with pytest.raises(ModelError, match="frozen"):
        init_diloco(faccel.wrap(nn.Linear(2, 1).requires_grad_(False), ctx), ctx, every=1)


@pytest.mark.parametrize("shape", [(1,), (1, 10), (10, 1), (11,)])
def test_a_parameter_of_another_shape_is_an_error_and_nothing_is_broadcast(shape):
    ctx = fake_context(0, 1)
    net = faccel.wrap(Parts(), ctx)
    outer = init_diloco(net, ctx, every=1)
    net.module.p0 = nn.Parameter(torch.ones(shape))
    with pytest.raises(ModelError, match="`p0` of `model` has another shape"):
        diloco(outer, net, ctx, step=1)
    assert torch.equal(net.module.p0, torch.ones(shape))
    # The fix of the message.
    outer = init_diloco(net, ctx, every=1)
    diloco(outer, net, ctx, step=1)


@pytest.mark.parametrize("mesh", ["dp_shard=2", "tp=2"])
def test_a_mesh_that_shards_parameters_is_an_error(mesh):
    ctx = fake_context(0, 2, mesh=mesh)
    net = faccel.WrappedModel(nn.Linear(2, 1), nn.Linear(2, 1), ctx.parallelism, ctx, run=print)
    with pytest.raises(ConfigError, match="dp_replicate=2"):
        init_diloco(net, ctx, every=2)


def test_ranks_that_disagree_about_the_step_are_an_error():
    def fn(ctx):
        net = faccel.wrap(nn.Linear(2, 1), ctx)
        diloco(init_diloco(net, ctx, every=2), net, ctx, step=1 + ctx.rank)

    with pytest.raises(DesyncError, match="rank 0"):
        simulate(fn, 2)
