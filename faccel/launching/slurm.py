"""`srun faccel launch`: derives the launch of one SLURM task from the variables of its step."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from faccel.errors import LaunchError
from faccel.launching.spec import LaunchSpec


def within_slurm(spec: LaunchSpec, env: Mapping[str, str], *, has_nproc: bool) -> LaunchSpec:
    """Return `spec` for this task of a SLURM step.

    With one task per node, each task launches the processes of its node, and the nodes rendezvous
    at the first one. With several tasks per node, each task is one rank, and `faccel.init` detects
    SLURM. `spec` is returned unchanged outside of a step, or if it has a rendezvous.

    Effects: pure.

    Args:
        spec: The launch, as the command line describes it.
        env: The environment, of which `SLURM_*` are read.
        has_nproc: Whether the command line sets the number of processes.

    Raises:
        LaunchError: SLURM starts several tasks per node, and each would start several processes.
    """
    has_rendezvous = spec.rdzv_endpoint is not None or spec.main_address is not None
    # The command line describes the rendezvous itself, so SLURM only starts it.
    if spec.nnodes != "1" or has_rendezvous:
        return spec
    if env.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return spec
    # imported here, because it imports torch
    from faccel.runtime.detect import detect_slurm

    topology = detect_slurm(env)
    assert topology is not None  # the variable of the step is set
    if topology.local_world_size == 1:
        port = spec.main_port
        if port is None:
            port = topology.main_port  # derived from the job id, so it is the same on all nodes
        return attrs.evolve(
            spec,
            nnodes=str(topology.num_nodes),
            node_rank=topology.node_rank,
            main_address=topology.main_address,
            main_port=port,
        )
    if has_nproc and spec.nproc > 1:
        raise LaunchError(
            "both SLURM and `--nproc` start several processes on this node",
            got=f"{topology.local_world_size} tasks on this node, with `--nproc {spec.nproc}`",
            fix="use `srun --ntasks-per-node=1`, or remove `--nproc`",
        )
    # The task is a rank already.
    return attrs.evolve(spec, nproc=1)
