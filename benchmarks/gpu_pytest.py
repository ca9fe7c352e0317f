"""A plugin of pytest that writes each test as a row of `benchmarks/gpu.py`."""

import os

import pytest
from gpu_lines import write


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Select the tests that `--only` names, and write the names of all that will run."""
    pattern = os.environ.get("FACCEL_GPU_ONLY", "")
    items[:] = [item for item in items if pattern in item.nodeid]
    write(names=[item.nodeid for item in items])


def pytest_runtest_logstart(nodeid):
    write(start=nodeid)


def pytest_runtest_logreport(report):
    """Write the outcome of the test, or of what failed before or after it."""
    if report.passed and report.when != "call":
        if report.when == "teardown":
            write(end=report.nodeid)
        return
    row = {"name": report.nodeid, "value": round(report.duration, 3)}
    if report.skipped:
        # (file, line, "Skipped: reason")
        row |= {"value": None, "skipped": report.longrepr[2].removeprefix("Skipped: ")}
    elif report.failed:
        lines = str(report.longrepr).strip().splitlines()
        row["error"] = " | ".join(line.strip() for line in lines[-6:])[:800]
        print(f"\n{report.longrepr}")
    write(row=row)
    if report.when == "teardown":
        write(end=report.nodeid)


def pytest_collectreport(report):
    """Write a file that cannot be imported as a failed row."""
    if report.failed:
        write(row={"name": report.nodeid, "value": None, "error": str(report.longrepr)[-500:]})
