"""Ctrl-C, as a terminal sends it: to every process."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from tests.ranks import env_of, hosted_store

LOOP = """
import faccel, torch
from torch.utils.data import DataLoader

{begin}
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
BEGIN = {"with": "with faccel.init() as ctx:", "plain": "ctx = faccel.init()\nif True:"}


def start(script, world_size, store):
    base = os.environ | {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=base | (env_of(rank, world_size, store.port) if world_size > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("begin", BEGIN)
@pytest.mark.parametrize("world_size", [1, 2])
def test_ctrl_c_is_one_line_and_a_non_zero_exit(tmp_path, world_size, begin, workers):
    script = tmp_path / "loop.py"
    # with workers an epoch is long: Python loses a Ctrl-C that comes while it forks one
    script.write_text(
        LOOP.format(begin=BEGIN[begin], workers=workers, rows=16000 if workers else 64)
    )
    store = hosted_store()
    ranks = start(script, world_size, store)
    for rank in ranks:
        assert rank.stdout.readline() == "running\n", rank.stderr.read()
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGINT)
    try:
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # where it has not ended, it would run for ever
    assert errors == ["interrupted\n"] + [""] * (world_size - 1)
    assert [rank.returncode for rank in ranks] == [-signal.SIGINT] * world_size


FAILS = """
import atexit, faccel, torch

atexit.register(print, "goodbye", flush=True)
ctx = faccel.init(timeout_s=20)
if ctx.rank == 1:
    raise ValueError("bad sample")
faccel.reduce(torch.ones(3), ctx)
"""


def test_an_exception_ends_every_rank_with_exit_code_1_and_says_where_it_came_from(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    store = hosted_store()
    ranks = start(script, 2, store)
    out, errors = zip(*[rank.communicate(timeout=60) for rank in ranks], strict=True)
    assert [rank.returncode for rank in ranks] == [1, 1], errors
    assert out == ("goodbye\n", "goodbye\n")  # exit handlers run
    assert "ValueError: bad sample" in errors[1]
    assert "rank 1: raised ValueError: bad sample" in errors[0]
    assert "terminate called" not in "".join(errors)


def test_a_busy_port_is_an_error_on_every_rank(tmp_path):
    """Whatever listens there, the rank that would serve the store says so, and the others do not wait for ever."""
    script = tmp_path / "busy.py"
    script.write_text("import faccel\nfaccel.init()\n")  # its timeout is ten minutes
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(8)
        env = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(other.getsockname()[1]),
            "WORLD_SIZE": "2",
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script)],
                env=os.environ
                | env
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    assert all("WorldError: rank" in error and "free `MASTER_PORT`" in error for error in errors)
    assert "address already in use" in errors[0]
    assert "is not a PyTorch store" in errors[1]
