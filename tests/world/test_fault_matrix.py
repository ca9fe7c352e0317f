"""Ranks fail at every point of a window, on every layout: all of them do the same afterwards.

If they run the window again, losses, gradients, parameters and buffers are bit for bit those of a
loop that had the smaller micro-batches from the start.
"""

import functools

import pytest
import torch
from torch.utils.data import DataLoader

import faccel
from faccel.errors import RankFailedError
from faccel.testing import simulate
from tests.fault_cells import KINDS, Cell, Fault, failure_of, run, run_reference

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # advice of torch on layouts
POINTS = ("loader", "before", "enter", "inside", "after", "start", "middle", "end")
CELLS = {
    "ddp": Cell("dp_replicate=2"),
    "fsdp": Cell("dp_shard=2"),
    "hsdp": Cell("dp_replicate=2,dp_shard=2"),
    "tp": Cell("tp=2"),
    "zero1": Cell("dp_replicate=2", zero1=True),
    "1f1b": Cell("pp=2"),
    "gpipe": Cell("pp=2", schedule="gpipe"),
    "interleaved": Cell("pp=2", schedule="interleaved"),
    "zero bubble": Cell("pp=2", schedule="interleaved-zero-bubble"),
    "zbv": Cell("pp=2", schedule="zbv"),
    "dualpipev": Cell("pp=2", schedule="dualpipev"),
    "pp x dp_shard": Cell("pp=2,dp_shard=2"),
    "pp x dp_replicate": Cell("pp=2,dp_replicate=2"),
    "tp x dp_shard": Cell("dp_shard=2,tp=2"),
    "experts": Cell("dp_shard=2,ep=2", experts=True),
    "batch norm": Cell("dp_replicate=2", norm=True),
    "checkpointing": Cell("dp_shard=2", checkpoint=True),
    "weight": Cell("dp_replicate=2", weight=True),
    "weight, pp": Cell("pp=2", weight=True),
    "aux": Cell("dp_shard=2", has_aux=True),
    "aux, pp": Cell("pp=2", has_aux=True),
    "one micro-batch": Cell("dp_shard=2", size=1),
    "short window": Cell("dp_replicate=2", short=True, weight=True),
    "cp": Cell("cp=2", attention=True, weight=True),
    "two models": Cell("dp_replicate=2", adversary=True),
    "two sharded models": Cell("dp_shard=2", adversary=True, weight=True),
    "fp16": Cell("dp_replicate=2", precision="fp16", dtype=torch.float32),
    "bf16": Cell("dp_shard=2", precision="bf16", dtype=torch.float32),
}
# Few, because each run compiles.
COMPILED = {
    "one process": Cell("dp_replicate=1", compile="whole"),
    "ddp": Cell("dp_replicate=2", compile="whole"),
    "fsdp": Cell("dp_shard=2", compile="units"),
    "pp": Cell("pp=2", compile="units"),
    "two models": Cell("dp_replicate=2", compile="whole", adversary=True),
}


@functools.cache
def reference_of(cell, parts):
    with cell.environment():
        return simulate(
            run_reference, cell.world_size, cell, parts, mesh=cell.mesh, config=cell.config()
        )


def check(cell, faults, *, action=None):
    """Run a cell, and compare it with its reference; `action` is what all ranks must have done."""
    faults = [Fault(*fault) for fault in faults]
    with cell.environment():
        records = simulate(run, cell.world_size, cell, faults, mesh=cell.mesh, config=cell.config())

    def reference(parts):
        return reference_of(cell, tuple(parts))

    problem = failure_of(cell, records, faults, reference)
    assert problem is None, (cell, faults, problem)
    if not sum(record.num_raised for record in records):
        return False  # a stage of a pipeline does not have this point
    if action == "raise":
        assert all(record.error for record in records)
    elif action == "skip":
        assert any(entry.is_skipped for entry in records[0].entries)
    elif action == "retry":
        assert records[0].error is None and records[0].entries[-1].max_rows is not None
    return True


def fault(rank, point, micro, kind="oom", num_times=1):
    return rank, point, 1, micro, KINDS[kind]("planned"), num_times


