"""Faults at every point of a window, on processes that communicate over gloo.

One launch runs many cells, because starting processes takes longer than a cell.
"""

import itertools
import logging
import warnings

import pytest

from faccel.testing import simulate
from tests.fault_cells import KINDS, Cell, Fault, agreement_s, failure_of, run, run_reference
from tests.ranks import run_ranks

# advice of torch on layouts
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TIMEOUT_S = 300
POINTS = ("loader", "before", "inside", "start", "middle", "optimizer")
CELLS = {
    "ddp": Cell("dp_replicate=2"),
    "fsdp": Cell("dp_shard=2"),
    "tp": Cell("tp=2"),
    "pp": Cell("pp=2"),
    "hsdp": Cell("dp_replicate=2,dp_shard=2"),
    "pp x dp_shard": Cell("pp=2,dp_shard=2"),
    "cp": Cell("cp=2", attention=True),
    "two compiled models": Cell("dp_replicate=2", compile="whole", adversary=True),
}


def run_cells(ctx, cell, schedules):
    """Run a list of schedules; return what this rank has seen."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    records = []
    for schedule in schedules:
        with cell.environment():
            records.append(run(ctx, cell, [Fault(*fault) for fault in schedule]))
    return records


def check(cell, schedules):
    """Run the schedules in one launch; compare with simulated loops written by hand."""
    by_rank = run_ranks(
        run_cells, cell.world_size, cell, schedules, mesh=cell.mesh, timeout_s=TIMEOUT_S
    )
    references = {}

    def reference_of(parts):
        if tuple(parts) not in references:
            with cell.environment():
                references[tuple(parts)] = simulate(
                    run_reference, cell.world_size, cell, parts, mesh=cell.mesh
                )
        return references[tuple(parts)]

    for schedule, records in zip(schedules, zip(*by_rank, strict=True), strict=True):
        faults = [Fault(*fault) for fault in schedule]
        assert failure_of(cell, records, faults, reference_of) is None, schedule
        assert agreement_s(records) < TIMEOUT_S / 10


def fault(rank, point, micro, kind):
    return rank, point, 1, micro, KINDS[kind]("planned")


@pytest.mark.parametrize("name", CELLS)
def test_all_ranks_do_the_same_after_a_fault_at_any_point(name):
    cell = CELLS[name]
    points = POINTS
    if cell.compile:  # each run compiles
        points = ("inside",)
    kinds = itertools.cycle(("oom", "data", "other"))
    schedules = []
    for index, point in enumerate(points):
        for kind in itertools.islice(kinds, 2):
            rank = (index + len(schedules)) % cell.world_size
            micro = (0, cell.size - 1)[index % 2]
            schedules.append([fault(rank, point, micro, kind)])
    check(cell, schedules)
