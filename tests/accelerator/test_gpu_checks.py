"""The checks of a GPU, on a pretended accelerator that has CUDA's manners.

So a tensor on a wrong device is found before the checks run on a GPU.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest

from benchmarks.gpu_workers import LINES, ROOT
from tests.accelerator import device

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("g++") and shutil.which("ninja")), reason="needs g++ and ninja"
    ),
]
# Not the memory that runs out: the pretended device allocates any amount.
TESTS = (
    "placement or counting or collectives or overflow or (bits and True and bf16) or checkpointed"
)
MEASUREMENTS = [
    "step fp16",
    "step sharded",
    "synchronisations windows",
    "synchronisations sharded",
    "memory sharded",
    "save background",
]


def run(folder, *command):
    """Run a command on the pretended device."""
    paths = [device.plugin_folder(folder, device.library_path(), "musa"), str(ROOT)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "FACCEL_GPU_TESTS": "musa:0"}
    env[LINES] = str(folder / "lines.jsonl")
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_the_tests_pass(tmp_path):
    options = ["-n", "0", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    result = run(tmp_path, "-m", "pytest", "tests/gpu", "-k", TESTS, *options)
    assert result.returncode == 0, result.stdout


def test_the_measurements_have_all_rows(tmp_path):
    options = ["--device", "musa:0", "--size", "quick"]
    result = run(tmp_path, "benchmarks/gpu_measure.py", *options, *MEASUREMENTS)
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert not [line for line in lines if "error" in line], result.stdout + result.stderr
    rows = {line["row"]["name"]: line["row"] for line in lines if "row" in line}
    counts = [row["value"] for name, row in rows.items() if name.startswith("synchronisations")]
    assert counts == [0, 0]
    assert len(rows) == 3 + 2 + 2 + 2 + 2  # Accelerate's row is skipped: it cannot use the device
