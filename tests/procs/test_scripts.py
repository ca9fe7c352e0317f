"""The examples and the README's first loop, as users start them: python, torchrun, mpirun.

Python itself runs each script once. More ranks are forks, which have imported torch.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import faccel
from tests.docs.pages import accuracy_in_readme
from tests.forked_python import faccel_launch, forked_python
from tests.ranks import TIMEOUT_S

ROOT = pathlib.Path(__file__).parents[2]
FACCEL_LAUNCH = [sys.executable, "-m", "faccel", "launch", "--cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable]
SLOW = pytest.mark.slow


def launcher_of(num_processes):
    """Return torchrun, or Python for 0 processes."""
    if num_processes == 0:
        return [sys.executable]
    return [*TORCHRUN, str(num_processes)]


def forking_launcher_of(num_processes):
    """Return torchrun whose ranks are forks, or Python for 0 processes."""
    if num_processes == 0:
        return [sys.executable]
    python = forked_python()
    return [python, *TORCHRUN[1:], str(num_processes), "--no-python", python]


def run(script, *arguments, launcher=(sys.executable,), cwd=ROOT, **env):
    """Run a script, and return the lines that it prints."""
    out = subprocess.run(
        [*launcher, str(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        timeout=TIMEOUT_S,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout.splitlines()


def last_number(lines, name):
    match = re.fullmatch(rf"{name} (\d\.\d{{4}})", lines[-1])
    assert match, lines[-3:]
    return float(match[1])


@SLOW
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param([*FACCEL_LAUNCH, "--nproc", "2"], id="faccel launch"),
        pytest.param(launcher_of(0), id="python"),
        pytest.param(launcher_of(1), id="torchrun 1"),
        pytest.param(launcher_of(2), id="torchrun 2"),
        pytest.param(launcher_of(4), id="torchrun 4"),
        pytest.param(
            MPIRUN,
            id="mpirun 2",
            marks=pytest.mark.skipif(
                shutil.which("mpirun") is None,
                reason="mpirun is not installed (Debian: apt-get install openmpi-bin)",
            ),
        ),
    ],
)
def test_digits_learns_and_prints_each_line_once(launcher):
    lines = run("examples/digits.py", launcher=launcher)
    assert lines[-1] == accuracy_in_readme()
    assert last_number(lines, "accuracy") >= 0.97
    assert len(lines) == 13  # one for each epoch and the last one, on any number of processes


@SLOW
@pytest.mark.parametrize(
    ("script", "meshes"),
    [
        ("fsdp.py", ("dp_shard=2", "dp_replicate=2,dp_shard=2")),
        ("tensor_parallel.py", ("tp=2", "dp_shard=2,tp=2")),
        ("pipeline.py", ("pp=2", "pp=2,dp_shard=2")),
        # tests/procs/test_experts.py has moe.py
    ],
)
def test_a_model_learns_equally_on_every_mesh(script, meshes):
    arguments = (f"examples/{script}", "--steps", "20")
    expected = last_number(run(*arguments), "loss")
    assert expected < 4.0
    for mesh in meshes:
        count = str(faccel.MeshSpec.of(mesh).size)
        launcher = faccel_launch("--nproc", count, "--mesh", mesh)
        loss = last_number(run(*arguments, launcher=launcher), "loss")
        assert abs(loss - expected) < 2e-4


@SLOW
@pytest.mark.parametrize("mesh", ["dp_replicate=1", "dp_replicate=2", "dp_shard=2"])
def test_averaged_weights_are_better_and_exported(mesh, tmp_path):
    launcher = [sys.executable]
    if mesh != "dp_replicate=1":
        launcher = faccel_launch("--nproc", "2", "--mesh", mesh)
    lines = run("examples/ema.py", "--output", str(tmp_path), launcher=launcher)
    assert last_number(lines, "accuracy") >= 0.97
    numbers = [re.findall(r"\d\.\d{4}", line) for line in lines[:-1]]
    weights, averages = (sum(map(float, column)) for column in zip(*numbers, strict=True))
    assert averages > weights
    assert (tmp_path / "export" / "model.safetensors").exists()


@SLOW
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_contrastive_loss_learns(num_processes):
    launcher = [*FACCEL_LAUNCH, "--nproc", "1"]
    if num_processes > 1:
        launcher = faccel_launch("--nproc", str(num_processes))
    assert last_number(run("examples/contrastive.py", launcher=launcher), "accuracy") >= 0.95


@SLOW
def test_local_sgd_learns_on_two_processes():
    launcher = [*FACCEL_LAUNCH, "--nproc", "2"]
    arguments = ("--steps", "40", "--every", "4")
    lines = run("examples/local_sgd.py", *arguments, launcher=launcher)
    assert last_number(lines, "loss") < 3.5


@SLOW
@pytest.mark.parametrize("num_processes", [0, 2])
@pytest.mark.parametrize(
    ("script", "minimum"), [("functional.py", 0.97), ("ensemble.py", 0.97), ("dp_sgd.py", 0.9)]
)
def test_functional_examples_learn(script, minimum, num_processes):
    lines = run(f"examples/{script}", launcher=forking_launcher_of(num_processes))
    assert last_number(lines, "accuracy") >= minimum


@SLOW
def test_a_compiled_ensemble_learns():
    assert last_number(run("examples/ensemble.py", "--compile"), "accuracy") >= 0.97


@SLOW
def test_maml_learns_equally_on_any_number_of_processes():
    arguments = ("examples/maml.py", "--steps", "60")
    one = run(*arguments)
    two = run(*arguments, launcher=forking_launcher_of(2))
    loss_before = float(one[-2].removeprefix("before "))
    assert last_number(one, "loss") < loss_before
    assert last_number(one, "loss") == pytest.approx(last_number(two, "loss"), abs=2e-3)


@SLOW
def test_gradient_accumulation_learns_equally_on_any_number_of_processes():
    one = run("examples/accumulate.py")
    two = run("examples/accumulate.py", launcher=forking_launcher_of(2))
    assert last_number(one, "loss") < 2.0
    assert abs(last_number(one, "loss") - last_number(two, "loss")) < 1e-3
    assert len(one) == len(two) == 5


@SLOW
@pytest.mark.parametrize("num_processes", [0, 2])
def test_two_models_use_one_loss_scale_in_fp16(num_processes):
    launcher = forking_launcher_of(num_processes)
    lines = run("examples/two_models.py", launcher=launcher, FACCEL_MIXED_PRECISION="fp16")
    assert last_number(lines, "distance") < 0.1
    assert lines[-2].startswith("steps 1216")


@SLOW
@pytest.mark.parametrize("num_processes", [0, 2])
def test_every_precision_learns(num_processes):
    lines = run("examples/mixed_precision.py", launcher=forking_launcher_of(num_processes))
    assert last_number(lines, "accuracy") > 0.94
    assert [line.split()[0] for line in lines[:3]] == ["no", "bf16", "fp16"]


@SLOW
@pytest.mark.parametrize("num_processes", [0, 2, 3])
def test_inference_returns_every_answer_in_order(num_processes):
    lines = run("examples/inference.py", launcher=forking_launcher_of(num_processes))
    assert last_number(lines, "accuracy") == 1.0
    assert len(lines) == max(1, num_processes) + 1


def first_readme_block():
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.S)[0]


@SLOW
@pytest.mark.parametrize("num_processes", [0, 2])
def test_the_first_block_of_the_readme_trains(tmp_path, num_processes):
    script = tmp_path / "train.py"
    script.write_text(first_readme_block())
    lines = run(script, launcher=launcher_of(num_processes), cwd=tmp_path)
    assert last_number(lines, "accuracy") > 0.9


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_has_at_most_120_lines(path):
    assert len(path.read_text().splitlines()) <= 120
