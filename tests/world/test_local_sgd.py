"""Local SGD in simulated worlds, compared with DDP and with replicas averaged by hand."""

import itertools

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ConfigError, DesyncError, ModelError, TreeError
from faccel.testing import assert_replicated, fake_context, simulate
from faccel.training.local_sgd import SyncInfo, averaged, local_sgd
from tests.models import loss_of, model, tokens
from tests.ranks import run_ranks

ROWS, STEPS, RATE = 8, 8, 0.1


def batch(step, rank, world_size):
    rows = tokens(ROWS, seed=step).chunk(world_size)[rank]
    return rows[:, :-1], rows[:, 1:]


def train(ctx, every, bucket_cap_mb=25.0):
    """Train for `STEPS` updates; `every` None is DDP."""
    net = faccel.wrap(model(), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(net.parameters(), lr=RATE), net, ctx)
    scaler, infos = faccel.init_scaler(ctx), []
    for step in range(1, STEPS + 1):
        x, y = batch(step, ctx.data_rank, ctx.data_world_size)
        with faccel.grad_sync(net, on=every is None):
            scaler = faccel.scaled_backward(loss_of(net(x), y), scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        if every is not None:
            infos.append(local_sgd(net, ctx, step=step, every=every, bucket_cap_mb=bucket_cap_mb))
            if infos[-1].synced:
                assert_replicated(dict(net.named_parameters()), ctx)
    return {name: p.detach().clone() for name, p in net.named_parameters()}, infos


def by_hand(every, world_size):
    """Independent replicas in one process, averaged after each `every`-th update."""
    replicas = [model() for _ in range(world_size)]
    opts = [torch.optim.SGD(replica.parameters(), lr=RATE) for replica in replicas]
    for step in range(1, STEPS + 1):
        for rank, (net, opt) in enumerate(zip(replicas, opts, strict=True)):
            x, y = batch(step, rank, world_size)
            opt.zero_grad()
            loss_of(net(x), y).backward()
            opt.step()
        if step % every == 0:
            with torch.no_grad():
                for same in zip(*(replica.parameters() for replica in replicas), strict=True):
                    mean = sum(same) / world_size
                    for p in same:
                        p.copy_(mean)
    return [dict(replica.named_parameters()) for replica in replicas]


def check_close(got, expected, atol=1e-12):
    assert got.keys() == expected.keys()
    assert max((got[name] - expected[name]).abs().max().item() for name in got) < atol


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_average_after_each_step_of_plain_sgd_is_ddp(world_size):
    for (got, _), (expected, _) in zip(
        simulate(train, world_size, 1), simulate(train, world_size, None), strict=True
    ):
        check_close(got, expected)


@pytest.mark.parametrize("every", [2, 3, 4])
def test_replicas_train_independently_between_two_averages(every):
    for (got, infos), expected in zip(simulate(train, 2, every), by_hand(every, 2), strict=True):
        check_close(got, expected)
        assert [info.synced for info in infos] == [
            step % every == 0 for step in range(1, STEPS + 1)
        ]


def test_processes_equal_a_simulation():
    for (real, infos), (simulated, same) in zip(
        run_ranks(train, 2, 4), simulate(train, 2, 4), strict=True
    ):
        check_close(real, simulated)
        assert infos == same


def sent(out, rank):
    """The bytes of a rank's all-reduces, without those of `wrap` and `assert_replicated`."""
    return sum(e.num_bytes for e in out.trace if e.rank == rank and e.op == "all_reduce")


def test_num_bytes_counts_what_is_sent_and_falls_with_rarer_averages():
    ddp = sent(simulate(train, 2, None), 0)
    # At its first update, DDP compares two numbers of 8 bytes for each parameter.
    ddp -= 2 * 8 * len(list(model().parameters()))
    for every in (1, 2, 4, 8):
        out = simulate(train, 2, every)
        for rank in range(2):
            assert sum(info.num_bytes for info in out[rank][1]) == sent(out, rank) == ddp // every


@pytest.mark.parametrize("bucket_cap_mb", [25.0, 0.01, 1e-9])
def test_a_bucket_is_one_all_reduce(bucket_cap_mb):
    out, cap = simulate(train, 2, STEPS, bucket_cap_mb), bucket_cap_mb * 2**20
    sizes = [e.num_bytes for e in out.trace if e.rank == 0 and e.op == "all_reduce"]
    parameters = sorted(p.nbytes for p in model().parameters())
    if max(parameters) <= cap:
        assert max(sizes) <= cap
        assert all(a + b > cap for a, b in itertools.pairwise(sizes))  # as many as fit
    else:
        assert sorted(sizes) == parameters  # each its own
    check_close(out[0][0], by_hand(STEPS, 2)[0])


def test_a_mean_is_new_keeps_dtypes_and_does_not_change_the_argument():
    def fn(ctx):
        params = {
            "b": torch.full((2, 3), ctx.rank + 1.0),
            "a": torch.tensor(ctx.rank * 2.0, dtype=torch.float64),
        }
        params |= {
            "d": torch.ones(5) * ctx.rank,
            "half": torch.tensor([ctx.rank, 1], dtype=torch.bfloat16),
            "c": torch.tensor([1j * ctx.rank]),
        }
        before = {name: p.clone() for name, p in params.items()}
        means = averaged(params, ctx)
        assert list(means) == list(params)
        for name, mean in means.items():
            assert torch.equal(params[name], before[name])
            assert (mean.dtype, mean.shape) == (params[name].dtype, params[name].shape)
            assert mean.untyped_storage().nbytes() == mean.nbytes
            mean.zero_()
            assert torch.equal(params[name], before[name])
        return averaged(dict(reversed(params.items())) if ctx.rank else params, ctx)

    for world_size in (1, 2, 3):
        for means in simulate(fn, world_size):
            middle = (world_size - 1) / 2
            assert torch.equal(means["b"], torch.full((2, 3), middle + 1))
            assert means["a"] == 2 * middle
            assert means["half"].tolist() == [middle, 1]
            assert means["c"] == 1j * middle


def test_frozen_parameters_are_not_sent():
    def fn(ctx):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        net[0].requires_grad_(False)
        return local_sgd(faccel.wrap(net, ctx), ctx, step=1, every=1)

    out = simulate(fn, 2)
    assert out[0] == SyncInfo(synced=True, num_bytes=4 * (4 * 2 + 2)) == out[1]
    assert sent(out, 0) == out[0].num_bytes


@pytest.mark.parametrize(
    "options",
    [
        {"every": 0},
        {"every": -1},
        {"step": 0},
        {"bucket_cap_mb": 0},
        {"bucket_cap_mb": float("nan")},
    ],
    ids=str,
)
def test_a_number_that_is_not_positive_is_an_error(options):
    ctx = fake_context(0, 1)
    net = faccel.wrap(nn.Linear(2, 1), ctx)
    with pytest.raises(ConfigError, match=next(iter(options))):
        local_sgd(net, ctx, **{"step": 1, "every": 1} | options)


@pytest.mark.parametrize("mesh", ["dp_shard=2", "tp=2", "dp_replicate=1,cp=2"])
def test_a_mesh_that_shards_parameters_is_an_error(mesh):
    ctx = fake_context(0, 2, mesh=mesh)
    with pytest.raises(ConfigError, match="dp_replicate=2"):
        averaged({"w": torch.ones(2)}, ctx)
    with pytest.raises(ConfigError, match="dp_replicate=2"):
        net = faccel.WrappedModel(nn.Linear(2, 1), nn.Linear(2, 1), ctx.parallelism, ctx, run=print)
        local_sgd(net, ctx, step=1, every=2)


def test_a_value_without_a_mean_is_named():
    ctx = fake_context(0, 1)
    with pytest.raises(TreeError, match="count"):
        averaged({"w": torch.ones(2), "count": torch.tensor(3)}, ctx)
    with pytest.raises(ModelError, match="wrap"):
        local_sgd(nn.Linear(2, 1), ctx, step=1, every=1)


def test_ranks_that_disagree_about_the_step_are_an_error_that_names_them():
    def fn(ctx):
        local_sgd(faccel.wrap(nn.Linear(2, 1), ctx), ctx, step=1 + ctx.rank, every=2)

    with pytest.raises(DesyncError, match="rank 0"):
        simulate(fn, 2)
