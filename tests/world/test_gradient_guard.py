"""Debug mode: a gradient that is not finite raises where it was computed, before the reduction."""

import contextlib
import math
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import DesyncError, FaccelError, ModelError, RankFailedError
from faccel.testing import simulate
from tests.cases.worlds import WORLDS, Net, full, rows
from tests.ranks import outcomes


class Poisoned(torch.autograd.Function):
    """The identity, with a gradient that has `value` in its first element."""

    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[0, 0] = ctx.value
        return grad, None


class PoisonedLayer(nn.Linear):
    """A layer whose parameters get a gradient that is not finite in one micro-batch."""

    value = None
    bad_call = -1
    num_calls = 0

    def forward(self, x):
        x = super().forward(x)
        if torch.is_grad_enabled():
            self.num_calls += 1
            if self.num_calls - 1 == self.bad_call:
                return Poisoned.apply(x, self.value)
        return x


def loss_of(model, batch):
    return model(batch.data).square().mean()


def train(ctx, plan, rank, value, bad_call):
    """Run one window of two micro-batches; return the gradients of this rank."""
    net = Net().double()
    poisoned = PoisonedLayer(4, 4).double()
    poisoned.load_state_dict(net.first.state_dict())
    net.first = poisoned
    if ctx.rank == rank:
        poisoned.value, poisoned.bad_call = value, bad_call
    model = faccel.wrap(net, ctx, plan=plan)
    params = list(model.parameters())
    loader = faccel.shard(DataLoader(rows(), 8 // ctx.data_world_size, drop_last=True), ctx)
    window = next(faccel.windows(loader, ctx, size=2))
    try:
        faccel.forward_backward(loss_of, model, window, faccel.init_scaler(ctx), ctx)
    finally:  # the hooks are removed after every backward
        assert not any(param._backward_hooks for param in params)
    return [full(param.grad) for param in params]


def outcomes_by_rank(where, *args, **config):
    """Return what each rank returned or raised; a failed rank ends, as a process does."""
    results = {}

    def body(ctx):
        try:
            results[ctx.rank] = train(ctx, where.plan, *args)
        except FaccelError as error:
            results[ctx.rank] = error
            raise

    with contextlib.suppress(FaccelError):
        simulate(body, where.size, mesh=where.mesh, config=config)
    return results


LAYOUTS = ["single", "ddp-3", "zero-1", "fsdp", "hsdp", "tp", "fsdp-tp", "cp", "pp", "pp-fsdp"]
LAST = [(name, 1) for name in LAYOUTS]


# The first micro-batch accumulates without a reduction.
@pytest.mark.parametrize(("name", "bad_call"), [*LAST, ("ddp", 0), ("fsdp", 0), ("pp", 0)])
def test_the_error_names_rank_parameter_and_line_on_every_layout(name, bad_call):
    where = WORLDS[name]
    # The layer is in the first stage of a pipeline.
    rank = 0 if "pp" in name else where.size - 1
    results = outcomes_by_rank(where, rank, math.inf, bad_call, debug=True)
    error = results.pop(rank)
    assert isinstance(error, ModelError)
    assert re.fullmatch(
        rf"the gradient of `first\.\w+` is not finite on rank {rank}", error.problem
    )
    assert "test_gradient_guard.py:" in error.got
    # The other ranks of a data-parallel group wait for it: they raise instead of computing on.
    if "tp" not in name:
        for other in results.values():
            assert isinstance(other, (RankFailedError, DesyncError))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_error_counts_elements(value):
    error = outcomes_by_rank(WORLDS["single"], 0, value, 0, debug=True)[0]
    # One element of the bias, or one row of the weight.
    assert "in 1 of 4 elements" in error.got or "in 4 of 16 elements" in error.got


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp", "pp"])
def test_finite_gradients_are_those_without_debug_mode(name):
    where = WORLDS[name]
    plain = outcomes_by_rank(where, None, None, -1)
    checked = outcomes_by_rank(where, None, None, -1, debug=True)
    assert plain.keys() == checked.keys() == set(range(where.size))
    for rank, grads in plain.items():
        assert all(map(torch.equal, grads, checked[rank]))


def test_without_debug_mode_nothing_is_checked():
    results = outcomes_by_rank(WORLDS["ddp"], 1, math.nan, 0)
    for grads in results.values():
        assert not all(grad.isfinite().all() for grad in grads)


def test_an_overflow_in_fp16_is_skipped_and_no_error():
    def fn(ctx):
        model = faccel.wrap(nn.Linear(2, 1), ctx)
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
        loss = model(torch.full((1, 2), 60000.0)).sum()
        scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        info, _ = faccel.optimizer_step(opt, scaler, ctx)
        return info.skipped

    assert simulate(fn, 2, config={"debug": True, "mixed_precision": "fp16"}) == (True, True)


@pytest.mark.filterwarnings("ignore:Using backward")  # torch's advice on create_graph
def test_sparse_gradients_and_gradients_of_gradients_are_checked():
    def fn(ctx):
        model = faccel.wrap(nn.Embedding(3, 2, sparse=True), ctx)
        loss = model(torch.tensor([1])).sum()
        with pytest.raises(ModelError, match="`weight` is not finite"):
            faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx, scale=math.nan)
        other = faccel.wrap(nn.Linear(2, 1), ctx)
        loss = other(torch.ones(1, 2)).square().sum()
        faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx, create_graph=True)
        assert other.weight.grad.requires_grad

    simulate(fn, 1, config={"debug": True})


def real(ctx):
    return train(ctx, WORLDS["ddp"].plan, 1, math.nan, 1)


@pytest.mark.slow
def test_real_ranks_raise_and_none_hangs():
    (_, first), (_, second) = outcomes(real, 2, mesh="dp_replicate=2", debug=True)
    assert isinstance(first, (RankFailedError, DesyncError))
    assert isinstance(second, ModelError)
    assert "on rank 1" in second.problem