FAST = [
    ("ddp", 1, "loader", 0),
    ("weight", 0, "loader", 3),
    ("fsdp", 0, "inside", 1),
    ("tp", 1, "middle", 3),
    ("pp x dp_shard", 0, "before", 0),
    ("pp x dp_shard", 3, "start", 3),
    ("interleaved", 1, "middle", 1),
]


@pytest.mark.parametrize(("name", "rank", "point", "micro"), FAST)
def test_a_window_runs_again_as_if_it_had_the_smaller_size_from_the_start(name, rank, point, micro):
    assert check(CELLS[name], [fault(rank, point, micro)], action="retry")


@pytest.mark.slow
@pytest.mark.parametrize("name", CELLS)
def test_every_point_of_a_window(name):
    cell = CELLS[name]
    num_reached = 0
    for index, point in enumerate(POINTS):
        micro = (0, cell.size // 2, cell.size - 1)[(index + len(name)) % 3]
        is_late = point == "end" and micro == cell.size - 1
        # After the last gradient was reduced another rank may have ended its backward.
        action = None if is_late else "retry"
        ranks = {0, cell.world_size - 1}
        num_reached += any([check(cell, [fault(r, point, micro)], action=action) for r in ranks])
    assert num_reached == len(POINTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_models_run_a_window_again(name):
    cell = COMPILED[name]
    rank = cell.world_size - 1
    for point, micro in (("loader", 0), ("inside", 1), ("middle", cell.size - 1)):
        assert check(cell, [fault(rank, point, micro)], action="retry")


@pytest.mark.parametrize("name", ["ddp", "fsdp", "1f1b"])
@pytest.mark.parametrize(("kind", "action"), [("data", "skip"), ("other", "raise")])
def test_ranks_that_fail_differently_do_the_same(name, kind, action):
    assert check(CELLS[name], [fault(0, "before", 0), fault(1, "loader", 0, kind)], action=action)


@pytest.mark.parametrize("name", ["ddp", "1f1b"])
def test_a_failure_in_the_retry_halves_again_until_it_cannot(name):
    cell = CELLS[name]
    twice = fault(0, "before", 0, "named", 2)
    assert check(cell, [twice], action="retry")
    assert check(cell, [fault(0, "before", 0, "named", 9)], action="raise")


@pytest.mark.parametrize("name", ["ddp", "tp", "zero1", "two models", "cp"])
def test_an_optimizer_that_fails_on_one_rank_ends_all(name):
    assert check(CELLS[name], [fault(1, "optimizer", 0)], action="raise")


@pytest.mark.parametrize("name", ["ddp", "weight"])
def test_ranks_that_stopped_in_different_windows_agree_again(name):
    # The optimizer of rank 0 fails, while rank 1 has begun its next window.
    cell = CELLS[name]

    def two_runs(ctx):
        first = run(ctx, cell, [Fault(*fault(0, "optimizer", 0))])
        assert first.error is not None
        return run(ctx, cell, [Fault(*fault(1, "before", 0))])

    records = simulate(two_runs, cell.world_size, mesh=cell.mesh)
    assert [record.error for record in records] == [None, None]
    assert [entry.max_rows for entry in records[0].entries] == [None, 2, 2]


def test_a_weight_that_fails_on_one_rank_is_named_on_the_others():
    def fn(ctx):
        def weight(batch):
            if ctx.rank == 1:
                raise KeyError("no mask")
            return batch.num_valid

        loader = faccel.shard(DataLoader(torch.ones(8, 2), 2), ctx)
        with pytest.raises(KeyError if ctx.rank == 1 else RankFailedError, match="no mask"):
            next(faccel.windows(loader, ctx, size=2, weight=weight))
        return faccel.reduce(torch.ones(()), ctx, op="sum").item()

    assert simulate(fn, 2, mesh="dp_replicate=2") == (2, 2)


def test_a_stage_that_fails_while_its_shapes_are_found_keeps_its_dropout():
    cell = CELLS["1f1b"]
    # The first window of a shape runs each stage once in evaluation mode.
    assert check(cell, [(1, "inside", 0, 0, KINDS["oom"]("planned"))], action="retry")
