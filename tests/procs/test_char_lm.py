"""The language-model example: every strategy reaches one loss; a killed run resumes."""

import contextlib
import functools
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import char_lm
from faccel.backends.table import BACKENDS
from tests.forked_python import faccel_launch

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
REASON = BACKENDS["deepspeed"].probe(os.environ)
needs_transformers = pytest.mark.skipif(
    not HAS_TRANSFORMERS, reason="transformers is not installed"
)
needs_deepspeed = pytest.mark.skipif(
    REASON is not None, reason=f"DeepSpeed cannot run here: {REASON}"
)
ROOT = pathlib.Path(__file__).parents[2]
MODELS = (
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.gpt_neox.modeling_gpt_neox",
)
# Forks, which have imported transformers.
loss_of = functools.partial(
    char_lm.loss_of, launcher=functools.partial(faccel_launch, preload=MODELS)
)


@pytest.mark.slow
@needs_transformers
@needs_deepspeed
def test_every_strategy_ends_with_the_loss_of_one_process():
    losses = {name: loss_of(flags) for name, flags in char_lm.ROWS.items()}
    assert max(losses.values()) - min(losses.values()) <= 1e-4, losses
    assert losses["one process"] < 4  # a uniform guess among 256 bytes has log(256) = 5.5


@pytest.mark.slow
@needs_transformers
@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_fp8_ends_with_the_loss_of_bf16():
    flags = "--nproc 2 --mesh dp_shard=2 --mixed-precision "
    options = ["--model", "gpt_neox", "--emulate"]
    fp8, bf16 = (loss_of(flags + precision, 20, options) for precision in ("fp8", "bf16"))
    assert fp8 == pytest.approx(bf16, rel=0.02)
    assert bf16 < 4  # a uniform guess among 256 bytes has log(256) = 5.5


def ranks_of(pid):
    """Return all descendants of a launcher. Each rank has a separate session: no `killpg`."""
    fields = {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    children = [child for child, parent in fields.items() if parent == pid]
    return [*children, *(pid for child in children for pid in ranks_of(child))]


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@needs_transformers
@needs_deepspeed
@pytest.mark.parametrize("stage", [3])
def test_a_killed_run_resumes_to_the_same_loss_and_transformers_loads_the_export(stage, tmp_path):
    flags = f"--nproc 2 --strategy deepspeed --zero {stage}"
    steps = 60
    uninterrupted = loss_of(flags, steps, ["--export", str(tmp_path / "uninterrupted")])

    command = [
        sys.executable,
        "-m",
        "faccel",
        "launch",
        "--cpu",
        *flags.split(),
        "examples/char_lm.py",
    ]
    more = ["--runs", str(tmp_path / "runs"), "--export", str(tmp_path / "export")]
    process = subprocess.Popen(
        [*command, "--steps", "1000000", *more],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(tmp_path / "runs" / "step-000000010", process)
    finally:
        for pid in [*ranks_of(process.pid), process.pid]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    saved = max(int(folder.name.partition("-")[2]) for folder in (tmp_path / "runs").glob("step-*"))
    assert 10 <= saved < steps, "killed too late"

    assert loss_of(flags, steps, more) == uninterrupted

    from transformers import GPT2LMHeadModel

    tokens = torch.arange(64)[None]
    models = [
        GPT2LMHeadModel.from_pretrained(tmp_path / name).eval()
        for name in ("uninterrupted", "export")
    ]
    with torch.no_grad():
        first, second = (model(tokens).logits for model in models)
    assert torch.equal(first, second)
