"""From an environment to a `Topology`: one pure detector per launcher, and a rule for those that are nested."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping

from faccel.context import Topology
from faccel.errors import TopologyError

Env = Mapping[str, str]


def _number(env: Env, key: str, default: int | None = None) -> int:
    text = env.get(key)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise TopologyError(
            f"`{key}` must be a whole number",
            got=repr(text),
            fix="let the launcher set it, or unset it",
        ) from None


def _complete(env: Env, launcher: str, keys: tuple[str, ...]) -> None:
    """Refuse an environment in which only some of `keys` are set."""
    missing = [key for key in keys if key not in env]
    if missing:
        raise TopologyError(
            f"the environment of {launcher} is half set: {', '.join(f'`{key}`' for key in missing)} missing",
            got=", ".join(f"{key}={env[key]}" for key in keys if key in env),
            fix=f"start the processes with {launcher}, which sets all of them, or unset those that are there",
        )


def _place(env: Env, launcher: str, keys: tuple[str, ...]) -> tuple[int, int, int, int]:
    """Return rank, world size, local rank and local world size, which a launcher says in these four variables."""
    _complete(env, launcher, keys)
    rank, world_size, local_rank, local_world_size = (_number(env, key) for key in keys)
    return rank, world_size, local_rank, local_world_size


def _main(env: Env, address: str, job: str) -> tuple[str, int]:
    """Return where the processes of a job meet: `MASTER_ADDR` and `MASTER_PORT`, or what follows from the job."""
    port = (
        20000 + zlib.crc32(job.encode()) % 20000
    )  # the same on every rank, another one for another job
    return env.get("MASTER_ADDR", address), _number(env, "MASTER_PORT", port)


def _ranked(
    env: Env,
    source: str,
    place: tuple[int, int, int, int],
    main: tuple[str, int],
    node: tuple[int, int] | None = None,
) -> Topology:
    rank, world_size, local_rank, local_world_size = place
    whole = max(1, local_world_size)
    node_rank, num_nodes = node or (rank // whole, -(-world_size // whole))
    return Topology(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        node_rank=node_rank,
        num_nodes=num_nodes,
        source=source,
        main_address=main[0],
        main_port=main[1],
        attempt=_number(env, "TORCHELASTIC_RESTART_COUNT", 0) if source == "torchrun" else 0,
        store_is_hosted=source == "torchrun" and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _is_kubeflow(env: Env) -> bool:
    return "LOCAL_RANK" not in env and (
        "KUBERNETES_SERVICE_HOST" in env or "KUBERNETES_PORT" in env
    )


def detect_torchrun(env: Env) -> Topology | None:
    """Read what torchrun (torchelastic) sets; None where `RANK` and `WORLD_SIZE` are both absent.

    Effects: pure.

    Raises:
        TopologyError: Half of it is set.
    """
    if ("RANK" not in env and "WORLD_SIZE" not in env) or _is_kubeflow(env):
        return None
    _complete(
        env,
        "torchrun",
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    )
    place = tuple(
        _number(env, key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    node = (
        (_number(env, "GROUP_RANK"), _number(env, "GROUP_WORLD_SIZE"))
        if "GROUP_WORLD_SIZE" in env
        else None
    )
    return _ranked(env, "torchrun", place, (env["MASTER_ADDR"], _number(env, "MASTER_PORT")), node)  # type: ignore[arg-type]


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list such as `"gpu[03-05,9],login1"`.

    Effects: pure.

    Examples:
        >>> first_host("gpu[03-05,9],login1"), first_host("a1,a2"), first_host("rack[2-3]-n[01-02].x")
        ('gpu03', 'a1', 'rack2-n01.x')
    """
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    first = match[0] if match else nodes
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def tasks_of_node(tasks: str, node: int) -> int:
    """Return how many tasks SLURM starts on a node, from a list such as `"2(x3),1"`.

    Effects: pure.

    Examples:
        >>> [tasks_of_node("2(x3),1", node) for node in range(4)]
        [2, 2, 2, 1]
    """
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise TopologyError(
            "SLURM's tasks per node do not cover this node",
            got=f"{tasks!r}, node {node}",
            fix="start it with `srun`",
        )
    return counts[node]


def detect_slurm(env: Env) -> Topology | None:
    """Read what `srun` sets in each task of a step; None outside of a step, as in `salloc` or the batch script itself.

    Effects: pure.

    Raises:
        TopologyError: Half of it is set.
    """
    if "SLURM_STEP_NUM_TASKS" not in env:
        return None
    _complete(
        env,
        "srun",
        ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_NODES", "SLURM_JOB_ID"),
    )
    node = _number(env, "SLURM_NODEID")
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or ""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    return _ranked(
        env,
        "SLURM",
        (
            _number(env, "SLURM_PROCID"),
            _number(env, "SLURM_STEP_NUM_TASKS"),
            _number(env, "SLURM_LOCALID"),
            tasks_of_node(tasks, node),
        ),
        _main(env, first_host(nodes), f"{env['SLURM_JOB_ID']}.{env.get('SLURM_STEP_ID', '0')}"),
        (node, _number(env, "SLURM_STEP_NUM_NODES")),
    )


