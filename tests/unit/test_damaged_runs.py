"""Run folders with files of any content: readers show the rest, or raise an error with a fix."""

import copy
import json
import shutil

import pytest

from faccel.checks import is_finite
from faccel.cli.watch_command import rendered
from faccel.errors import FaccelError
from faccel.observe.ask import ask
from faccel.report.comparison import compare
from faccel.report.live import LiveRun
from faccel.report.page import page
from faccel.report.run_folder import find_run
from faccel.report.run_record import read_record
from tests import run_folders
from tests.run_folders import BEGAN_S, event, minutes, start, write_journal, write_lines

ODD = (None, "\ud800", [], float("nan"), 10**400)
RATES = {"time": BEGAN_S + 9.0, "step": 3, "steps_s": 2.0, "peak_bytes": 5, "slowest_rank": 1}
FACTS = {
    "time_s": BEGAN_S,
    "command": ["train.py"],
    "versions": {"torch": "2"},
    "world_size": 2,
    "device": "cpu",
    "fields": {"seed": {"value": "0", "source": "default"}},
    "config": {"lr": 0.1},
}
WARNING = {"time": BEGAN_S, "level": "WARNING", "message": "slow", "step": 3}
LAUNCH = {"rank": 0, "reason": "signal 9", "time_s": BEGAN_S}
# A file, and the object of one of its lines.
FILES = {
    ".faccel/rank-00000.json": None,
    ".faccel/launch.json": LAUNCH,
    ".faccel/run.json": FACTS,
    "logs/rank0.jsonl": WARNING,
    "a/faccel.json": FACTS,
    "a/config.json": {"lr": {"low": 0.1}},
    "a/metrics.jsonl": {"step": 1, "time": BEGAN_S, "loss": 2.0},
    "a/goodput/rates.jsonl": RATES,
    "a/goodput/rank-00000.jsonl": start(),
}


def write_run(run_dir, name):
    """Write a run that has ended, and a file; curves only if it is theirs: drawing takes 50 ms."""
    run_folders.write_rank(run_dir, world_size=2, end=run_folders.ended())
    run_folders.write_rank(run_dir, 1, world_size=2, end=run_folders.ended())
    for rank in range(2):
        write_journal(run_dir / "a", rank, minutes())
    if FILES[name] is not None:
        write_lines(run_dir / name, [FILES[name], FILES[name]])


def variants(values):
    """Yield the object with each of its leaves replaced by each odd value, or left out."""
    for name, value in values.items():
        for odd in ODD:
            changed = copy.deepcopy(values)
            changed[name] = odd
            yield changed
        yield {key: item for key, item in values.items() if key != name}
        if isinstance(value, dict):
            yield from ({**values, name: inner} for inner in variants(value))


def read_all(run_dir, whole):
    """Read a run with each command; errors of faccel have a fix."""
    folders = find_run(str(run_dir), "faccel report")
    record = read_record(folders, now_s=BEGAN_S + 1e6)
    page(record).encode(errors="backslashreplace")
    for pair in ((record, whole), (whole, record)):
        compare(*pair).document()
    from rich.console import Console

    console = Console(width=80)
    with console.capture():
        console.print(rendered(LiveRun(str(run_dir)).frame(), console, max_rows=None))
    try:
        ask(str(run_dir), duration_s=0.0, interval_s=0.01)
    except FaccelError as error:
        assert error.fix


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_program_or_with_odd_values_is_no_problem(tmp_path, name):
    write_run(tmp_path, name)
    whole = read_record(find_run(str(tmp_path), "faccel report"))
    path = tmp_path / name
    first, *others = path.read_text().splitlines(keepends=True)
    if path.suffix == ".json":
        others = []
    for values in variants(json.loads(first)):
        path.write_text(json.dumps(values) + "\n" + "".join(others))
        read_all(tmp_path, whole)
    for text in ("", "[1]\n", "[" * 100_000, "\0", '{"step": 1', "3\n"):
        path.write_text(text)
        read_all(tmp_path, whole)
    path.write_bytes(b"\xff\xfe{}\n")
    read_all(tmp_path, whole)
    shutil.rmtree(tmp_path / ".faccel")
    read_all(tmp_path, whole)


def test_a_number_of_ranks_has_a_limit(tmp_path):
    run_folders.write_rank(tmp_path, world_size=2**62, end=run_folders.ended())
    write_lines(tmp_path / "a" / "metrics.jsonl", [{"step": 1, "loss": 1.0}])
    assert read_record(find_run(str(tmp_path), "faccel report")).ranks == []


def test_a_number_that_a_float_cannot_have_is_not_finite():
    assert not any(map(is_finite, (10**400, -(10**400), float("nan"), True, "1", None)))
    assert all(map(is_finite, (0, -1.5, 10**300, 5e-324)))


def test_a_clock_that_was_set_back_before_a_restart_takes_no_time_away(tmp_path):
    first = [start(), event("step", 100.0, num_steps=10, startup_s=20.0, useful_s=80.0)]
    # An hour back, and then 50 s of a second process.
    second = [start(-3500.0), event("end", -3450.0, num_steps=5, startup_s=10.0, useful_s=40.0)]
    write_journal(tmp_path / "a", 0, [*first, event("saved", 100.0, step=1, num_steps=10), *second])
    times = read_record(find_run(str(tmp_path), "faccel report")).times[0]
    assert times.down_s == 0.0
    assert times.wall_s == pytest.approx(150.0)
    spent_s = times.useful_s + times.startup_s + times.lost_s
    assert spent_s == pytest.approx(150.0)
