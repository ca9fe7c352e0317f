"""When the launcher reports a hang: on snapshots of ranks, and in a launch of two ranks."""

import json

import pytest

from faccel.launching.hang_report import SilentInterval
from faccel.launching.spec import LaunchSpec
from faccel.observe.snapshot import SILENT, Moment, Snapshot
from tests.command_line import Command


def rank_at(rank, number, step=0, status="answered"):
    return Snapshot(rank, status, step=step, moments=[Moment(0.0, (), {"world": number})])


def looks(*numbers, period_s=1.0, interval_s=3.0):
    """Return at which looks a report is due, for the numbers of the collectives of two ranks."""
    silence = SilentInterval(interval_s)
    due = []
    for index, pair in enumerate(numbers):
        snapshots = [rank_at(rank, number) for rank, number in enumerate(pair)]
        if silence.is_due(snapshots, 100 + index * period_s):
            due.append(index)
    return due


CASES = {
    "moves": ([(n, n) for n in range(9)], []),
    "one rank moves": ([(5, n) for n in range(9)], []),
    "hangs": ([(1, 1), (2, 2), *[(3, 2)] * 6], [5]),
    "hangs twice": ([(1, 1), (2, 2), *[(3, 2)] * 6, *[(4, 4)] * 6], [5, 11]),
    "has not begun": ([(0, 0)] * 9, []),
}


@pytest.mark.parametrize("name", CASES)
def test_a_report_is_due_once_per_silent_interval(name):
    numbers, expected = CASES[name]
    assert looks(*numbers) == expected


def test_steps_count_as_well_as_collectives():
    silence = SilentInterval(3.0)
    due = [silence.is_due([rank_at(0, 0, step=min(t, 4))], float(t)) for t in range(9)]
    assert due == [False] * 7 + [True, False]


def test_a_rank_that_does_not_answer_neither_moves_nor_hides_the_silence():
    silence = SilentInterval(3.0)
    for time_s in range(3):
        assert not silence.is_due([rank_at(0, 7)], float(time_s))
    assert silence.is_due([rank_at(0, 7), rank_at(1, 9, status=SILENT)], 3.0)


def test_looks_are_rare_until_a_report_is_near():
    silence = SilentInterval(300.0)
    assert silence.next_look_s(0.0) == 30
    silence.is_due([rank_at(0, 1)], 1000.0)
    assert silence.next_look_s(1000.0) == 30
    assert silence.next_look_s(1290.0) == 10
    assert silence.next_look_s(1299.9) == 0.5


SCRIPT = """
import pathlib, time, faccel, torch
ctx = faccel.init()
why = pathlib.Path(ctx.config.run_dir, ".faccel", "why.json")
for step in range(3):
    faccel.reduce(torch.ones(1), ctx)
    while step == 1 and ctx.rank == 1 and not why.exists():
        time.sleep(0.05)
"""


@pytest.mark.slow
def test_a_launch_reports_a_hang_once_and_continues(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    run_dir = tmp_path / "run"
    options = ("--cpu", "--nproc", "2", "--run-dir", str(run_dir), "--hang-report", "1")
    code, _, error = Command("launch", *options, str(tmp_path / "train.py")).wait()
    assert code == 0, error
    assert error.count("no rank has begun a collective or a step for 1 s") == 1
    document = json.loads((run_dir / ".faccel" / "why.json").read_text())
    assert (document["kind"], document["ranks"], document["phase"]) == ("hung", [1], "script")
    assert document["sentence"].startswith("rank 1 waits in the script")
    assert document["sentence"] in (run_dir / ".faccel" / "why.txt").read_text()


def test_the_interval_must_not_be_negative():
    with pytest.raises(ValueError, match="`hang_report_s`"):
        LaunchSpec(command=("train.py",), hang_report_s=-1)
