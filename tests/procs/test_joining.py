"""Machines that meet before a launch, each a launcher of its own on this one."""

import os
import socket
import subprocess
import sys

import pytest

from faccel.errors import LaunchError
from faccel.launching.slurm import within_slurm
from faccel.launching.spec import LaunchSpec

SCRIPT = """
import sys, faccel
with faccel.init() as ctx:
    place = ctx.topology
    sys.stdout.write(f"rank {ctx.rank} of {ctx.world_size}, machine {place.node_rank} of {place.num_nodes}\\n")
    sys.stdout.flush()
    faccel.barrier(ctx)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(*words, **env):
    command = [sys.executable, "-m", "faccel", "launch", "--cpu", *words]
    return subprocess.Popen(
        command, env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


def ends(*processes):
    return [(*process.communicate(timeout=100), process.returncode) for process in processes]


@pytest.mark.slow
def test_who_is_here_and_who_is_missed_where_nobody_else_comes(script, port):
    meeting = (
        "--nnodes",
        "3",
        "--main-address",
        "127.0.0.1",
        "--main-port",
        port,
        "--join-timeout",
        "7",
    )
    two, one = ends(
        start(*meeting, "--node-rank", "2", script), start(*meeting, "--node-rank", "0", script)
    )
    me = socket.gethostname()
    for out, said, code in (two, one):
        assert (out, code, "Traceback" in said) == ("", 1, False), said
        assert f"2 of 3 nodes joined: 0 ({me}), 2 ({me}); missing: 1 at 127.0.0.1:{port}" in said
    missing = ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--join-timeout", "3")
    (out, said, code), = ends(start(*missing, script))  # fmt: skip
    assert (out, code, said.count("\n")) == ("", 1, 2), said
    assert f"1 of 2 nodes joined: 0 ({me}); missing: 1" in said


def test_nobody_answers_where_they_meet(script, port):
    meeting = (
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--main-address",
        "127.0.0.1",
        "--main-port",
        port,
    )
    (out, said, code), = ends(start(*meeting, "--join-timeout", "2", script))  # fmt: skip
    assert (out, code, said.count("\n")) == ("", 1, 2), said
    assert f"no answer from 127.0.0.1:{port} within 2 s" in said


def test_machines_of_a_rendezvous_join_and_train_together(script, port):
    words = ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", script)
    done = ends(start(*words), start(*words))
    assert [code for _, _, code in done] == [0, 0], done
    assert sorted(out for out, _, _ in done) == [
        f"rank {n} of 2, machine {n} of 2\n" for n in range(2)
    ]


def slurm(node, *, tasks="1(x2)", count=2, local=0):
    return {"SLURM_STEP_NUM_TASKS": str(count), "SLURM_PROCID": str(node), "SLURM_LOCALID": str(local),
            "SLURM_NODEID": str(node), "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3",
            "SLURM_STEP_NODELIST": "localhost,other", "SLURM_STEP_TASKS_PER_NODE": tasks}  # fmt: skip


def test_a_task_of_slurm_per_machine_is_a_launcher_of_its_machine(script):
    done = ends(*(start("--nproc", "1", script, **slurm(node)) for node in range(2)))
    assert [code for _, _, code in done] == [0, 0], done
    assert sorted(out for out, _, _ in done) == [
        f"rank {n} of 2, machine {n} of 2\n" for n in range(2)
    ]


def test_what_a_task_of_slurm_starts():
    asked = LaunchSpec(command=("x.py",), nproc=4)
    found = within_slurm(asked, slurm(1), has_nproc=True)
    assert (found.nnodes, found.node_rank, found.main_address, found.nproc) == (
        "2",
        1,
        "localhost",
        4,
    )
    assert found.main_port == within_slurm(asked, slurm(0), has_nproc=True).main_port
    several = slurm(0, tasks="2(x2)", count=4)
    assert within_slurm(asked, several, has_nproc=False) == LaunchSpec(command=("x.py",), nproc=1)
    with pytest.raises(LaunchError, match="--ntasks-per-node=1"):
        within_slurm(asked, several, has_nproc=True)
    assert within_slurm(asked, {"SLURM_STEP_NUM_TASKS": "1"}, has_nproc=True) == asked
    assert within_slurm(asked, {}, has_nproc=True) == asked


@pytest.mark.parametrize(("words", "said"), [
    (("--nnodes", "0"), "--nnodes 0"), (("--nnodes", "4:1", "--rdzv-endpoint", "h:1"), "--nnodes 4:1"),
    (("--nnodes", "2", "--main-address", "h", "--node-rank", "2"), "use 0 to 1"),
    (("--nnodes", "2", "--rdzv-endpoint", "h:x"), "write `--rdzv-endpoint host:29400`"),
    (("--nnodes", "2", "--rdzv-endpoint", "h:1", "--node-rank", "1"), "excludes `--main-address`"),
    (("--nnodes", "1:2", "--main-address", "h", "--node-rank", "1"), "add `--rdzv-endpoint HOST:PORT`"),
])  # fmt: skip
def test_what_cannot_be_asked_for(words, said, script):
    (out, text, code), = ends(start(*words, script))  # fmt: skip
    assert (out, code, "Traceback" in text) == ("", 2, False)
    assert said in text
