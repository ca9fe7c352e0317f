"""A process killed at any write, fsync, rename, ... of a save: the old or the new state loads.

strace kills it at the n-th system call of a kind, including those of native code.
"""

import os
import re
import select
import shutil
import subprocess
import sys

import pytest
import torch

import faccel
from faccel.testing import fake_context
from tests.ranks import SERVER, env_of, hosted_store

ONE = fake_context(0, 1)
CALLS = ("write", "fsync", "rename", "mkdir", "unlink", "unlinkat", "rmdir")


def state(value):
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    return {
        "model": model,
        "x": torch.full((1000,), float(value)),
        "n": value,
        "rng": faccel.rng_state(ONE),
    }


def check(path, allowed):
    """Load; check that all values are from one save; return which."""
    loaded = faccel.load(state(0), path, ONE)
    value = loaded["n"]
    assert value in allowed
    assert loaded["x"].unique().tolist() == [float(value)]
    assert all((param == value).all() for param in loaded["model"].parameters())
    return value


def writer(rank, world_size, port, pipe, path, background):
    torch.set_num_threads(1)
    ctx = faccel.init(env=env_of(rank, world_size, port) if world_size > 1 else {})
    faccel.save(state(1), path, ctx, step=1)
    pipe.send("ready")
    pipe.recv()
    faccel.save(state(2), path, ctx, step=2, keep=1, background=background)
    faccel.latest(path, ctx)
    pipe.send("done")
    os._exit(0)


def attach(pid, call, number, log):
    tracer = subprocess.Popen(
        ["strace", "-f", "-p", str(pid), "-o", log, "-e", f"trace={call}", "-e",
         f"inject={call}:signal=SIGKILL:when={number}"],
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    line = tracer.stderr.readline()
    if "attached" not in line:
        tracer.kill()
        pytest.skip(f"strace cannot attach here: {line.strip()}")
    return tracer


def save_until(path, world_size, victim, background, call, number):
    """Save once; return whether the victim was killed."""
    store = hosted_store()
    ranks, tracer = [], None
    try:
        for rank in range(world_size):
            pipe, child_pipe = SERVER.Pipe()
            process = SERVER.Process(
                target=writer, args=(rank, world_size, store.port, child_pipe, path, background)
            )
            process.start()
            child_pipe.close()
            ranks.append((process, pipe))
        for _, pipe in ranks:
            assert pipe.recv() == "ready"
        tracer = attach(ranks[victim][0].pid, call, number, f"{path}.strace")
        for _, pipe in ranks:
            pipe.send("go")
        ready = select.select([ranks[victim][1]], [], [], 60)[0]
        assert ready, f"neither killed nor done: {call} {number}"
        try:
            killed = ranks[victim][1].recv() != "done"
        except EOFError:
            killed = True
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()
        if tracer is not None:
            tracer.communicate(timeout=30)
    return killed


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("strace") is None, reason="no strace here (Debian: apt-get install strace)"
)
@pytest.mark.parametrize("background", [False, True], ids=["sync", "background"])
@pytest.mark.parametrize(
    ("world_size", "victim"), [(1, 0), (2, 0), (2, 1)], ids=["1 rank", "rank 0 of 2", "rank 1 of 2"]
)
def test_killed_at_every_call_of_a_save(tmp_path, world_size, victim, background):
    kills, seen = 0, set()
    for call in CALLS:
        for number in range(1, 60):
            path = str(tmp_path / f"{call}-{number}")
            killed = save_until(path, world_size, victim, background, call, number)
            kills += killed
            seen.add(check(path, {1, 2} if killed else {2}))
            faccel.save(state(3), path, ONE, step=3)  # the killed writer has released the lock
            assert check(path, {3}) == 3
            assert not [name for name in os.listdir(path) if name.startswith(".tmp-")]
            shutil.rmtree(path)
            if not killed:
                break
        else:
            raise AssertionError(f"a save has more than 60 {call}s")
    assert kills >= (12 if victim == 0 else 2)
    assert seen == {1, 2}


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("strace") is None, reason="no strace here (Debian: apt-get install strace)"
)
def test_all_files_are_fsynced_before_the_folder_is_renamed(tmp_path):
    """A kill cannot show that, because the kernel still writes; the order of calls can."""
    log, path = str(tmp_path / "log"), str(tmp_path / "runs")
    code = f"""
import faccel, torch
from faccel.testing import fake_context
faccel.save({{"x": torch.ones(9)}}, {path!r}, fake_context(0, 1), step=1)
"""
    trace = ["strace", "-f", "-y", "-o", log, "-e", "trace=write,fsync,rename"]
    command = [*trace, sys.executable, "-c", code]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with open(log) as file:
        lines = [line.split(" ", 1)[1].strip() for line in file if path in line]
    calls = [re.sub(r"-[0-9a-f]{8}", "-X", line) for line in lines]
    synced = [match[1] for line in calls if (match := re.match(r"fsync\(\d+<([^>]*)>", line))]
    temporary = f"{path}/.tmp-step-1-X"
    shard = f"{temporary}/shard-00001-model-00001-of-00001.safetensors"
    manifest = f"{temporary}/manifest.json"
    assert synced[-4:] == [shard, manifest, temporary, path]
    renamed = next(i for i, line in enumerate(calls) if line.startswith("rename("))
    assert [line.startswith("fsync") for line in calls[renamed - 1 :]] == [True, False, True]
    for name in (shard, manifest):
        calls_of_file = [(i, line) for i, line in enumerate(calls) if f"<{name}>" in line]
        last_write = max(i for i, line in calls_of_file if line.startswith("write("))
        assert last_write < min(i for i, line in calls_of_file if line.startswith("fsync("))
