"""The rendezvous of nodes before a launch; each node is a launcher on this host."""

import socket

import pytest

from faccel.errors import LaunchError
from faccel.launching.slurm import within_slurm
from faccel.launching.spec import LaunchSpec
from tests.command_line import Command, run_command

SCRIPT = """
import os, sys
env = os.environ
rank = f"rank {env['RANK']} of {env['WORLD_SIZE']}"
sys.stdout.write(f"{rank}, node {env['GROUP_RANK']} of {env['GROUP_WORLD_SIZE']}\\n")
"""
TRAINING = """
import sys, faccel
with faccel.init() as ctx:
    rank = f"rank {ctx.rank} of {ctx.world_size}"
    sys.stdout.write(f"{rank}, node {ctx.node_rank} of {ctx.num_nodes}\\n")
    sys.stdout.flush()
    faccel.barrier(ctx)
"""
EXPECTED = ["rank 0 of 2, node 0 of 2\n", "rank 1 of 2, node 1 of 2\n"]


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


def launch(*words, env=None):
    return Command("launch", "--cpu", "--nproc", "1", *words, env=env)


@pytest.mark.slow  # waits for two timeouts
def test_the_error_lists_the_nodes_that_joined_and_those_that_are_missing(script, port):
    options = ["--nnodes", "3", "--main-address", "127.0.0.1", "--main-port", port]
    options += ["--join-timeout", "7"]
    commands = [launch(*options, "--node-rank", rank, script) for rank in ("2", "0")]
    host = socket.gethostname()
    for command in commands:
        code, out, errors = command.wait()
        assert (code, out, "Traceback" in errors) == (1, "", False), errors
        joined = f"2 of 3 nodes joined: 0 ({host}), 2 ({host}); missing: 1"
        assert f"{joined} at 127.0.0.1:{port}" in errors
    options = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--join-timeout", "3"]
    code, out, errors = launch(*options, script).wait()
    assert (code, out, errors.count("\n")) == (1, "", 2), errors
    assert f"1 of 2 nodes joined: 0 ({host}); missing: 1" in errors


def test_a_rendezvous_without_a_server_is_an_error_within_the_timeout(script, port):
    options = ["--nnodes", "2", "--node-rank", "1", "--main-address", "127.0.0.1"]
    options += ["--main-port", port, "--join-timeout", "1"]
    code, out, errors = run_command("launch", "--cpu", *options, script)
    assert (code, out, errors.count("\n")) == (1, "", 2), errors
    assert f"no answer from 127.0.0.1:{port} within 1 s" in errors


def test_an_address_of_another_host_is_an_error_with_a_fix_that_works(script, port):
    options = ["--nnodes", "2", "--main-port", port]
    address = ["--node-rank", "0", "--main-address", "192.0.2.1"]  # reserved for documentation
    code, out, errors = launch(*options, *address, script).wait()
    assert (code, out, "Traceback" in errors) == (2, "", False), errors
    assert "not one of this node. Got 192.0.2.1: Cannot assign requested address" in errors
    assert "`--main-address 0.0.0.0` on this node only" in errors
    commands = [
        launch(*options, "--node-rank", str(rank), "--main-address", host, script)
        for rank, host in enumerate(("0.0.0.0", "127.0.0.1"))
    ]
    results = [command.wait() for command in commands]
    assert [code for code, _, _ in results] == [0, 0], results
    assert [out for _, out, _ in results] == EXPECTED


def test_two_nodes_of_an_elastic_rendezvous_start_one_world(script, port):
    options = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    commands = [launch(*options, script) for _ in range(2)]
    results = [command.wait() for command in commands]
    assert [code for code, _, _ in results] == [0, 0], results
    assert sorted(out for _, out, _ in results) == EXPECTED


def slurm_environment(node, *, tasks="1(x2)", count=2, local=0):
    return {
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_PROCID": str(node),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "3",
        "SLURM_STEP_NODELIST": "localhost,other",
        "SLURM_STEP_TASKS_PER_NODE": tasks,
    }


@pytest.mark.slow
def test_a_slurm_task_per_node_launches_the_ranks_of_its_node(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(TRAINING)
    commands = [launch(str(path), env=slurm_environment(node)) for node in range(2)]
    results = [command.wait() for command in commands]
    assert [code for code, _, _ in results] == [0, 0], results
    assert sorted(out for _, out, _ in results) == EXPECTED


def test_the_launch_of_a_slurm_task_follows_from_its_step():
    spec = LaunchSpec(command=("x.py",), nproc=4)
    task = within_slurm(spec, slurm_environment(1), has_nproc=True)
    assert (task.nnodes, task.node_rank, task.main_address) == ("2", 1, "localhost")
    assert task.nproc == 4
    first = within_slurm(spec, slurm_environment(0), has_nproc=True)
    assert task.main_port == first.main_port
    several = slurm_environment(0, tasks="2(x2)", count=4)
    assert within_slurm(spec, several, has_nproc=False) == LaunchSpec(command=("x.py",), nproc=1)
    with pytest.raises(LaunchError, match="--ntasks-per-node=1"):
        within_slurm(spec, several, has_nproc=True)
    assert within_slurm(spec, {"SLURM_STEP_NUM_TASKS": "1"}, has_nproc=True) == spec
    assert within_slurm(spec, {}, has_nproc=True) == spec
