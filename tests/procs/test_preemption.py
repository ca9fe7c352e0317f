"""SIGTERM at any time: all ranks save at one step, and the resumed run is the uninterrupted run."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import faccel
from examples import resume
from faccel.testing import simulate
from tests.command_line import Command
from tests.ranks import SERVER, env_of, hosted_store

NUM_STEPS = 60


def train(ctx, folder, pipe=None):
    """Return the weights at the end, or the step at which the run was preempted."""
    torch.manual_seed(0)
    preemption = faccel.preemption(ctx)
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
    for _, epoch_loader in loader.epochs(99, start=state["cursor"]):
        for batch in faccel.batches(epoch_loader):
            scaler = faccel.scaled_backward(model(batch.data[0]).square().mean(), scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            step += 1
            if pipe is not None and step == state["step"] + 1:
                pipe.send("running")
            if step == NUM_STEPS:
                return torch.cat([p.detach().flatten() for p in model.parameters()])
            if faccel.agree(ctx, preempted=preemption.requested).preempted:
                new = {
                    "scaler": scaler,
                    "cursor": batch.cursor,
                    "rng": faccel.rng_state(ctx),
                    "step": step,
                }
                faccel.save(state | new, folder, ctx, step=step)
                return step
    return None


def run_rank(rank, world_size, port, pipe, folders):
    torch.set_num_threads(1)
    with faccel.init(env=env_of(rank, world_size, port)) as ctx:
        for folder in folders:
            result = train(ctx, folder, pipe)
            if isinstance(result, torch.Tensor):
                result = result.tolist()
            pipe.send(result)
    pipe.close()
    os._exit(0)


def run(folders, interrupt=None):
    """Train once for each folder on two ranks; return the results.

    `interrupt(processes)` is called when both have taken a step.
    """
    store, ranks = hosted_store(), []
    for rank in range(2):
        pipe, child_pipe = SERVER.Pipe()
        process = SERVER.Process(target=run_rank, args=(rank, 2, store.port, child_pipe, folders))
        process.start()
        child_pipe.close()
        ranks.append((process, pipe))
    results = []
    for _ in folders:
        for _, pipe in ranks:
            assert pipe.recv() == "running"
        if interrupt is not None:
            interrupt([process for process, _ in ranks])
        first, second = (pipe.recv() for _, pipe in ranks)
        assert first == second
        results.append(first)
    for process, _ in ranks:
        process.join()
        # the signal may arrive after the handlers were restored
        assert process.exitcode in (0, -signal.SIGTERM)
    return results


@pytest.mark.slow
def test_sigterm_at_fifty_random_times(tmp_path):
    started_s = time.monotonic()
    (uninterrupted,) = run([str(tmp_path / "uninterrupted")])
    duration_s = time.monotonic() - started_s
    draw, preempted = random.Random(0), []
    for number in range(50):
        folder = str(tmp_path / str(number))

        def interrupt(processes):
            threading.Event().wait(draw.random() * min(duration_s, 0.25))
            for process in draw.choice([processes, processes[:1], processes[1:]]):
                if process.is_alive():
                    os.kill(process.pid, signal.SIGTERM)

        (first,) = run([folder], interrupt)
        if isinstance(first, list):  # the signal arrived after the last step
            assert first == uninterrupted
            continue
        preempted.append(folder)
        (checkpoint,) = faccel.checkpoint.checkpoints(folder)
        assert checkpoint.step == first
    assert len(preempted) >= 10
    # In one world: other tests resume in new processes.
    assert run(preempted) == [uninterrupted] * len(preempted)


def run_script(folder, *options):
    """Run `examples/resume.py`; return its exit code and the lines that it has printed."""
    command = [sys.executable, "examples/resume.py", folder, *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert not result.stderr, result.stderr
    return result.returncode, result.stdout.splitlines()


@pytest.mark.slow
def test_a_stopped_script_exits_with_its_code_and_can_be_resumed(tmp_path):
    folder = str(tmp_path / "stopped")
    exit_code = faccel.checkpoint.Preemption.exit_code
    assert run_script(folder, "--stop-after", "3") == (exit_code, ["stopped"])
    resumed = simulate(resume.main, 1, folder, None, 0)
    assert resumed == simulate(resume.main, 1, str(tmp_path / "uninterrupted"), None, 0)


@pytest.mark.slow
def test_the_same_command_resumes_a_stopped_script(tmp_path):
    folder = str(tmp_path / "stopped")
    run_script(folder, "--stop-after", "3")
    _, (digest,) = run_script(str(tmp_path / "uninterrupted"))
    assert run_script(folder) == (0, ["resumed after step 3", digest])


def test_shutdown_restores_the_signal_handlers():
    original = signal.getsignal(signal.SIGUSR1)
    with faccel.init(env={}) as ctx:
        preemption = faccel.preemption(ctx)
        signal.raise_signal(signal.SIGUSR1)
        assert preemption.requested
        assert signal.getsignal(signal.SIGUSR1) != original
    assert signal.getsignal(signal.SIGUSR1) == original


def test_the_second_interrupt_raises_and_shutdown_restores_its_handler():
    original = signal.getsignal(signal.SIGINT)
    with faccel.init(env={}) as ctx:
        preemption = faccel.preemption(ctx, interrupt=True)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert preemption.received == [signal.SIGINT, signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == original
    with faccel.init(env={}) as ctx:  # by default Ctrl-C ends the run
        faccel.preemption(ctx)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def documented_loop():
    """Return the first script of docs/checkpoints.md, for many epochs."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    script = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert script.count("train.epochs(2,") == 1
    script = script.replace("train.epochs(2,", "train.epochs(10**9,")
    return script.replace(
        "        step += 1\n", "        step += 1\n        print(step, flush=True)\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_the_documented_loop_saves_and_exits_with_75_after_a_signal(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(documented_loop())
    command = Command("launch", "--cpu", "--nproc", "2", "train.py", env={"OMP_NUM_THREADS": "1"})
    for line in command.stdout:
        if "3" in line:  # both ranks print, so a line may have the numbers of both
            break
    command.send_signal(number)
    code, _, errors = command.wait()
    assert (code, "preempted: a checkpoint is saved" in errors) == (75, True), errors
    (newest, *_) = faccel.checkpoint.checkpoints("runs/first")
    assert newest.problem is None
    assert newest.step >= 2
