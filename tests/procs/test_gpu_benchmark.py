"""`benchmarks/gpu.py --cpu` prints and writes every row that a GPU would fill."""

import json
import os
import re
import subprocess
import sys

import pytest

from benchmarks.gpu_table import MEASUREMENTS
from tests.docs.pages import ROOT

ROWS = [row for rows in MEASUREMENTS.values() for row in rows]


def gpu(*options, **variables):
    command = [sys.executable, "benchmarks/gpu.py", *options]
    env = os.environ | variables
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_row_is_printed_and_written(tmp_path):
    result = gpu("--cpu", "--quick", "--out", str(tmp_path / "gpu.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["hardware"]["device"] == "CPU" and "torch" in record["versions"]
    written = {row["name"]: row for row in record["rows"]}
    tests = set()
    for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        functions = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        tests.update(f"{path.name}::{function}" for function in functions)
    assert {name.rpartition("/")[2].partition("[")[0] for name in written} == (
        tests | {row.name.partition("[")[0] for row in ROWS}
    )
    for row in ROWS:
        line = written[row.name]
        assert (line["unit"], line["limit"]) == (row.unit, row.at_most)
        assert "skipped" in line or line["value"] is not None
        # Times are not judged on a CPU; counts and bytes are.
        is_judged = row.is_exact and row.at_most is not None and "skipped" not in line
        assert line["passed"] is (True if is_judged else None), line
    for name in written:
        assert name.removeprefix("tests/gpu/") in result.stdout
    reasons = {line["skipped"] for line in written.values() if "skipped" in line}
    allowed = ("needs a CUDA device", "compiler", "computes in fp32 on a CPU", "not installed")
    assert all(any(text in reason for text in allowed) for reason in reasons), reasons


@pytest.mark.slow
def test_without_a_gpu_the_command_names_the_option(tmp_path):
    result = gpu("--out", str(tmp_path / "gpu.json"), CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1 and "no CUDA device: use --cpu" in result.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_the_wheels_of_a_gpu_node_are_those_of_the_dependencies():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.match(r"[\w-]+", line)[0] for line in project["dependencies"]}
    script = (ROOT / "benchmarks" / "gpu_wheels.sh").read_text()
    wheels = set(re.search(r"packages=\((.*?)\n\)", script, re.DOTALL)[1].split())
    assert names - {"torch", "numpy"} <= wheels
