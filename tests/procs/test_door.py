"""What a launch on one node listens on, and what a client without a password can do there."""

import base64
import ipaddress
import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys
from datetime import datetime, timedelta, timezone

import pytest
from torch.distributed.elastic.rendezvous import RendezvousStateError
from torch.distributed.elastic.rendezvous import dynamic_rendezvous as torch_code

import faccel
from faccel.launching.torch_rendezvous import check_state
from tests.command_line import Command, run_command
from tests.ranks import SERVER, TIMEOUT_S
from tests.sockets import listening_tree

ROOT = str(pathlib.Path(__file__).parents[2])


def check_loopback(addresses):
    """Check that the sockets of the store and of gloo are there, and all are on loopback."""
    assert len(addresses) >= 3
    beyond = [host for host, _ in addresses if not ipaddress.ip_address(host).is_loopback]
    assert beyond == [], addresses


def sockets_of_launch(ctx):
    """Return the addresses on which the launcher of this rank and its ranks listen."""
    faccel.barrier(ctx)  # all ranks are connected
    addresses = sorted(listening_tree(os.getppid()))
    faccel.barrier(ctx)
    return addresses


@pytest.mark.slow
def test_a_launch_on_one_node_listens_on_loopback_only(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import json, faccel\n"
        "from tests.procs.test_door import sockets_of_launch\n"
        "with faccel.init() as ctx:\n"
        "    addresses = sockets_of_launch(ctx)\n"
        "    if ctx.is_main:\n"
        "        print(json.dumps(addresses))\n"
    )
    words = ["launch", "--cpu", "--nproc", "2", str(script)]
    code, out, errors = run_command(*words, PYTHONPATH=ROOT)
    assert code == 0, errors
    check_loopback(json.loads(out))


def launch_from_notebook(pipe):
    pipe.send(faccel.notebook_launch(sockets_of_launch, num_processes=2)[0])


def test_a_notebook_launch_listens_on_loopback_only():
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=launch_from_notebook, args=(sender,))
    process.start()
    sender.close()
    check_loopback(receiver.recv())
    process.join()


@pytest.mark.slow
def test_a_launch_from_a_script_listens_on_loopback_only(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, faccel\n"
        "from tests.procs.test_door import sockets_of_launch\n"
        'if __name__ == "__main__":\n'
        "    print(json.dumps(faccel.launch(sockets_of_launch, num_processes=2)[0]))\n"
    )
    out = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT_S,
        env=os.environ | {"PYTHONPATH": ROOT},
    )
    check_loopback(json.loads(out.stdout))


@pytest.mark.slow
def test_faccel_test_listens_on_loopback_only():
    command = Command("test", "--cpu", "--nproc", "2", "--json")
    addresses = set()
    while command.is_running():
        addresses |= listening_tree(command.pid)
    code, out, errors = command.wait()
    assert (code, json.loads(out)["failed"]) == (0, 0), errors
    check_loopback(addresses)


class Payload:
    """Creates a file while it is unpickled."""

    def __init__(self, path):
        self._path = str(path)

    def __reduce__(self):
        return os.mknod, (self._path,)


# Attempt 0 writes a pickle into all keys of all stores, also into that of PyTorch's rendezvous,
# whose name it takes from its environment. The agent reads its state before it starts attempt 1.
ATTACK = """
import os, sys
import torch.distributed as dist
from tests.sockets import listening, listening_tree

payload, target = sys.argv[1:]
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    num_stores = 0
    for host, port in listening(os.getppid()):
        try:
            store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        except dist.DistError:
            continue
        num_stores += 1
        for key in [*store.list_keys(), "torch.rendezvous." + os.environ["TORCHELASTIC_RUN_ID"]]:
            store.set(key.removeprefix("/"), payload)
    sys.exit(num_stores)
print(os.path.exists(target))
"""


def attack(tmp_path, *options):
    """Return the exit code, the output and the errors of a launch whose rank attacks the stores."""
    script, target = tmp_path / "attack.py", tmp_path / "executed"
    script.write_text(ATTACK)
    payload = base64.b64encode(pickle.dumps(Payload(target))).decode()
    words = ["launch", "--cpu", "--nproc", "1", "--max-restarts", "1", *options]
    result = run_command(*words, str(script), payload, str(target), PYTHONPATH=ROOT)
    assert not target.exists()
    return result


@pytest.mark.slow
def test_no_process_unpickles_what_a_client_writes_to_the_stores_of_one_node(tmp_path):
    code, out, errors = attack(tmp_path)
    assert (code, out) == (0, "False\n"), errors
    assert "(exit code 1)" in errors  # there was a store to attack


@pytest.mark.slow
def test_an_agent_of_an_elastic_launch_refuses_a_foreign_pickle(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code, out, errors = attack(tmp_path, "--nnodes", "1:1", "--rdzv-endpoint", f"127.0.0.1:{port}")
    assert (code, out) == (1, ""), errors
    assert "the state of the rendezvous contains posix.mknod" in errors
    assert "Traceback" not in errors


def test_only_the_state_of_a_rendezvous_is_unpickled(tmp_path):
    node = torch_code._NodeDesc("host", 1, 2)
    state = torch_code._RendezvousState()
    state.participants[node] = 0
    state.wait_list.add(node)
    state.deadline = datetime.now(timezone(timedelta(hours=1)))
    state.last_heartbeats[node] = datetime.now()
    for protocol in range(pickle.DEFAULT_PROTOCOL, pickle.HIGHEST_PROTOCOL + 1):
        check_state(pickle.dumps(state, protocol))
        with pytest.raises(RendezvousStateError, match=r"posix\.mknod"):
            check_state(pickle.dumps({node: Payload(tmp_path / "x")}, protocol))
    assert list(tmp_path.iterdir()) == []
    for damaged in (b"", b"no pickle", pickle.dumps(state)[:-9]):
        with pytest.raises(RendezvousStateError, match="is damaged"):
            check_state(damaged)
