"""A worker of `benchmarks/gpu.py` that aborts, hangs or is too late costs one row."""

import os
import sys
import time

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
    if name == "hang": time.sleep(600)
    if name == "exit": sys.exit(3)
    if name == "fail": write(error="it failed")
    elif name == "skip": write(skipped="no device")
    elif name != "silent": write(row={{"name": name, "value": 1}})
    write(end=name)
"""


def run(names, minutes_left=1.0, stall_s=60.0, code=WORKER):
    outcome = Outcome()
    deadline = time.monotonic() + 60 * minutes_left

    def command_of(names):
        return [sys.executable, "-c", code, *names]

    env = dict(os.environ)
    run_all(names, lambda name: [name], command_of, env, deadline, outcome, stall_s)
    return outcome.rows


def test_rows_are_measured_in_order():
    assert run(["a", "b"]) == {"a": {"name": "a", "value": 1}, "b": {"name": "b", "value": 1}}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("abort", "exit code -6"),
        ("exit", "exit code 3"),
        ("hang", "no result in 0.5 s"),
        ("fail", "it failed"),
        ("silent", "it has written no row"),
    ],
)
def test_a_failure_costs_one_row(name, message):
    result = run(["a", name, "b"], stall_s=0.5)
    assert message in result[name]["error"]
    assert result["a"]["value"] == result["b"]["value"] == 1
    assert list(result) == ["a", name, "b"]


def test_a_row_that_needs_another_device_is_skipped():
    assert run(["skip", "a"])["skip"] == {"name": "skip", "skipped": "no device"}


def test_names_that_only_the_worker_can_list_are_continued_after_an_abort():
    result = run(["unknown"])
    assert result["a"]["value"] == result["b"]["value"] == 1
    assert "exit code -6" in result["abort"]["error"]


def test_a_worker_that_cannot_start_fails_all_rows():
    rows = run(["a", "b"], code="raise ImportError('no module')")
    assert list(rows) == ["a", "b"]
    assert all("no module" in row["error"] for row in rows.values())


def test_rows_after_the_time_limit_are_skipped_with_the_reason():
    result = run(["a", "hang", "b"], minutes_left=1 / 60)
    assert result["a"]["value"] == 1
    assert result["hang"]["skipped"] == result["b"]["skipped"] == TOO_LATE
    assert run(["a"], minutes_left=0)["a"] == {"name": "a", "skipped": TOO_LATE}
