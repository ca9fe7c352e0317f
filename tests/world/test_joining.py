"""Training on uneven inputs, compared with one model whose gradients are summed by hand."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import ConfigError, DataError, ModelError
from faccel.testing import assert_replicated, fake_context, simulate
from faccel.training.join import join
from tests.models import loss_of, model, tokens
from tests.ranks import run_ranks

ROWS, AFTER = 2, 2  # rows of a batch; updates of all ranks after those that are uneven
# Adam's default would scale rounding errors in the gradients of key biases, which are 0, to full
# updates.
EPS = 1e-3


def update(net, opt, schedule, rank, step, ctx):
    rows = tokens(ROWS, seed=100 * rank + step)
    scaler = faccel.scaled_backward(
        loss_of(net(rows[:, :-1]), rows[:, 1:]), faccel.init_scaler(ctx), ctx
    )
    faccel.optimizer_step(opt, scaler, ctx, scheduler=schedule)


def train(ctx, counts):
    """Train for `counts[rank]` updates, then together for `AFTER`."""
    net = faccel.wrap(model(), ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(net.parameters(), lr=1e-2, eps=EPS), net, ctx)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    with join(net, opt, ctx, scheduler=schedule):
        for step in range(counts[ctx.rank]):
            update(net, opt, schedule, ctx.rank, step, ctx)
    first = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert_replicated(first, ctx)
    for step in range(AFTER):
        update(net, opt, schedule, ctx.rank, max(counts) + step, ctx)
    last = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert_replicated(last, ctx)
    return first, last, schedule.last_epoch, opt.param_groups[0]["lr"]


def by_hand(counts):
    net = model()
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2, eps=EPS)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    states = []
    for step in range(max(counts) + AFTER):
        opt.zero_grad()
        for rank, count in enumerate(counts):
            if step < count or step >= max(counts):
                rows = tokens(ROWS, seed=100 * rank + step)
                (loss_of(net(rows[:, :-1]), rows[:, 1:]) / len(counts)).backward()
        opt.step()
        schedule.step()
        states.append({name: p.detach().clone() for name, p in net.named_parameters()})
    start = dict(model().named_parameters())
    return (
        [start, *states][max(counts)],
        states[-1],
        schedule.last_epoch,
        opt.param_groups[0]["lr"],
    )


def check_close(got, expected, atol=1e-12):
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert max((a[name] - b[name]).abs().max().item() for name in a) < atol
    assert got[2] == expected[2]
    assert got[3] == pytest.approx(expected[3])


COUNTS = [(3, 1), (1, 4), (2, 2), (0, 3), (0, 0), (1, 3, 2)]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_ranks_may_end_at_different_updates(counts):
    for got in simulate(train, len(counts), counts):
        check_close(got, by_hand(counts))


@pytest.mark.parametrize("counts", [(3, 1), (1, 4)], ids=str)
def test_processes_may_end_at_different_updates(counts):
    for got in run_ranks(train, len(counts), counts):
        check_close(got, by_hand(counts))


def read_uneven(ctx):
    """Train on a loader of which rank 0 has a batch more."""
    net = faccel.wrap(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(1)).double(), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, ctx)
    # Two steps of 2 rows on each rank, then a single row on rank 0, each with 3 values for batch
    # norm.
    rows = torch.arange(27.0, dtype=torch.float64).reshape(9, 1, 3)
    loader = faccel.shard(DataLoader(rows, batch_size=2), ctx, tail="uneven")
    scaler, count = faccel.init_scaler(ctx), 0
    with join(net, opt, ctx):
        for x in loader:
            scaler = faccel.scaled_backward(net(x).square().mean(), scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            count += 1
    assert_replicated(net.state_dict(), ctx)
    with pytest.raises(DataError, match="join"):
        for x in loader:
            faccel.scaled_backward(net(x).square().mean(), scaler, ctx)
    return count


def test_an_uneven_loader_can_be_trained_on_only_inside_join():
    assert simulate(read_uneven, 2) == (3, 2)
    assert run_ranks(read_uneven, 2) == [3, 2]


def test_join_leaves_no_hook_and_no_warning_filter():
    def fn(ctx):
        net = faccel.wrap(nn.Linear(2, 1), ctx)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        filters = list(warnings.filters)
        with join(net, opt, ctx):
            for _ in range(1 + ctx.rank):
                net(torch.ones(1, 2)).sum().backward()
        assert warnings.filters == filters
        faccel.barrier(ctx)
        net(torch.ones(1, 2)).sum().backward()

    def num_calls(out):
        ops = [e.op for e in out.trace if e.rank == 0]
        return len(ops) - ops.index("barrier") - 1

    assert num_calls(simulate(fn, 2)) == 1  # the gradients


def test_an_error_inside_is_raised_as_it_is_and_leaves_the_context():
    def fn(ctx):
        net = faccel.wrap(nn.Linear(2, 1), ctx)
        with (
            pytest.raises(KeyError, match="mine"),
            join(net, torch.optim.SGD(net.parameters(), lr=0.1), ctx),
        ):
            raise KeyError("mine")
        assert not ctx.lifetime.has_join

    simulate(fn, 2)


def test_join_raises_where_it_is_unsupported():
    opt = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    for mesh in ("dp_shard=2", "tp=2"):
        ctx = fake_context(0, 2, mesh=mesh)
        net = faccel.WrappedModel(nn.Linear(2, 1), nn.Linear(2, 1), ctx.parallelism, ctx, run=print)
        with pytest.raises(ConfigError, match="replicas"):
            join(net, opt, ctx)
    with pytest.raises(ModelError, match="wrap"):
        join(nn.Linear(2, 1), opt, fake_context(0, 1))

    def fp16(ctx):
        with pytest.raises(ConfigError, match="bf16"):
            join(faccel.wrap(nn.Linear(2, 1), ctx), opt, ctx)

    def zero(ctx):
        net = faccel.wrap(
            nn.Linear(2, 1),
            ctx,
            plan=faccel.Plan(ddp=faccel.parallel.DdpConfig(shard_optimizer=True)),
        )
        with pytest.raises(ConfigError, match="shard_optimizer"):
            join(net, opt, ctx)

    simulate(fp16, 2, config={"mixed_precision": "fp16"})
    simulate(zero, 2)
