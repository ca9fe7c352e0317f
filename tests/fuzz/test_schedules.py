"""Random programs of collectives: the right values, or an error of faccel, and never a hang."""

import time

import pytest

from faccel.errors import FaccelError
from faccel.testing import simulate
from tests.fuzz import schedules
from tests.fuzz.runs import Report, cases
from tests.fuzz.schedules import PlannedError, draw_program, world_size_of
from tests.ranks import outcomes

LIMIT_S = 120  # of one program of real processes: a hang, also on a loaded node
TIMEOUT_S = 4


def run_simulated(ctx, program, values):
    schedules.run(ctx, *program, values[ctx.rank])


def test_a_simulated_program_has_the_right_values_or_raises():
    report = Report("simulated schedules")
    for label, draw in cases("schedules", 40):
        program = mesh, calls, fault = draw_program(draw)
        values = [[] for _ in range(world_size_of(mesh))]
        error = None
        try:
            simulate(run_simulated, world_size_of(mesh), program, values, mesh=mesh, timeout_s=20)
        except (FaccelError, PlannedError) as caught:
            error = caught
        except BaseException as caught:
            report.fail(label, f"{program}", caught)
        report.count("right" if error is None else type(error).__name__)
        if error is not None and fault is None:
            report.fail(label, f"an error without a fault: {program}", error)
        wrong = schedules.wrong_values(mesh, calls, fault, values, is_complete=error is None)
        if wrong:
            report.fail(label, f"{program}: {wrong}")
    report.finish()


def run_program(ctx, program):
    """Run a program on a rank of a real world; return its values, also for a rank that left."""
    values = []
    schedules.run(ctx, *program, values)
    return values


def check_outcomes(report, label, program, results):
    mesh, calls, fault = program
    is_complete = all(succeeded for succeeded, _ in results)
    report.count("right" if is_complete else "raised")
    values = [value if succeeded else [] for succeeded, value in results]
    for rank, (succeeded, value) in enumerate(results):
        if succeeded:
            continue
        if fault is None:
            report.fail(label, f"an error without a fault on rank {rank}: {program}", value)
        is_planned = isinstance(value, PlannedError) and rank == fault[1]
        if not (isinstance(value, FaccelError) or is_planned):
            report.fail(label, f"another error on rank {rank}: {program}", value)
    wrong = schedules.wrong_values(mesh, calls, fault, values, is_complete=is_complete)
    if wrong:
        report.fail(label, f"{program}: {wrong}")


@pytest.mark.slow
@pytest.mark.parametrize("debug", [False, True])
def test_a_program_of_real_processes_has_the_right_values_or_raises(debug):
    report = Report(f"gloo schedules, debug={debug}")
    # Without debug mode a call with another source or shape may only fail later.
    faults = schedules.FAULTS if debug else ("raises", "leaves", "leaves out")
    for label, draw in cases("gloo_schedules", 3):
        program = draw_program(draw, meshes=schedules.MESHES[:7], length=6, faults=faults)
        start_s = time.monotonic()
        results = outcomes(
            run_program,
            world_size_of(program[0]),
            program,
            mesh=program[0],
            device="cpu",
            debug=debug,
            timeout_s=TIMEOUT_S,
        )
        seconds = time.monotonic() - start_s
        check_outcomes(report, label, program, results)
        if seconds > LIMIT_S:
            report.fail(label, f"{seconds:.0f} s: {program}")
    report.finish()
