"""How processes end: after Ctrl-C, which a terminal sends to each, and after an exception."""

import itertools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import pytest

import faccel
from faccel.errors import WorldError
from tests.ranks import SERVER, TIMEOUT_S, env_of, hosted_store

LOOP = """
import faccel, torch
from torch.utils.data import DataLoader

{start}
    model = faccel.wrap(torch.nn.Linear(4, 1), ctx)
    scaler = faccel.init_scaler(ctx)
    loader = faccel.shard(DataLoader(torch.randn({rows}, 4), 8, num_workers={workers}), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    for epoch, batches in loader.epochs(10**9):
        for step, x in enumerate(batches):
            scaler = faccel.scaled_backward(model(x).mean(), scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            if (epoch, step) == (1, 1):
                print("running", flush=True)
"""
STARTS = {"with": "with faccel.init() as ctx:", "plain": "ctx = faccel.init()\nif True:"}


def start(script, world_size, store):
    processes = []
    for rank in range(world_size):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if world_size > 1:
            env |= env_of(rank, world_size, store.port)
        process = subprocess.Popen(
            [sys.executable, str(script)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
    return processes


# One case covers most of the code; the others are slow.
CASES = [pytest.param(2, "with", 2)]
for world_size, how, workers in itertools.product((1, 2), STARTS, (0, 2)):
    if (world_size, how, workers) != (2, "with", 2):
        CASES.append(pytest.param(world_size, how, workers, marks=pytest.mark.slow))


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "how", "workers"), CASES)
def test_ctrl_c_prints_one_line_and_ends_each_process_by_the_signal(
    tmp_path, world_size, how, workers
):
    script = tmp_path / "loop.py"
    # With workers an epoch is long: Python loses a Ctrl-C that arrives while it forks a worker.
    rows = 16000 if workers else 64
    script.write_text(LOOP.format(start=STARTS[how], workers=workers, rows=rows))
    store = hosted_store()
    ranks = start(script, world_size, store)
    for rank in ranks:
        assert rank.stdout.readline() == "running\n", rank.stderr.read()
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGINT)
    try:
        errors = [rank.communicate(timeout=TIMEOUT_S)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # the loop is endless
    assert errors == ["interrupted\n"] + [""] * (world_size - 1)
    assert [rank.returncode for rank in ranks] == [-signal.SIGINT] * world_size


FAILING = """
import atexit, faccel, torch

atexit.register(print, "exit handler", flush=True)
ctx = faccel.init(timeout_s=120)
if ctx.rank == 1:
    raise ValueError("bad sample")
faccel.reduce(torch.ones(3), ctx)
"""


def test_an_exception_ends_every_rank_with_code_1_and_the_others_name_it(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILING)
    store = hosted_store()
    ranks = start(script, 2, store)
    outputs, errors = zip(*[rank.communicate(timeout=TIMEOUT_S) for rank in ranks], strict=True)
    assert [rank.returncode for rank in ranks] == [1, 1], errors
    assert outputs == ("exit handler\n", "exit handler\n")
    assert "ValueError: bad sample" in errors[1]
    assert "rank 1: raised ValueError: bad sample" in errors[0]
    assert "terminate called" not in "".join(errors)


def init_and_send_error(rank, port, pipe):
    env = env_of(rank, 2, port)
    del env["TORCHELASTIC_USE_AGENT_STORE"]  # rank 0 serves the store
    try:
        faccel.init(env=env)  # with the default timeout of 10 minutes
    except WorldError as error:
        pipe.send((error.problem, error.got, error.fix))
    os._exit(0)  # a thread still waits for the store


@pytest.mark.slow
def test_a_port_in_use_is_an_error_on_every_rank():
    """Rank 0 cannot serve the store; the other ranks do not wait for the other server."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(8)
        receivers = []
        for rank in range(2):
            receiver, sender = SERVER.Pipe(duplex=False)
            arguments = (rank, other.getsockname()[1], sender)
            SERVER.Process(target=init_and_send_error, args=arguments).start()
            receivers.append(receiver)
        messages = [receiver.recv() for receiver in receivers]
    for rank, (problem, _, fix) in enumerate(messages):
        assert problem.startswith(f"rank {rank} could not connect")
        assert "free `MASTER_PORT`" in fix
    assert "address already in use" in messages[0][1]
    assert "is not a PyTorch store" in messages[1][1]


def init_alone(port, pipe):
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # a script that saves, later
    pipe.send("started")
    faccel.init(env=env_of(0, 2, port))  # with the default timeout of 10 minutes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_a_rank_that_waits_in_init_for_another_one(number):
    store = hosted_store()
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=init_alone, args=(store.port, sender))
    process.start()
    assert receiver.recv() == "started"
    while handles(process.pid, number):  # until `init` waits
        assert process.is_alive()
    os.kill(process.pid, number)
    process.join(TIMEOUT_S)
    assert process.exitcode == -number


def handles(pid, number):
    """Return whether a process has a handler for a signal."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


WRONG = """
import faccel

def train(ctx):
    faccel.gather("text", ctx)

if __name__ == "__main__":
    {start}
"""
WITH = 'with faccel.init(device="cpu") as ctx: train(ctx)'
LAUNCH = ["-m", "faccel", "launch", "--cpu", "--nproc", "2"]
ENDS = {
    "python": ([], WITH, "TreeError"),
    "faccel launch": (LAUNCH, WITH, "TreeError"),
    "faccel.launch": ([], "faccel.launch(train, num_processes=2)", "TreeError"),
    "init": ([], 'faccel.init(seed="text")', "ConfigError"),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_an_error_of_faccel_prints_the_frames_of_the_script_only(tmp_path, end):
    options, start_line, error = ENDS[end]
    script = tmp_path / "wrong.py"
    script.write_text(WRONG.format(start=start_line))
    command = [sys.executable, *options, str(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert run.returncode == 1
    assert f"faccel.errors.{error}: " in run.stderr
    files = set(re.findall(r'File "([^"]*)"', run.stderr))
    assert files == {str(script)}, run.stderr
