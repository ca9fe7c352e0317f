"""A rank that is killed, without a launcher: the others print a few lines that name it."""

import itertools
import os
import runpy
import signal
import socket
import sys

import pytest
import torch

from tests.ranks import SERVER, TIMEOUT_S, env_of

SCRIPT = """
import os, signal, sys
import torch, faccel

call, victim = sys.argv[1], int(sys.argv[2])

def end(rank):
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)

if call == "init":
    end(int(os.environ["RANK"]))
ctx = faccel.init(timeout_s=2)
faccel.barrier(ctx)
model = faccel.wrap(torch.nn.Linear(4, 1), ctx)
loss = model(torch.ones(2, 4)).mean()
if call == "with":
    with ctx:
        end(ctx.rank)
        torch.distributed.all_reduce(torch.ones(2))
end(ctx.rank)
if call == "backward":
    faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
if call == "all_reduce":
    torch.distributed.all_reduce(torch.ones(2))
faccel.reduce(torch.ones(3), ctx)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_script(path, env, arguments, errors):
    torch.set_num_threads(1)
    os.environ.update(env)
    os.dup2(errors.fileno(), 2)
    errors.close()
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    except Exception as error:
        # as the interpreter does; multiprocessing would print a traceback instead
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stderr.flush()
    os._exit(1)


def run_two_ranks(path, call, victim):
    """Run the script; return what each rank printed. Rank 0 serves the store."""
    port, processes = free_port(), []
    for rank in range(2):
        env = env_of(rank, 2, port)
        del env["TORCHELASTIC_USE_AGENT_STORE"]
        receiver, sender = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=run_script, args=(path, env, (call, str(victim)), sender))
        process.start()
        sender.close()
        processes.append((process, os.fdopen(os.dup(receiver.fileno()))))
    errors = []
    for _, stream in processes:
        with stream:
            errors.append(stream.read())
    for process, _ in processes:
        process.join(TIMEOUT_S)
    codes = [process.exitcode for process, _ in processes]
    expected = [1, 1]
    expected[victim] = -signal.SIGKILL
    assert codes == expected, errors
    return errors


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return str(path)


CASES = [("all_reduce", 0)]
for case in itertools.product(("backward", "reduce", "all_reduce", "with"), (0, 1)):
    if case not in CASES:
        CASES.append(pytest.param(*case, marks=pytest.mark.slow))


@pytest.mark.parametrize(("call", "victim"), CASES)
def test_a_killed_rank_is_named_in_five_lines(script, call, victim):
    errors = run_two_ranks(script, call, victim)
    survivor = 1 - victim
    lines = errors[survivor].splitlines()
    assert len(lines) <= 5, errors
    assert all(line.startswith(f"[rank{survivor}]: ") for line in lines)
    assert lines[0].startswith(f"[rank{survivor}]: RankFailedError: ")
    assert f"rank {victim}: no status" in lines[0]
    number = 1 + SCRIPT.splitlines().index(
        {
            "backward": "    faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)",
            "reduce": "faccel.reduce(torch.ones(3), ctx)",
            "all_reduce": "    torch.distributed.all_reduce(torch.ones(2))",
            "with": "        torch.distributed.all_reduce(torch.ones(2))",
        }[call]
    )
    assert f"train.py:{number}" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_before_init_is_named_without_frames_of_c10d(script, victim):
    errors = run_two_ranks(script, "init", victim)[1 - victim]
    for text in ("frame #", "c10d", "process_groups.py"):
        assert text not in errors, errors
    reason = ["rank 0, or the launcher, did not start", "1 of 2 ranks started: 0"][victim]
    assert reason in errors
