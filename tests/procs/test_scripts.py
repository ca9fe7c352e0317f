"""Scripts as users start them: the examples and the README's loop, by python and by torchrun."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import faccel

ROOT = pathlib.Path(__file__).parents[2]


def torchrun(num_processes):
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(num_processes),
    ]


def start(script, num_processes, cwd=ROOT, launcher=None, more=(), **env):
    launcher = launcher or (torchrun(num_processes) if num_processes else [sys.executable])
    out = subprocess.run(
        [*launcher, str(script), *more],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return out.stdout.splitlines()


def last_number(lines, word):
    match = re.fullmatch(rf"{word} (\d\.\d{{4}})", lines[-1])
    assert match, lines[-3:]
    return float(match[1])


@pytest.mark.parametrize("num_processes", [0, 1, 2, 4])
def test_digits_learns_and_prints_once(num_processes):
    lines = start("examples/digits.py", num_processes)
    assert last_number(lines, "accuracy") >= 0.97
    assert len(lines) == 13  # a line an epoch and the last one, whatever the number of processes


@pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="no mpirun here (Debian: apt-get install openmpi-bin)"
)
def test_digits_runs_under_open_mpi():
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable]
    lines = start("examples/digits.py", 2, launcher=launcher)
    assert last_number(lines, "accuracy") >= 0.97
    assert len(lines) == 13


@pytest.mark.slow
@pytest.mark.parametrize(("script", "meshes"), [
    ("fsdp.py", ("dp_shard=2", "dp_replicate=2,dp_shard=2")), ("tensor_parallel.py", ("tp=2", "dp_shard=2,tp=2")),
    ("pipeline.py", ("pp=2", "pp=2,dp_shard=2")), ("moe.py", ("dp_shard=2,ep=2",)),
])  # fmt: skip
def test_a_model_learns_the_same_on_every_mesh(script, meshes):
    words = [f"examples/{script}", "--steps", "20"]
    one = last_number(start(words[0], 0, more=words[1:]), "loss")
    assert one < 4.0
    for mesh in meshes:
        count = str(faccel.MeshSpec.of(mesh).size)
        launcher = [
            sys.executable,
            "-m",
            "faccel",
            "launch",
            "--cpu",
            "--nproc",
            count,
            "--mesh",
            mesh,
        ]
        assert (
            abs(last_number(start(words[0], 0, launcher=launcher, more=words[1:]), "loss") - one)
            < 2e-4
        )


def test_local_sgd_learns_on_two_processes():
    launcher = [sys.executable, "-m", "faccel", "launch", "--cpu", "--nproc", "2"]
    lines = start(
        "examples/local_sgd.py", 0, launcher=launcher, more=["--steps", "40", "--every", "4"]
    )
    assert last_number(lines, "loss") < 3.5


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [0, 2])
@pytest.mark.parametrize(
    ("script", "least"), [("functional.py", 0.97), ("ensemble.py", 0.97), ("dp_sgd.py", 0.9)]
)
def test_functional_examples_learn(script, least, num_processes):
    assert last_number(start(f"examples/{script}", num_processes), "accuracy") >= least


@pytest.mark.slow
def test_a_compiled_ensemble_learns():
    assert last_number(start("examples/ensemble.py", 0, more=["--compile"]), "accuracy") >= 0.97


@pytest.mark.slow
def test_meta_learning_learns_the_same_on_any_number_of_processes():
    one, two = (start("examples/maml.py", n, more=["--steps", "60"]) for n in (0, 2))
    before = float(one[-2].removeprefix("before "))
    assert last_number(one, "loss") < before
    assert last_number(one, "loss") == pytest.approx(last_number(two, "loss"), abs=2e-3)


@pytest.mark.slow
def test_accumulation_learns_the_same_on_any_number_of_processes():
    one, two = (start("examples/accumulate.py", n) for n in (0, 2))
    assert last_number(one, "loss") < 2.0
    assert abs(last_number(one, "loss") - last_number(two, "loss")) < 1e-3
    assert len(one) == len(two) == 5


@pytest.mark.parametrize("num_processes", [0, 2])
@pytest.mark.slow
def test_two_models_share_one_loss_scale_in_fp16(num_processes):
    lines = start("examples/two_models.py", num_processes, FACCEL_MIXED_PRECISION="fp16")
    assert last_number(lines, "distance") < 0.1
    assert lines[-2].startswith("steps 1216")


@pytest.mark.parametrize("num_processes", [0, 2])
def test_every_precision_learns_alike(num_processes):
    lines = start("examples/mixed_precision.py", num_processes)
    assert last_number(lines, "accuracy") > 0.94
    assert [line.split()[0] for line in lines[:3]] == ["no", "bf16", "fp16"]


@pytest.mark.parametrize("num_processes", [0, 2, 3])
def test_answers_come_back_complete_and_in_order(num_processes):
    lines = start("examples/inference.py", num_processes)
    assert last_number(lines, "accuracy") == 1.0
    assert len(lines) == max(1, num_processes) + 1


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("num_processes", [0, 2])
def test_the_first_block_of_the_readme_trains(tmp_path, num_processes):
    script = tmp_path / "train.py"
    script.write_text(readme_blocks()[0])
    assert last_number(start(script, num_processes, tmp_path), "accuracy") > 0.9


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 120
