"""A window without a failure has the collectives of the loop written by hand, and no others."""

from collections import Counter

import pytest
import torch

import faccel
from faccel.testing import simulate
from tests.fault_cells import POLICY, Cell, Player, forward_by_hand, loss_of, setup, windows_of

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of torch on layouts


def window_by_hand(ctx, cell, _):
    model, opt = setup(ctx, cell, None)
    scaler = faccel.init_scaler(ctx)
    for window in windows_of(ctx, cell):
        _, scaler = forward_by_hand(cell, Player(model, opt), window, scaler, ctx, 1)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)


def window_of_faccel(ctx, cell, policy):
    model, opt = setup(ctx, cell, None)
    scaler = faccel.init_scaler(ctx)
    for window in windows_of(ctx, cell):
        loss_fn = loss_of(cell, None)
        _, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx, **policy)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)


def collectives(fn, cell, policy=None):
    """Return the collectives of each rank, in their order."""
    trace = simulate(fn, cell.world_size, cell, policy, mesh=cell.mesh).trace
    return [
        [(event.op, event.axis, event.num_bytes) for event in trace if event.rank == rank]
        for rank in range(cell.world_size)
    ]


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2", "dp_replicate=2,dp_shard=2"])
@pytest.mark.parametrize("policy", [{}, POLICY])
def test_the_collectives_are_those_of_the_loop_written_by_hand(mesh, policy):
    cell = Cell(mesh, weight=True)
    assert collectives(window_of_faccel, cell, policy) == collectives(window_by_hand, cell)


@pytest.mark.parametrize("mesh", ["pp=2", "pp=2,dp_shard=2"])
def test_a_policy_adds_no_collective_to_a_pipeline(mesh):
    cell = Cell(mesh)
    assert collectives(window_of_faccel, cell, POLICY) == collectives(window_of_faccel, cell, {})


def test_a_policy_adds_one_barrier_per_window_to_tensor_parallelism():
    cell = Cell("tp=2")
    by_hand = collectives(window_by_hand, cell)
    assert collectives(window_of_faccel, cell, {}) == by_hand
    for rank, calls in enumerate(collectives(window_of_faccel, cell, POLICY)):
        added = Counter(calls) - Counter(by_hand[rank])
        assert {(op, axis): number for (op, axis, _), number in added.items()} == {
            ("barrier", "tp"): 3
        }


class ReadByHost(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the operations for which the host waits for the device."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.ops.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [{}, POLICY])
def test_the_host_reads_no_value_of_the_device(policy):
    cell = Cell("dp_replicate=1", weight=True)

    def fn(ctx):
        model, _ = setup(ctx, cell, None)
        window = next(windows_of(ctx, cell))
        scaler = faccel.init_scaler(ctx)
        with ReadByHost() as read:
            faccel.forward_backward(loss_of(cell, None), model, window, scaler, ctx, **policy)
        return read.ops

    assert simulate(fn, 1) == ([],)
