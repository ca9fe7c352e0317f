"""A launcher that is killed leaves no rank, whatever its ranks do, and no temporary folder."""

import contextlib
import ctypes
import multiprocessing
import os
import pathlib
import select
import signal
import subprocess
import sys

import pytest

import faccel
from faccel.runtime.private_folder import private_folder
from tests.command_line import Command
from tests.ranks import SERVER
from tests.sockets import tree

FORK = multiprocessing.get_context("fork")
# `PyDLL` holds the interpreter's lock during the call: no Python code of the process runs.
SCRIPT = """
import ctypes, os, sys, time

def report():
    sys.stdout.write(f"{os.getpid()}\\n")
    sys.stdout.flush()

action, rank = sys.argv[1], os.environ["RANK"]
if action == "in a C call":
    report()
    ctypes.PyDLL(None).sleep(600)
import faccel
if action == "in init":
    report()
    if rank == "1":
        time.sleep(600)
ctx = faccel.init()
if action == "in a collective":
    report()
    if rank == "1":
        time.sleep(600)
faccel.barrier(ctx)
"""


def check_ended(pids, kill):
    """Kill the launcher, and wait until its ranks have ended."""
    ranks = [os.pidfd_open(pid) for pid in pids]
    try:
        kill()
        for rank in ranks:
            # It becomes readable when the process ends; the timeout is a safety net.
            assert select.select([rank], [], [], 60)[0], "a rank runs without its launcher"
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(rank, signal.SIGKILL)
            os.close(rank)


@pytest.mark.parametrize(
    "action",
    [
        "in a C call",
        pytest.param("in init", marks=pytest.mark.slow),
        pytest.param("in a collective", marks=pytest.mark.slow),
    ],
)
def test_the_ranks_of_a_killed_launcher_end(tmp_path, action):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = Command("launch", "--cpu", "--nproc", "2", str(script), action)
    pids = [int(command.stdout.readline()) for _ in range(2)]
    check_ended(pids, command.kill)
    command.wait()


def test_what_a_shell_script_of_a_killed_launcher_started_ends_and_its_folder_is_removed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    shell = ["sh", "-c", '"$@"; true', "sh", sys.executable, str(script), "in a C call"]
    command = Command("launch", "--cpu", "--nproc", "2", "--no-python", *shell)
    pids = [int(command.stdout.readline()) for _ in range(2)]
    folders, guards = [], []
    for pid in tree(command.pid):
        words = pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if words[-3].startswith("_FACCEL_LAUNCH_ID"):
            guards.append(pid)
            folders.append(words[-2])
    check_ended([*pids, *guards], command.kill)
    command.wait()
    assert len(guards) == 1
    assert not os.path.exists(folders[0])


def report_and_wait(ctx, descriptor):
    os.write(descriptor, f"{os.getpid()}\n".encode())
    ctypes.PyDLL(None).sleep(600)


def launch_from_notebook(pipe):
    faccel.notebook_launch(report_and_wait, pipe.fileno(), num_processes=2)


def test_the_ranks_of_a_killed_notebook_end():
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=launch_from_notebook, args=(sender,))
    process.start()
    sender.close()
    with os.fdopen(os.dup(receiver.fileno())) as pids:
        check_ended([int(pids.readline()) for _ in range(2)], process.kill)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["in the function", "in an import"])
def test_the_ranks_of_a_killed_script_end(tmp_path, action):
    script = tmp_path / "script.py"
    script.write_text(
        "import faccel, sys\n"
        "from tests.procs.test_orphans import report_and_wait\n"
        'if __name__ == "__main__":\n'
        "    faccel.launch(report_and_wait, 1, num_processes=2)\n"
        "elif sys.argv[1] == 'in an import':\n"
        "    report_and_wait(None, 1)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    process = subprocess.Popen(
        [sys.executable, str(script), action],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )
    with process:
        check_ended([int(process.stdout.readline()) for _ in range(2)], process.kill)


def make_and_end():
    with private_folder("faccel-launch-"):
        os._exit(0)  # as a killed process: without the end of the block


def test_the_next_launch_removes_the_folders_of_killed_ones_only(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    foreign, linked = tmp_path / "faccel-launch-notes", tmp_path / "linked"
    for folder in (foreign, linked):
        folder.mkdir()
    (linked / "owner.lock").touch()
    (tmp_path / "faccel-launch-link").symlink_to(linked)
    process = FORK.Process(target=make_and_end)
    process.start()
    process.join()
    others = {"faccel-launch-notes", "faccel-launch-link", "linked"}
    (killed,) = set(os.listdir(tmp_path)) - others
    assert killed.startswith("faccel-launch-")
    with private_folder("faccel-launch-") as running:
        with private_folder("faccel-launch-") as second:
            names = {os.path.basename(running), os.path.basename(second)}
            assert os.stat(running).st_mode & 0o777 == 0o700
            assert set(os.listdir(tmp_path)) == others | names
        assert os.path.exists(running)
    assert set(os.listdir(tmp_path)) == others
    assert (linked / "owner.lock").exists()
