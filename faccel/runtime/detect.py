"""From the environment to a `Topology`: one pure function per launcher, and a rule for nesting."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress

import attrs

from faccel.checks import MAX_COUNT
from faccel.context import Topology
from faccel.errors import TopologyError, short_repr, short_text

Env = Mapping[str, str]
_LOCALHOST = "127.0.0.1"
_MAX_PORT = 65535


@attrs.frozen
class _Ranks:
    """Rank and world size of a process, in the world and on its node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def detect(env: Env) -> Topology:
    """Return the topology that the launcher set in the environment, or a world of one process.

    Launchers may be nested, as in `srun torchrun` or `mpirun` in a SLURM job. The inner launcher
    determines the topology, if the outer one started it once, or once per node.

    Effects: pure.

    Args:
        env: The environment. An empty value counts as unset, as in a shell.

    Raises:
        TopologyError: The variables of a launcher are incomplete, or two launchers disagree.

    Examples:
        >>> detect({}).world_size
        1
    """
    # An empty variable counts as unset: launch scripts clear variables that way.
    env = {key: value for key, value in env.items() if value}
    topologies: list[Topology] = []
    # All of them, also after a match: nested launchers set the variables of both.
    for detector in DETECTORS:
        topology = detector(env)
        if topology is not None:
            topologies.append(topology)
    if not topologies:
        return Topology()
    # The inner launcher starts the most processes. `max` returns the first of equal ones.
    inner = max(topologies, key=lambda topology: topology.world_size)
    for other in topologies:
        is_same = (other.rank, other.world_size) == (inner.rank, inner.world_size)
        is_outer = other.world_size in (1, inner.num_nodes)
        if not is_same and not is_outer:
            raise _disagreement(inner, other)
    return inner


def _disagreement(inner: Topology, other: Topology) -> TopologyError:
    described = [f"{t.source}: rank {t.rank} of {t.world_size}" for t in (inner, other)]
    return TopologyError(
        f"{inner.source} and {other.source} disagree about the world size",
        got=", ".join(described),
        fix=f"start one process per node with {other.source}, or use only one launcher",
    )


