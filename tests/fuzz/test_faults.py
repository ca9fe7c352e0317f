"""Random faults in training: all ranks do the same, with the values of a loop by hand, or raise."""

import pytest

from faccel.testing import simulate
from tests.fault_cells import KINDS, NUM_WINDOWS, SIZE, Cell, Fault, failure_of, run, run_reference
from tests.fuzz.runs import Report, cases
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # advice of torch on layouts
MESHES = (
    *("dp_replicate=2", "dp_replicate=3", "dp_shard=2", "tp=2", "pp=2", "pp=3"),
    *("dp_replicate=2,dp_shard=2", "pp=2,dp_shard=2", "dp_replicate=2,tp=2"),
)
POINTS = ("loader", "before", "enter", "inside", "after", "start", "middle", "end", "optimizer")
REPORTED = 300  # characters of a failure


def draw_schedule(draw, cell):
    """Return the faults of up to all ranks: rank, point, window, micro-batch, error, times."""
    ranks = draw.sample(range(cell.world_size), draw.randrange(cell.world_size + 1))
    return [
        (
            rank,
            draw.choice(POINTS),
            draw.randrange(NUM_WINDOWS),
            draw.randrange(SIZE),
            draw.choice(list(KINDS.values()))("planned"),
            draw.choice([1, 1, 2, 5]),
        )
        for rank in ranks
    ]


def draw_cell(draw, meshes=MESHES):
    mesh = draw.choice(meshes)
    options = {"weight": draw.random() < 0.3, "has_aux": draw.random() < 0.3}
    if mesh == "pp=2":
        options["schedule"] = draw.choice(["1f1b", "gpipe", "interleaved"])
    if mesh == "dp_replicate=2":
        options["zero1"] = draw.random() < 0.5
    return Cell(mesh, **options)


class References:
    """The loops written by hand, each run once."""

    def __init__(self, cell):
        self.cell, self.entries = cell, {}

    def __call__(self, parts):
        key = tuple(parts)
        if key not in self.entries:
            self.entries[key] = simulate(
                run_reference, self.cell.world_size, self.cell, parts, mesh=self.cell.mesh
            )
        return self.entries[key]


def check(report, label, cell, schedule, records, reference_of):
    action = "raised"
    if not records[0].error:
        action = "continued"
    report.count(action)
    faults = [Fault(*fault) for fault in schedule]
    problem = failure_of(cell, records, faults, reference_of)
    if problem is not None:
        report.fail(label, f"{cell} {schedule}: {problem[:REPORTED]}")


def test_random_faults_in_a_simulation():
    report = Report("simulated faults")
    references = {}
    for label, draw in cases("faults", 3):
        cell = draw_cell(draw)
        schedule = draw_schedule(draw, cell)
        faults = [Fault(*fault) for fault in schedule]
        try:
            records = simulate(run, cell.world_size, cell, faults, mesh=cell.mesh)
        except Exception as error:
            report.fail(label, f"{cell} {schedule}", error)
            continue
        reference_of = references.setdefault(cell, References(cell))
        check(report, label, cell, schedule, records, reference_of)
    report.finish()


def run_schedules(ctx, cell, schedules):
    return [run(ctx, cell, [Fault(*fault) for fault in schedule]) for schedule in schedules]


@pytest.mark.slow
def test_random_faults_in_processes():
    report = Report("gloo faults")
    for label, draw in cases("gloo_faults", 2):
        cell = draw_cell(draw, meshes=MESHES[:5])
        schedules = [draw_schedule(draw, cell) for _ in range(8)]
        by_rank = run_ranks(
            run_schedules, cell.world_size, cell, schedules, mesh=cell.mesh, timeout_s=100
        )
        reference_of = References(cell)
        for schedule, records in zip(schedules, zip(*by_rank, strict=True), strict=True):
            check(report, label, cell, schedule, records, reference_of)
    report.finish()
