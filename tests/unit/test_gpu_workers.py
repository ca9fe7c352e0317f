"""A worker of `benchmarks/gpu.py` that aborts, hangs or is too late costs one row."""

import os
import sys

import pytest

from benchmarks.gpu_workers import LINES, TOO_LATE, Outcome, run_all

# Writes a row for each name, but does what the name states first.
WORKER = f"""
import json, os, sys, time
def write(**line):
    with open(os.environ["{LINES}"], "a") as file: file.write(json.dumps(line) + "\\n")
names = sys.argv[1:]
if names == ["unknown"]:
    names = ["a", "abort", "b"]
    write(names=names)
for name in names:
    write(start=name)
    if name == "abort": os.abort()
    if name == "hang":
        open(os.environ["HANGS"], "w").close()
        time.sleep(600)
    if name == "exit": sys.exit(3)
    if name == "fail": write(error="it failed")
    elif name == "skip": write(skipped="no device")
    elif name != "silent": write(row={{"name": name, "value": 1}})
    write(end=name)
"""


class Clock:
    """Time stands still until a worker hangs, so that a slow start is not taken for one."""

    def __init__(self, path):
        self.path, self.now_s, self.num_jumps = path, 0.0, 0

    def __call__(self):
        if self.path.exists():
            self.path.unlink()
            # The first call after a new line of the worker counts as its last sign of life.
            self.num_jumps = 2
        if self.num_jumps:
            self.num_jumps -= 1
            self.now_s += 100.0
        return self.now_s


@pytest.fixture
def run(tmp_path):
    def run_names(names, limit_s=1e6, stall_s=1e6, code=WORKER):
        outcome = Outcome()
        clock = Clock(tmp_path / "hangs")

        def command_of(names):
            return [sys.executable, "-c", code, *names]

        env = os.environ | {"HANGS": str(clock.path)}
        run_all(names, lambda name: [name], command_of, env, limit_s, outcome, stall_s, clock)
        return outcome.rows

    return run_names


def test_rows_are_measured_in_order(run):
    assert run(["a", "b"]) == {"a": {"name": "a", "value": 1}, "b": {"name": "b", "value": 1}}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("abort", "exit code -6"),
        ("exit", "exit code 3"),
        ("hang", "no result in 60 s"),
        ("fail", "it failed"),
        ("silent", "it has written no row"),
    ],
)
def test_a_failure_costs_one_row(run, name, message):
    result = run(["a", name, "b"], stall_s=60)
    assert message in result[name]["error"]
    assert result["a"]["value"] == result["b"]["value"] == 1
    assert list(result) == ["a", name, "b"]


def test_a_row_that_needs_another_device_is_skipped(run):
    assert run(["skip", "a"])["skip"] == {"name": "skip", "skipped": "no device"}


def test_names_that_only_the_worker_can_list_are_continued_after_an_abort(run):
    result = run(["unknown"])
    assert result["a"]["value"] == result["b"]["value"] == 1
    assert "exit code -6" in result["abort"]["error"]


def test_a_worker_that_cannot_start_fails_all_rows(run):
    rows = run(["a", "b"], code="raise ImportError('no module')")
    assert list(rows) == ["a", "b"]
    assert all("no module" in row["error"] for row in rows.values())


def test_rows_after_the_time_limit_are_skipped_with_the_reason(run):
    result = run(["a", "hang", "b"], limit_s=60)
    assert result["a"]["value"] == 1
    assert result["hang"]["skipped"] == result["b"]["skipped"] == TOO_LATE
    assert run(["a"], limit_s=-1)["a"] == {"name": "a", "skipped": TOO_LATE}
