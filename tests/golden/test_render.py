"""The exact output of `faccel launch --print`; `GOLDEN=write` updates the expected files."""

import os
import pathlib
import subprocess

import pytest
from click.testing import CliRunner

from faccel.cli.commands import main

HERE = pathlib.Path(__file__).parent
LAUNCHES = {
    "one-node": ["--cpu", "--nproc", "2", "--seed", "3", "train.py", "--name", "a b"],
    "two-nodes": [
        "--cpu",
        "--nproc",
        "4",
        "--nnodes",
        "2",
        "--node-rank",
        "0",
        "--main-address",
        "head",
        "--mixed-precision",
        "bf16",
        "--config",
        "CONFIG",
        "-m",
        "package.train",
    ],
    "an-executable": ["--nproc", "1", "--no-python", "./run.sh"],
}


@pytest.mark.parametrize("rendering", ["torchrun", "slurm", "mpirun"])
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_is_printed_for_another_launcher(tmp_path, name, rendering):
    config = tmp_path / "training.yaml"
    config.write_text("seed: 1\n")
    words = [str(config) if word == "CONFIG" else word for word in LAUNCHES[name]]
    out = CliRunner().invoke(main, ["launch", "--print", rendering, *words])
    assert out.exit_code == 0, out.output
    text = out.output.replace(str(config), "training.yaml")
    golden = HERE / f"{name}.{rendering}.txt"
    if os.environ.get("GOLDEN") == "write":
        golden.write_text(text)
    assert text == golden.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_a_range_of_nodes_is_an_error_for_a_batch_job():
    words = ["--cpu", "--nnodes", "1:4", "--rdzv-endpoint", "head:1", "x.py"]
    out = CliRunner().invoke(main, ["launch", "--print", "slurm", *words])
    assert (out.exit_code, "a fixed number of nodes" in out.output) == (2, True)
