"""`skip_nonfinite`: all ranks skip together, for one number where gradients are sharded."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import faccel
from faccel.testing import simulate
from faccel.tree import local_tensor
from tests.cases.worlds import WORLDS, backward, build, values

REPLICATED = ("single", "ddp", "zero-1")
SHARDED = ("fsdp", "hsdp", "tp", "cp", "pp")


class HostReads(TorchDispatchMode):
    """Counts how often the host reads a number of a tensor, for which it waits for the device."""

    num_reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.num_reads += 1
        return func(*args, **(kwargs or {}))


def step(ctx, plan, bad_rank, options):
    """Return whether the update was skipped and changed nothing, and the number of host reads."""
    model, opt = build(ctx, plan, "momentum")
    scaler = backward(ctx, model, faccel.init_scaler(ctx), 0)
    if bad_rank == "replicas" or ctx.rank == bad_rank:
        # Of the gradients of this rank, and not of the rows that other ranks have.
        local_tensor(next(model.parameters()).grad).view(-1)[0] = math.nan
    before = values(model)
    with HostReads() as reads:
        info, _ = faccel.optimizer_step(opt, scaler, ctx, **options)
    after = values(model)
    is_unchanged = all(torch.equal(before[name], after[name]) for name in before)
    return info.skipped, is_unchanged, reads.num_reads


def run(name, bad_rank=None, **options):
    where = WORLDS[name]
    results = simulate(step, where.size, where.plan, bad_rank, options, mesh=where.mesh)
    events = [(event.rank, event.op, event.num_bytes) for event in results.trace]
    return results, sorted(events)


@pytest.mark.parametrize("name", [*REPLICATED, *SHARDED])
def test_it_costs_one_host_read_and_one_number_where_gradients_are_sharded(name):
    results, events = run(name, clip_norm=1.0)
    skipping, events_skipping = run(name, clip_norm=1.0, skip_nonfinite=True)
    assert [reads for *_, reads in skipping] == [reads + 1 for *_, reads in results]
    for event in events:
        events_skipping.remove(event)
    flags = []
    if name in SHARDED:
        flags = [(rank, "all_reduce", 4) for rank in range(WORLDS[name].size)]
    assert events_skipping == flags


@pytest.mark.parametrize("name", [*REPLICATED, *SHARDED])
def test_a_nan_on_one_rank_skips_the_update_on_all(name):
    bad_rank = "replicas"  # have equal gradients
    if name in SHARDED:
        bad_rank = WORLDS[name].size - 1
    results, _ = run(name, bad_rank, skip_nonfinite=True, clip_norm=1.0)
    assert all(skipped and is_unchanged for skipped, is_unchanged, _ in results)
    results, _ = run(name, bad_rank, clip_norm=1.0)
    assert not any(skipped or is_unchanged for skipped, is_unchanged, _ in results)


def test_unscaled_gradients_of_fp16_are_read_once_too():
    def fn(ctx):
        model = faccel.wrap(torch.nn.Linear(2, 1), ctx)
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
        loss = model(torch.ones(1, 2)).sum()
        scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx, scale=8.0), ctx)
        scaler = faccel.unscale(opt, scaler, ctx)
        with HostReads() as reads:
            info, _ = faccel.optimizer_step(opt, scaler, ctx, skip_nonfinite=True)
        return info.skipped, reads.num_reads

    assert simulate(fn, 1, config={"mixed_precision": "fp16"}) == ((False, 1),)