def detect_torchrun(env: Env) -> Topology | None:
    """Read the variables of torchrun; None if `RANK` and `WORLD_SIZE` are both unset.

    Effects: pure.

    Raises:
        TopologyError: Only some of the variables are set.
    """
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    if _is_kubeflow(env):  # the same two variables, without the local ones
        return None
    keys = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    _check_complete(env, "torchrun", (*keys, "MASTER_ADDR", "MASTER_PORT"))
    node = None
    # A script that sets the variables by hand usually leaves out the groups.
    if "GROUP_WORLD_SIZE" in env:
        node = (_int(env, "GROUP_RANK"), _int(env, "GROUP_WORLD_SIZE"))
    # torchrun always sets both, so nothing is derived.
    address = (env["MASTER_ADDR"], _port(env))
    topology = _topology("torchrun", _ranks(env, "torchrun", keys), address, node)
    return attrs.evolve(
        topology,
        attempt=_int(env, "TORCHELASTIC_RESTART_COUNT", 0),
        store_is_hosted=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def detect_slurm(env: Env) -> Topology | None:
    """Read the variables that `srun` sets for each task of a step.

    None outside of a step: in `salloc`, and in the batch script itself.

    Effects: pure.

    Raises:
        TopologyError: Only some of the variables are set.
    """
    if "SLURM_STEP_NUM_TASKS" not in env:
        return None
    _check_complete(
        env,
        "srun",
        ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID"),
    )
    node_rank = _int(env, "SLURM_NODEID")
    # Old versions of SLURM set only the variables of the job.
    num_tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or _LOCALHOST
    ranks = _Ranks(
        rank=_int(env, "SLURM_PROCID"),
        world_size=_int(env, "SLURM_STEP_NUM_TASKS"),
        local_rank=_int(env, "SLURM_LOCALID"),
        local_world_size=num_tasks_of_node(num_tasks, node_rank),
    )
    # Steps of a job may run at the same time on one node, so the step is part of the name.
    job = f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID', '0')}"
    address = _address(env, first_host(nodes), job)
    return _topology("SLURM", ranks, address, (node_rank, _int(env, "SLURM_STEP_NUM_NODES")))


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list such as `"gpu[03-05,9],login1"`.

    Effects: pure.

    Examples:
        >>> first_host("gpu[03-05,9],login1")
        'gpu03'
        >>> first_host("rack[2-3]-n[01-02].x")
        'rack2-n01.x'
    """
    # up to the first comma outside of brackets
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if match:
        nodes = match[0]
    # of each bracket the first number
    return re.sub(r"\[([^\],\[-]++)[^\]\[]*+\]", r"\1", nodes)


def num_tasks_of_node(tasks: str, node: int) -> int:
    """Return how many tasks SLURM starts on a node, from a list such as `"2(x3),1"`.

    Effects: pure.

    Raises:
        TopologyError: The list has fewer nodes.

    Examples:
        >>> [num_tasks_of_node("2(x3),1", node) for node in range(4)]
        [2, 2, 2, 1]
    """
    num_nodes = 0
    for entry in tasks.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:\(x(\d{1,9})\))?", entry.strip())
        if match:
            num_nodes += int(match[2] or 1)
            if node < num_nodes:
                return int(match[1])
    raise TopologyError(
        "the list of SLURM tasks per node is too short for this node",
        got=f"{short_repr(tasks)}, node {node}",
        fix="start the processes with `srun`",
    )


def _keys(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))


# Rank, world size, local rank and local world size of each implementation of MPI.
_MPI: Mapping[str, tuple[str, ...]] = {
    "Open MPI": _keys("OMPI_COMM_WORLD"),
    "MVAPICH": _keys("MV2_COMM_WORLD"),
    "PMI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


def detect_mpi(env: Env) -> Topology | None:
    """Read the variables of `mpirun`: Open MPI, MVAPICH, and the PMI of MPICH and Intel MPI.

    Effects: pure.

    Raises:
        TopologyError: Only some of the variables are set, several nodes have no `MASTER_ADDR`, or
            a PMIx launcher sets the rank only.
    """
    for source, keys in _MPI.items():
        if keys[0] in env or keys[1] in env:
            return _mpi_topology(env, source, keys)
    # `srun --mpi=pmix` sets this too, together with the variables of SLURM
    if "PMIX_RANK" in env and "SLURM_STEP_NUM_TASKS" not in env:
        raise TopologyError(
            "this PMIx launcher sets the rank but not the world size",
            got=f"PMIX_RANK={short_text(env['PMIX_RANK'])}",
            fix="start the processes with `mpirun`, `srun` or torchrun",
        )
    return None


def _mpi_topology(env: Env, source: str, keys: tuple[str, ...]) -> Topology:
    ranks = _ranks(env, source, keys)
    # MPI publishes no host name of rank 0
    if ranks.world_size > ranks.local_world_size and "MASTER_ADDR" not in env:
        raise TopologyError(
            f"{source} on several nodes needs the address of rank 0",
            got=f"{ranks.world_size} processes, {ranks.local_world_size} of them on this node",
            fix=(
                "pass the first host, as in `mpirun -x MASTER_ADDR=host -x MASTER_PORT=29500 ...`"
            ),
        )
    # Open MPI 5 sets the first, Open MPI 4 the second. Both are equal on all ranks of a job;
    # MPICH has no such variable, so its jobs on a node need different MASTER_PORTs.
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid", "")
    return _topology(source, ranks, _address(env, _LOCALHOST, job))


def detect_lsf(env: Env) -> Topology | None:
    """Read the variables of `jsrun` in an LSF job.

    Effects: pure.

    Raises:
        TopologyError: Only some of the variables are set.
    """
    # `LSB_JOBID` alone is set in the whole job, outside of `jsrun`.
    if "JSM_NAMESPACE_RANK" not in env or "LSB_JOBID" not in env:
        return None
    ranks = _ranks(env, "jsrun", _keys("JSM_NAMESPACE"))
    # "login 1 host1 42 host2 42": hosts and slots. The first host only launches.
    hosts = env.get("LSB_MCPU_HOSTS", "").split()[::2]
    host = _LOCALHOST
    if len(hosts) == 1:
        host = hosts[0]
    if len(hosts) > 1:
        host = hosts[1]
    return _topology("LSF", ranks, _address(env, host, env["LSB_JOBID"]))


def detect_kubeflow(env: Env) -> Topology | None:
    """Read the variables of Kubeflow's PyTorchJob: one process per pod, without local ranks.

    Effects: pure.

    Raises:
        TopologyError: Only some of the variables are set.
    """
    if not _is_kubeflow(env) or ("RANK" not in env and "WORLD_SIZE" not in env):
        return None
    _check_complete(env, "Kubeflow", ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    # Kubeflow's `RANK` counts pods, and each pod is a node of one process.
    ranks = _Ranks(_int(env, "RANK"), _int(env, "WORLD_SIZE"), 0, 1)
    return _topology("Kubeflow", ranks, (env["MASTER_ADDR"], _port(env)))


def _is_kubeflow(env: Env) -> bool:
    if "LOCAL_RANK" in env:  # torchrun in a pod
        return False
    return "KUBERNETES_SERVICE_HOST" in env or "KUBERNETES_PORT" in env


DETECTORS: tuple[Callable[[Env], Topology | None], ...] = (
    detect_torchrun,
    detect_slurm,
    detect_mpi,
    detect_lsf,
    detect_kubeflow,
)
"""The order decides between launchers with the same world size: torchrun sets the most."""


def _int(env: Env, key: str, default: int | None = None) -> int:
    text = env.get(key)
    if text is None and default is not None:
        return default
    number = None
    with suppress(ValueError):
        number = int(text or "")
    if number is not None and abs(number) < MAX_COUNT:
        return number
    raise TopologyError(
        f"`{key}` must be a whole number",
        got=short_repr(text),
        fix=f"unset `{key}`, so that only the launcher sets it",
    )


def _port(env: Env, default: int | None = None) -> int:
    port = _int(env, "MASTER_PORT", default)
    if 0 <= port <= _MAX_PORT:
        return port
    raise TopologyError(
        f"`MASTER_PORT` must be a port, from 0 to {_MAX_PORT}",
        got=f"MASTER_PORT={port}",
        fix="unset `MASTER_PORT`, so that only the launcher sets it",
    )


def _check_complete(env: Env, launcher: str, keys: tuple[str, ...]) -> None:
    """Raise if only some of `keys` are set."""
    missing = [f"`{key}`" for key in keys if key not in env]
    if not missing:
        return
    present = [f"{key}={short_text(env[key])}" for key in keys if key in env]
    raise TopologyError(
        f"the environment of {launcher} lacks {', '.join(missing)}",
        got=", ".join(present),
        fix=f"start the processes with {launcher}, which sets all of them, or unset the others",
    )


def _ranks(env: Env, launcher: str, keys: tuple[str, ...]) -> _Ranks:
    """Read rank, world size, local rank and local world size from the variables `keys`."""
    _check_complete(env, launcher, keys)
    return _Ranks(*(_int(env, key) for key in keys))


def _address(env: Env, host: str, job: str) -> tuple[str, int]:
    """Return host and port of rank 0: `MASTER_ADDR` and `MASTER_PORT`, or derived from the job.

    The port must be equal on all ranks of a job, and differ between jobs on the same node.
    """
    # CRC, not `hash`, which is salted in each process.
    port = 20000 + zlib.crc32(job.encode()) % 20000
    return env.get("MASTER_ADDR", host), _port(env, port)


def _topology(
    source: str, ranks: _Ranks, address: tuple[str, int], node: tuple[int, int] | None = None
) -> Topology:
    """Return the topology. Without `node`, rank and number, all nodes have equally many ranks."""
    if node is None:
        # A launcher without node numbers places consecutive ranks on a node.
        size = max(1, ranks.local_world_size)
        node = (ranks.rank // size, -(-ranks.world_size // size))
    return Topology(
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_rank=ranks.local_rank,
        local_world_size=ranks.local_world_size,
        node_rank=node[0],
        num_nodes=node[1],
        source=source,
        main_address=address[0],
        main_port=address[1],
    )
