"""`srun python script.py` and `srun faccel launch` in a SLURM of one node, with private daemons."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.docs.pages import accuracy_in_readme
from tests.ranks import TIMEOUT_S

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = ("srun", "sinfo", "slurmctld", "slurmd", "munged")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]


def has_idle_node(env):
    out = subprocess.run(
        ["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True, check=False
    )
    return out.stdout.strip() == "idle"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Start the daemons; return the environment with which `srun` uses them."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"SLURM needs root and {', '.join(PROGRAMS)}; missing: {missing}")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(host=host, folder=folder, ports=free_ports(2), cores=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    files = {
        "socket": "munge.socket",
        "key-file": "key",
        "pid-file": "munged.pid",
        "log-file": "log",
        "seed-file": "seed",
    }
    munge = [
        "munged",
        "--force",
        *(f"--{option}={folder / name}" for option, name in files.items()),
    ]
    try:
        for command in (munge, ["slurmctld", "-c"], ["slurmd", "-c"]):
            subprocess.run(
                command, env=env, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        deadline = time.monotonic() + TIMEOUT_S
        while not has_idle_node(env) and time.monotonic() < deadline:
            time.sleep(0.2)
        if not has_idle_node(env):
            pytest.skip(f"SLURM has no idle node: {(folder / 'slurmctld.log').read_text()[-300:]}")
        yield env
    except subprocess.CalledProcessError as error:
        pytest.skip(f"a daemon of SLURM does not start: {error.stderr}")
    finally:
        for file in folder.glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)


def srun(env, *words):
    out = subprocess.run(
        ["srun", "--overcommit", *words],
        env=env | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert out.returncode == 0, out.stderr[-2000:]
    return out.stdout.splitlines()


@pytest.mark.slow
def test_two_tasks_are_two_ranks(slurm):
    lines = srun(slurm, "-n2", sys.executable, "examples/digits.py")
    assert lines[-1] == accuracy_in_readme()
    assert len(lines) == 13


@pytest.mark.slow
def test_one_task_with_faccel_launch_is_two_ranks(slurm):
    words = [
        sys.executable,
        "-m",
        "faccel",
        "launch",
        "--cpu",
        "--nproc",
        "2",
        "examples/digits.py",
    ]
    assert srun(slurm, "-n1", *words)[-1] == accuracy_in_readme()
