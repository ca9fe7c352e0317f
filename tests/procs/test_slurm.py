"""A SLURM of one machine with daemons of its own: `srun python script.py` and `srun faccel launch`."""

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
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def has_idle_node(env):
    said = subprocess.run(
        ["sinfo", "-h", "-o", "%T"], env=env, capture_output=True, text=True, check=False
    )
    return said.stdout.strip() == "idle"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which `srun` finds the daemons."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"no SLURM here: needs root and {', '.join(missing) or 'nothing else'}")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(host=host, folder=folder, ports=free_ports(2), cores=os.cpu_count())
    (folder / "slurm.conf").write_text(text)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    kept = {
        "socket": "munge.socket",
        "key-file": "key",
        "pid-file": "munged.pid",
        "log-file": "log",
        "seed-file": "seed",
    }
    munge = ["munged", "--force", *(f"--{option}={folder / name}" for option, name in kept.items())]
    try:
        for command in (munge, ["slurmctld", "-c"], ["slurmd", "-c"]):
            subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=30)
        deadline = time.monotonic() + 60
        while not has_idle_node(env) and time.monotonic() < deadline:
            time.sleep(0.2)
        if not has_idle_node(env):
            pytest.skip(f"SLURM has no node here: {(folder / 'slurmctld.log').read_text()[-300:]}")
        yield env
    except subprocess.CalledProcessError as error:
        pytest.skip(f"SLURM's daemons do not start here: {error.stderr}")
    finally:
        for file in folder.glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)


def srun(env, *words):
    out = subprocess.run(["srun", "--overcommit", *words], env=env | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
                         capture_output=True, text=True, check=False, timeout=200)  # fmt: skip
    assert out.returncode == 0, out.stderr[-2000:]
    return out.stdout.splitlines()


@pytest.mark.slow
def test_two_tasks_are_two_ranks(slurm):
    lines = srun(slurm, "-n2", sys.executable, "examples/digits.py")
    assert lines[-1] == "accuracy 0.9778"
    assert len(lines) == 13


@pytest.mark.slow
def test_one_task_that_launches_two_ranks_is_two_ranks(slurm):
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
    assert srun(slurm, "-n1", *words)[-1] == "accuracy 0.9778"
