"""`kill -9` of a rank: all ranks restart, and resume from the last checkpoint."""

import os
import subprocess
import sys

import pytest

from tests.forked_python import faccel_launch
from tests.ranks import TIMEOUT_S

SCRIPT = """
import os, signal, sys
import faccel, torch
from torch.utils.data import DataLoader

folder, num_kills = sys.argv[1], int(sys.argv[2])
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
with faccel.init() as ctx:
    faccel.seed_everything(0, ctx)
    layers = [torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1)]
    model = faccel.wrap(torch.nn.Sequential(*layers), ctx)
    opt = faccel.wrap_optimizer(torch.optim.Adam(model.parameters()), model, ctx)
    data = torch.randn(64, 4, generator=faccel.random.generator(1))
    loader = faccel.shard(DataLoader(data, 4, shuffle=True), ctx, split_batches=True)
    state = {"model": model, "opt": opt, "step": 0, "cursor": faccel.Cursor()}
    state |= {"scaler": faccel.init_scaler(ctx), "rng": faccel.rng_state(ctx)}
    if faccel.latest(folder, ctx):
        state = faccel.load(state, folder, ctx)
        faccel.print(f"attempt {attempt} resumes after step {state['step']}", ctx=ctx)
    faccel.set_rng_state(state["rng"])
    scaler, step = state["scaler"], state["step"]
    for _, epoch in loader.epochs(1, start=state["cursor"]):
        for batch in faccel.batches(epoch):
            scaler = faccel.scaled_backward(model(batch.data).square().mean(), scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            step += 1
            state |= {"scaler": scaler, "cursor": batch.cursor, "rng": faccel.rng_state(ctx)}
            faccel.save(state | {"step": step}, folder, ctx, step=step, keep=2)
            # The ranks take turns, each time one step later.
            if attempt < num_kills and step == 4 + attempt and ctx.rank == attempt % 2:
                os.kill(os.getpid(), signal.SIGKILL)
    total = sum(p.double().sum() for p in model.parameters()).item()
    faccel.print(f"weights {total.hex()} after {step}", ctx=ctx)
"""


def faccel_launch_of_python(*options):
    return [sys.executable, "-m", "faccel", "launch", "--cpu", *options]


def launch(script, folder, num_kills, *options, launcher=faccel_launch_of_python):
    return subprocess.run(
        [*launcher("--nproc", "2", *options), str(script), str(folder), str(num_kills)],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


@pytest.mark.slow
def test_ten_killed_ranks_are_ten_restarts_with_the_same_result(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    uninterrupted = launch(script, tmp_path / "uninterrupted", 0)
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    # Forks: 22 ranks would import torch for half a minute.
    options = ("--max-restarts", "10")
    out = launch(script, tmp_path / "killed", 10, *options, launcher=faccel_launch)
    assert out.returncode == 0, out.stderr
    *messages, weights = out.stdout.splitlines()
    assert messages == [f"attempt {n} resumes after step {3 + n}" for n in range(1, 11)]
    assert weights == uninterrupted.stdout.strip()


@pytest.mark.slow
def test_without_a_restart_the_signal_is_the_exit_code(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    out = launch(script, tmp_path / "runs", 1)
    assert out.returncode == 137
    assert "signal 9" in out.stderr