_MPI = {
    "Open MPI": tuple(
        f"OMPI_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ),
    "MVAPICH": tuple(
        f"MV2_COMM_WORLD_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    ),
    "PMI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
"""Where each family of `mpirun` says rank, world size, local rank and local world size."""


def detect_mpi(env: Env) -> Topology | None:
    """Read what `mpirun` sets: Open MPI, MVAPICH, and the PMI of MPICH and Intel MPI.

    Effects: pure.

    Raises:
        TopologyError: Half of it is set, several machines without `MASTER_ADDR`, or a PMIx launcher that says the
            rank alone.
    """
    for source, keys in _MPI.items():
        if keys[0] in env or keys[1] in env:
            place = _place(env, source, keys)
            if place[1] > place[3] and "MASTER_ADDR" not in env:
                raise TopologyError(
                    f"{source} on several machines does not say where they meet",
                    got=f"{place[1]} processes, {place[3]} of them on this machine",
                    fix="pass the first host on, as in `mpirun -x MASTER_ADDR=host -x MASTER_PORT=29500 ...`",
                )
            job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid", "")
            return _ranked(env, source, place, _main(env, "127.0.0.1", job))
    if "PMIX_RANK" in env and "SLURM_STEP_NUM_TASKS" not in env:
        raise TopologyError(
            "this PMIx launcher says the rank and not the world size",
            got=f"PMIX_RANK={env['PMIX_RANK']}",
            fix="start the processes with `mpirun`, `srun` or torchrun",
        )
    return None


def detect_lsf(env: Env) -> Topology | None:
    """Read what LSF's `jsrun` sets.

    Effects: pure.

    Raises:
        TopologyError: Half of it is set.
    """
    if "JSM_NAMESPACE_RANK" not in env or "LSB_JOBID" not in env:
        return None
    keys = tuple(f"JSM_NAMESPACE_{part}" for part in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))
    place = _place(env, "jsrun", keys)
    hosts = env.get("LSB_MCPU_HOSTS", "").split()[
        ::2
    ]  # "launch 1 host1 42 host2 42": the first one only launches
    address = hosts[1] if len(hosts) > 1 else (hosts or ["127.0.0.1"])[0]
    return _ranked(env, "LSF", place, _main(env, address, env["LSB_JOBID"]))


def detect_kubeflow(env: Env) -> Topology | None:
    """Read what Kubeflow's PyTorchJob sets: a world without local ranks, one process per pod.

    Effects: pure.

    Raises:
        TopologyError: Half of it is set.
    """
    if not _is_kubeflow(env) or ("RANK" not in env and "WORLD_SIZE" not in env):
        return None
    _complete(env, "Kubeflow", ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    main = (env["MASTER_ADDR"], _number(env, "MASTER_PORT"))
    return _ranked(env, "Kubeflow", (_number(env, "RANK"), _number(env, "WORLD_SIZE"), 0, 1), main)


def detect_xla(env: Env) -> Topology | None:
    """Read what a TPU pod sets on each of its hosts.

    Effects: pure.

    Raises:
        TopologyError: Half of it is set.
    """
    if "TPU_WORKER_ID" not in env and "TPU_WORKER_HOSTNAMES" not in env:
        return None
    _complete(env, "the TPU pod", ("TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"))
    hosts = [host for host in env["TPU_WORKER_HOSTNAMES"].split(",") if host]
    main = _main(env, (hosts or ["127.0.0.1"])[0], env["TPU_WORKER_HOSTNAMES"])
    return _ranked(env, "XLA", (_number(env, "TPU_WORKER_ID"), len(hosts), 0, 1), main)


DETECTORS = (detect_torchrun, detect_slurm, detect_mpi, detect_lsf, detect_kubeflow, detect_xla)
"""In the order in which they are asked."""


def _is_outside(outer: Topology, inner: Topology) -> bool:
    """Whether `outer` started the launchers of `inner`: one for all, or one on each machine."""
    return outer.world_size in (1, inner.num_nodes)


def detect(env: Env) -> Topology:
    """Return what the launcher says; without one, the world is this process.

    Effects: pure. Launchers may be nested, as with `srun torchrun` or `mpirun` inside a SLURM job: then the inner one
    counts, if the outer one has started it once, or once on each machine.

    Raises:
        TopologyError: An environment is half set, or two launchers disagree; names both.

    Examples:
        >>> detect({}).world_size
        1
    """
    env = {key: value for key, value in env.items() if value}  # empty is unset, as in a shell
    found = [topology for each in DETECTORS if (topology := each(env)) is not None]
    if not found:
        return Topology()
    inner = max(found, key=lambda t: t.world_size)  # the first of them
    for other in found:
        same = (other.rank, other.world_size) == (inner.rank, inner.world_size)
        if not same and not _is_outside(other, inner):
            raise TopologyError(
                f"{inner.source} and {other.source} disagree about the world",
                got=", ".join(
                    f"{t.source}: rank {t.rank} of {t.world_size}" for t in (inner, other)
                ),
                fix=f"start one process per machine with {other.source}, or use one launcher alone",
            )
    return inner
