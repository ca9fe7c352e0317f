"""Goodput of a run whose ranks are killed twice: against times that the script measures itself."""

import json
import os
import subprocess
import sys

import pytest

from faccel.tracking import goodput, read_journal
from tests.ranks import TIMEOUT_S

SCRIPT = """
import json, os, signal, sys, time
import faccel, torch
from faccel.tracking import init_meter, phase, tick
from torch.utils.data import DataLoader, Dataset

folder = sys.argv[1]
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
KILLED_AFTER = {0: 7, 1: 9}  # attempt -> step
OVERFLOWS, NUM_STEPS = 3, 10


class Items(Dataset):
    def __len__(self):
        return 200

    def __getitem__(self, index):
        time.sleep(0.01)
        return torch.ones(4)


class Slow:
    def state_dict(self):
        time.sleep(0.3)
        return {"x": 1}

    def load_state_dict(self, state):
        pass


def report(name, start, **values):
    line = json.dumps({"name": name, "start": start, "end": time.time(), **values})
    os.write(file, line.encode() + b"\\n")


with faccel.init(mixed_precision="fp16", run_dir=folder) as ctx:
    file = os.open(f"{folder}/rank-{ctx.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    report("init", time.time())
    meter = init_meter(ctx, run="a")
    model = faccel.wrap(torch.nn.Linear(4, 1), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.01), model, ctx)
    scaler, step = faccel.init_scaler(ctx, scale=8.0), 0
    state = {"model": model, "slow": Slow(), "step": 0}
    if faccel.latest(f"{folder}/checkpoints", ctx):
        start = time.time()
        step = faccel.load(state, f"{folder}/checkpoints", ctx)["step"]
        report("checkpoint", start)
    batches = iter(faccel.shard(DataLoader(Items(), 4), ctx).at(0))
    begin = None  # of a step; that of the first one is unknown
    while step < NUM_STEPS:
        start = time.time()
        x = next(batches)
        data_s = time.time() - start
        step += 1
        time.sleep(0.05)
        factor = float("inf") if step == OVERFLOWS else 1.0
        loss = model(x).square().mean() * factor
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx)
        meter = tick(meter, samples=4)
        report("step", begin or start, step=step, is_first=begin is None, data_s=data_s,
               skipped=info.skipped)
        if step == KILLED_AFTER.get(attempt) and ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if step in (4, 8):
            start = time.time()
            faccel.save(state | {"step": step}, f"{folder}/checkpoints", ctx, step=step)
            report("checkpoint", start, saved=step)
        if step == 6:
            start = time.time()
            with phase("evaluation", ctx):
                time.sleep(0.2)
            report("evaluation", start)
        begin = time.time()
    report("finish", time.time())
"""
SAVED = (4, 8)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected_times(lines):
    """Return the time per category from the lines of one rank."""
    times = dict.fromkeys(["useful_s", "data_wait_s", "skipped_s", "lost_s"], 0.0)
    times |= {"checkpoint_s": 0.0, "evaluation_s": 0.0}
    steps, saved, lost = [], [], []
    for line in lines:
        if line["name"] == "init":  # resumes from the newest checkpoint
            lost += steps[len(saved) :]
            steps = list(saved)
        elif line["name"] == "step":
            steps.append(line)
        elif line["name"] in ("checkpoint", "evaluation"):
            times[f"{line['name']}_s"] += line["end"] - line["start"]
            if "saved" in line:
                saved = list(steps)
    for line in [*steps, *lost]:
        work_s = line["end"] - line["start"] - line["data_s"]
        is_lost = line in lost
        times["lost_s" if is_lost else "data_wait_s"] += line["data_s"]
        if not line["is_first"]:
            name = "skipped_s" if line["skipped"] else "useful_s"
            times["lost_s" if is_lost else name] += work_s
    return times, steps, lost


@pytest.mark.slow
def test_two_kills_an_overflow_and_slow_checkpoints(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "faccel", "launch", "--cpu", "--nproc", "2"]
    out = subprocess.run(
        [*command, "--max-restarts", "2", str(script), str(tmp_path)],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert out.returncode == 0, out.stderr
    lines = lines_of(tmp_path / "rank-1")
    wall_s = lines[-1]["end"] - lines[0]["start"]
    expected, steps, lost = expected_times(lines)
    result = goodput(read_journal(tmp_path / "a"), rank=1)
    assert (result.num_steps, result.num_lost, result.num_restarts) == (10, 3 + 1, 2)
    assert (len(steps), len(lost)) == (10, 4)
    assert result.num_skipped == 1
    limit_s = 0.005 * wall_s
    for name, seconds in expected.items():
        assert getattr(result, name) == pytest.approx(seconds, abs=limit_s), name
    total = result.startup_s + result.down_s + sum(getattr(result, name) for name in expected)
    assert result.wall_s == pytest.approx(wall_s, abs=limit_s)
    assert total == pytest.approx(result.wall_s, abs=1e-3)
