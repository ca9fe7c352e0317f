"""The command line on a pretended TPU, which PyTorch loads in every process as a plugin."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.accelerator import device

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("g++") and shutil.which("ninja")), reason="needs g++ and ninja"
    ),
]
ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import os, faccel
with faccel.init() as ctx:
    topology = os.environ.get("TORCH_TPU_TOPOLOGY")
    os.write(1, f"{ctx.rank} {ctx.device} {topology}\\n".encode())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin")
    return device.plugin_folder(path, device.library_path(), "tpu")


def run(folder, *words, **env):
    path = os.pathsep.join([folder, str(ROOT)])
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
    )


def test_a_launch_prepares_the_chips_and_ignores_the_variable_of_a_single_host(folder, tmp_path):
    script = tmp_path / "x.py"
    script.write_text(SCRIPT)
    words = ("-m", "faccel", "launch", "--nproc", "2", str(script))
    done = run(folder, *words, TPU_WORKER_HOSTNAMES="localhost")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 tpu:0 2,2,1", "1 tpu:0 2,2,1"]


def test_torchrun_does_not_and_every_rank_raises(folder, tmp_path):
    script = tmp_path / "x.py"
    script.write_text(SCRIPT)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(folder, *torchrun, str(script), OMP_NUM_THREADS="1")
    assert done.returncode == 1 and done.stdout == ""
    assert "WorldError" in done.stderr and "faccel launch" in done.stderr


def test_three_processes_are_an_error_with_the_numbers_that_are_allowed(folder, tmp_path):
    script = tmp_path / "x.py"
    script.write_text(SCRIPT)
    done = run(folder, "-m", "faccel", "launch", "--nproc", "3", str(script))
    assert done.returncode == 2 and "1, 2, 4 or 8" in done.stderr, done.stderr


def test_the_report_of_the_environment_has_the_devices(folder):
    done = run(folder, "-m", "faccel", "env")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "tpu:3 pretended tpu, 16.0 GiB" in lines and "device tpu:0" in lines
