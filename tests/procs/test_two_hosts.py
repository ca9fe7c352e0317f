"""Two nodes: network namespaces with their host names, connected by a pair of virtual cards."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import accuracy_in_readme
from tests.procs.test_elastic import SCRIPT, launch
from tests.ranks import TIMEOUT_S

ROOT = pathlib.Path(__file__).parents[2]
NAMES = "127.0.0.1 localhost\n10.77.0.1 faccel-a\n10.77.0.2 faccel-b\n"


def shell(*commands):
    for command in commands:
        subprocess.run(command.split(), check=True, capture_output=True, text=True)


@pytest.fixture
def hosts():
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, iproute2 and unshare to make two hosts")
    tag = f"fc{os.getpid() % 10000}"
    spaces, cards = [f"{tag}a", f"{tag}b"], [f"{tag}va", f"{tag}vb"]
    try:
        shell(
            f"ip netns add {spaces[0]}",
            f"ip netns add {spaces[1]}",
            f"ip link add {cards[0]} type veth peer name {cards[1]}",
        )
        for number, (space, card) in enumerate(zip(spaces, cards, strict=True), start=1):
            shell(
                f"ip link set {card} netns {space}",
                f"ip -n {space} addr add 10.77.0.{number}/24 dev {card}",
                f"ip -n {space} link set {card} up",
                f"ip -n {space} link set lo up",
            )
            folder = pathlib.Path("/etc/netns", space)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(NAMES)
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"namespaces cannot be made here: {getattr(error, 'stderr', error)}")
    yield list(zip(spaces, cards, ("faccel-a", "faccel-b"), strict=True))
    for space in spaces:
        subprocess.run(["ip", "netns", "del", space], check=False, capture_output=True)
        shutil.rmtree(pathlib.Path("/etc/netns", space), ignore_errors=True)


def start(host, *words, **variables):
    space, card, name = host
    command = [
        "ip",
        "netns",
        "exec",
        space,
        "unshare",
        "--uts",
        "sh",
        "-c",
        'hostname "$0"; exec "$@"',
        name,
        sys.executable,
        "-m",
        "faccel",
        "launch",
        "--cpu",
        *words,
    ]
    variables = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": card, **variables}
    env = os.environ | {name: value for name, value in variables.items() if value is not None}
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def run(hosts, words):
    """Run on both hosts; `words(rank)` are the options of each. Return what they printed."""
    processes = [start(host, "--nproc", "1", *words(rank)) for rank, host in enumerate(hosts)]
    out = [process.communicate(timeout=TIMEOUT_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [
        errors[-2000:] for _, errors in out
    ]
    return [text.splitlines() for text, _ in out]


@pytest.mark.slow
def test_one_training_run_on_two_nodes(hosts):
    def words(rank):
        address = ["--main-address", "faccel-a", "--main-port", "29511"]
        return ["--nnodes", "2", "--node-rank", str(rank), *address, "examples/digits.py"]

    first, second = run(hosts, words)
    assert first[-1] == accuracy_in_readme()
    assert second == []


@pytest.mark.slow
def test_a_killed_rank_on_one_node_is_a_restart_on_both(hosts, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def words(rank):
        options = ["--nnodes", "2", "--rdzv-endpoint", "faccel-a:29512", "--max-restarts", "1"]
        return [*options, str(script), str(tmp_path / "runs"), "1"]

    printed = sorted(line for lines in run(hosts, words) for line in lines)
    uninterrupted = launch(script, tmp_path / "uninterrupted", 0)
    assert printed[0].endswith(" resumes after step 4")
    assert printed[1:] == [uninterrupted.stdout.strip()]


SOCKETS = """
import json, sys
import faccel
from tests.procs.test_door import sockets_of_launch

with faccel.init() as ctx:
    faccel.barrier(ctx)
    sys.stdout.write(json.dumps(sockets_of_launch(ctx)) + "\\n")
"""
RENDEZVOUS = {
    "static": lambda rank: ["--node-rank", str(rank), "--main-address", "faccel-a"],
    "elastic": lambda rank: ["--rdzv-endpoint", "faccel-a:29500"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RENDEZVOUS)
def test_two_nodes_listen_on_the_named_address_only(hosts, tmp_path, kind):
    script = tmp_path / "sockets.py"
    script.write_text(SOCKETS)
    printed = run(hosts, lambda rank: ["--nnodes", "2", *RENDEZVOUS[kind](rank), str(script)])
    first, second = ({tuple(pair) for pair in json.loads(lines[-1])} for lines in printed)
    # The store on the node that was named. The other ports are gloo's on the network card.
    assert ("10.77.0.1", 29500) in first
    assert {host for host, _ in first} == {"10.77.0.1"}
    assert {host for host, _ in second} == {"10.77.0.2"}


@pytest.mark.slow
def test_one_node_listens_on_loopback_also_if_its_name_has_another_address(hosts, tmp_path):
    script = tmp_path / "sockets.py"
    script.write_text(SOCKETS)
    process = start(hosts[0], "--nproc", "2", str(script), GLOO_SOCKET_IFNAME=None)
    out, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    addresses = [pair for line in out.splitlines() for pair in json.loads(line)]
    assert {host for host, _ in addresses} == {"127.0.0.1"}
