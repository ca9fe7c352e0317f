"""SIGTERM at any moment: one checkpoint at one step, and the resumed run is the run that was not interrupted."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import faccel
from tests.ranks import SERVER, env_of, hosted_store

NUM_STEPS = 60


def train(ctx, folder, pipe=None):
    """Return the weights at the end, or the step at which the run was preempted."""
    torch.manual_seed(0)
    told = faccel.preemption(ctx)
    model = faccel.wrap(
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)),
        ctx,
    )
    opt = faccel.wrap_optimizer(torch.optim.Adam(model.parameters()), model, ctx)
    data = TensorDataset(torch.randn(40, 4, generator=faccel.random.generator(1)))
    loader = faccel.shard(DataLoader(data, 4, shuffle=True), ctx, split_batches=True)
    state = {
        "model": model,
        "opt": opt,
        "scaler": faccel.init_scaler(ctx),
        "cursor": faccel.Cursor(),
        "step": 0,
    }
    state["rng"] = faccel.rng_state(ctx)
    if faccel.latest(folder, ctx):
        state = faccel.load(state, folder, ctx)
    faccel.set_rng_state(state["rng"])
    scaler, step = state["scaler"], state["step"]
    for _, part in loader.epochs(99, start=state["cursor"]):
        for batch in faccel.batches(part):
            scaler = faccel.scaled_backward(model(batch.data[0]).square().mean(), scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            step += 1
            if pipe is not None and step == state["step"] + 1:
                pipe.send("running")
            if step == NUM_STEPS:
                return torch.cat([p.detach().flatten() for p in model.parameters()])
            if faccel.agree(ctx, preempted=told.requested).preempted:
                new = {
                    "scaler": scaler,
                    "cursor": batch.cursor,
                    "rng": faccel.rng_state(ctx),
                    "step": step,
                }
                faccel.save(state | new, folder, ctx, step=step)
                return step
    return None


def rank_of(rank, world_size, port, pipe, folder):
    torch.set_num_threads(1)
    with faccel.init(env=env_of(rank, world_size, port)) as ctx:
        out = train(ctx, folder, pipe)
        pipe.send(out.tolist() if isinstance(out, torch.Tensor) else out)
    pipe.close()
    os._exit(0)


def run(folder, interrupt=None):
    """Run two ranks; `interrupt(processes)` is called when both have taken a step."""
    store, ranks = hosted_store(), []
    for rank in range(2):
        ours, theirs = SERVER.Pipe()
        process = SERVER.Process(target=rank_of, args=(rank, 2, store.port, theirs, folder))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    for _, pipe in ranks:
        assert pipe.recv() == "running"
    if interrupt is not None:
        interrupt([process for process, _ in ranks])
    results = [pipe.recv() for _, pipe in ranks]
    for process, _ in ranks:
        process.join()
        assert process.exitcode in (
            0,
            -signal.SIGTERM,
        )  # the signal may come when everything has ended
    assert results[0] == results[1]
    return results[0]


@pytest.mark.slow
def test_sigterm_at_fifty_random_moments(tmp_path):
    began = time.monotonic()
    whole = run(str(tmp_path / "whole"))
    length, draw, preempted = time.monotonic() - began, random.Random(0), 0
    for number in range(50):
        folder = str(tmp_path / str(number))

        def interrupt(processes):
            waited = threading.Event()
            waited.wait(draw.random() * min(length, 0.25))
            for process in draw.choice(
                [processes, processes[:1], processes[1:]]
            ):  # both, or one alone
                if process.is_alive():
                    os.kill(process.pid, signal.SIGTERM)

        first = run(folder, interrupt)
        if isinstance(first, list):  # it had ended by then
            assert first == whole
            continue
        preempted += 1
        assert [each.step for each in faccel.checkpoint.checkpoints(folder)] == [first]
        assert run(folder) == whole
    assert preempted >= 10


def test_the_script_exits_with_its_code_and_the_same_command_goes_on(tmp_path):
    command = [sys.executable, "examples/resume.py", str(tmp_path / "runs")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    whole = subprocess.run(
        [*command[:2], str(tmp_path / "whole")], env=env, capture_output=True, text=True, check=True
    )
    stopped = subprocess.run(
        [*command, "--stop-after", "3"], env=env, capture_output=True, text=True, check=False
    )
    assert (stopped.returncode, stopped.stdout) == (
        faccel.checkpoint.Preemption.exit_code,
        "stopped\n",
    ), stopped.stderr
    again = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert again.stdout.splitlines() == ["resumed after step 3", whole.stdout.strip()]


def test_the_handlers_are_put_back_and_what_goes_on_goes_on():
    before = signal.getsignal(signal.SIGUSR1)
    with faccel.init(env={}) as ctx:
        told = faccel.preemption(ctx)
        signal.raise_signal(signal.SIGUSR1)
        assert told.requested
        assert signal.getsignal(signal.SIGUSR1) != before
    assert signal.getsignal(signal.SIGUSR1) == before
