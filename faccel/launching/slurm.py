"""`srun faccel launch`: what a task of SLURM's is to start."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from faccel.errors import LaunchError
from faccel.launching.spec import LaunchSpec


def within_slurm(spec: LaunchSpec, env: Mapping[str, str], *, is_counted: bool) -> LaunchSpec:
    """Return `spec` for this task of a SLURM step, or as it is outside of one or where it says itself who meets where.

    One task per machine starts the processes of its machine, and they meet at the first one. Several tasks per machine
    are a rank each, which `init` sees by itself.

    Effects: pure.

    Args:
        spec: What was asked for.
        env: The environment, of which `SLURM_*` are read.
        is_counted: Whether the number of processes was named.

    Raises:
        LaunchError: SLURM starts several tasks per machine, and each should start several processes.
    """
    says_itself = (
        spec.nnodes != "1" or spec.rdzv_endpoint is not None or spec.main_address is not None
    )
    if says_itself or env.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return spec
    from faccel.runtime.detect import detect_slurm

    place = detect_slurm(env)
    assert place is not None
    if place.local_world_size > 1:
        if is_counted and spec.nproc > 1:
            got = f"{place.local_world_size} tasks on this machine, and `--nproc {spec.nproc}` in each"
            fix = "use `srun --ntasks-per-node=1`, or leave out `--nproc`"
            raise LaunchError(
                "SLURM or the launcher starts the processes of a machine", got=got, fix=fix
            )
        return attrs.evolve(spec, nproc=1)
    return attrs.evolve(
        spec,
        nnodes=str(place.num_nodes),
        node_rank=place.node_rank,
        main_address=place.main_address,
        main_port=place.main_port if spec.main_port is None else spec.main_port,
    )
