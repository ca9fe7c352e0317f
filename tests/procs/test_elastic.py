"""`kill -9` of a worker: all ranks start again, and go on from the last checkpoint."""

import os
import re
import subprocess
import sys

import pytest

SCRIPT = """
import os, signal, sys
import faccel, torch
from torch.utils.data import DataLoader

folder, victim = sys.argv[1], int(sys.argv[2])
attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
with faccel.init() as ctx:
    faccel.seed_everything(0, ctx)
    model = faccel.wrap(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 1)), ctx)
    opt = faccel.wrap_optimizer(torch.optim.Adam(model.parameters()), model, ctx)
    data = torch.randn(64, 4, generator=faccel.random.generator(1))
    loader = faccel.shard(DataLoader(data, 4, shuffle=True), ctx, split_batches=True)
    state = {"model": model, "opt": opt, "scaler": faccel.init_scaler(ctx), "cursor": faccel.Cursor(), "step": 0}
    state["rng"] = faccel.rng_state(ctx)
    if faccel.latest(folder, ctx):
        state = faccel.load(state, folder, ctx)
        faccel.print(f"attempt {attempt} goes on after step {state['step']}", ctx=ctx)
    faccel.set_rng_state(state["rng"])
    scaler, step = state["scaler"], state["step"]
    for _, part in loader.epochs(1, start=state["cursor"]):
        for batch in faccel.batches(part):
            scaler = faccel.scaled_backward(model(batch.data).square().mean(), scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            step += 1
            new = {"scaler": scaler, "cursor": batch.cursor, "rng": faccel.rng_state(ctx), "step": step}
            faccel.save(state | new, folder, ctx, step=step, keep=2)
            if step == 7 and ctx.rank == victim and attempt == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    total = sum(p.double().sum() for p in model.parameters()).item()
    faccel.print(f"weights {total.hex()} after {step}", ctx=ctx)
"""


def launch(script, folder, victim, *options):
    command = [sys.executable, "-m", "faccel", "launch", "--cpu", "--nproc", "2", *options]
    return subprocess.run(
        [*command, str(script), str(folder), str(victim)],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.slow
def test_ten_killed_workers_are_ten_clean_restarts(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    whole = launch(script, tmp_path / "whole", -1)
    assert whole.returncode == 0, whole.stderr
    for number in range(10):
        out = launch(script, tmp_path / str(number), number % 2, "--max-restarts", "1")
        assert out.returncode == 0, out.stderr
        went_on, weights = out.stdout.splitlines()
        assert re.fullmatch("attempt 1 goes on after step 7", went_on)
        assert weights == whole.stdout.strip()


def test_without_a_restart_the_death_is_the_exit_code(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    out = launch(script, tmp_path / "runs", 1)
    assert out.returncode == 137
    assert "signal 9" in out.stderr
