"""A launch as text for another launcher: what `faccel launch --print` prints."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping

from faccel.config import LAUNCH
from faccel.config_file import VARIABLE
from faccel.errors import LaunchError
from faccel.launching.spec import LaunchSpec, torchrun_arguments

_RUN = {"script": "python {}", "module": "python -m {}", "executable": "{}"}
# `faccel.preemption` handles SIGUSR1. The exit code 75 is `Preemption.exit_code` (EX_TEMPFAIL).
_SLURM_PREEMPTION = """\
# `faccel.preemption` receives SIGUSR1 two minutes before the time limit
#SBATCH --signal=USR1@120
#SBATCH --requeue
"""
_SLURM_REQUEUE = """\
code=$?
# 75: the script saved a checkpoint, and the same command resumes from it
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $code"""


def as_torchrun(spec: LaunchSpec) -> str:
    """Return the command line of torchrun.

    Effects: pure.
    """
    words = [f"{key}={shlex.quote(value)}" for key, value in _environment(spec).items()]
    return " ".join([*words, "torchrun", shlex.join(torchrun_arguments(spec))]) + "\n"


def as_mpirun(spec: LaunchSpec) -> str:
    """Return the command line of Open MPI's mpirun.

    Effects: pure.

    Raises:
        LaunchError: The launch has an option that mpirun does not support.
    """
    # `spec.nproc` counts the processes of a node, mpirun those of the job.
    num_nodes = _num_nodes(spec)
    _check_supported(spec, "mpirun")
    words = ["mpirun", "-np", str(spec.nproc * num_nodes)]
    for key, value in _environment(spec).items():
        # Open MPI exports variables to other nodes only with -x.
        words += ["-x", f"{key}={value}"]
    if num_nodes > 1:
        # A placeholder that the user replaces.
        address = spec.main_address or "HOST"
        words += ["--map-by", f"ppr:{spec.nproc}:node", "-x", f"MASTER_ADDR={address}"]
    if spec.main_port is not None:
        words += ["-x", f"MASTER_PORT={spec.main_port}"]
    return f"{shlex.join(words)} {_command(spec)}\n"


def as_slurm(spec: LaunchSpec) -> str:
    """Return a batch script for SLURM that requeues the job after a preemption.

    Effects: pure.

    Raises:
        LaunchError: The launch has an option that srun does not support.
    """
    num_nodes = _num_nodes(spec)
    _check_supported(spec, "srun")
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=faccel",
        f"#SBATCH --nodes={num_nodes}",
        f"#SBATCH --ntasks-per-node={spec.nproc}",
    ]
    # SLURM grants no GPU that the script does not request.
    if not str(spec.flags.get("device") or "").startswith("cpu"):
        lines.append(f"#SBATCH --gpus-per-node={spec.nproc}")
    lines.append(_SLURM_PREEMPTION)
    lines += [f"export {key}={shlex.quote(value)}" for key, value in _environment(spec).items()]
    if spec.main_port is not None:
        lines.append(f"export MASTER_PORT={spec.main_port}")
    lines += [f"srun {_command(spec)}", _SLURM_REQUEUE]
    return "\n".join(lines) + "\n"


RENDERINGS: Mapping[str, Callable[[LaunchSpec], str]] = {
    "mpirun": as_mpirun,
    "slurm": as_slurm,
    "torchrun": as_torchrun,
}


def _environment(spec: LaunchSpec) -> dict[str, str]:
    variables: dict[str, str] = {}
    if spec.flags:
        variables[LAUNCH] = json.dumps(dict(spec.flags))
    if spec.config:
        # As it was written: the path is resolved in the job's folder.
        variables[VARIABLE] = spec.config
    return variables


def _command(spec: LaunchSpec) -> str:
    return _RUN[spec.kind].format(shlex.join(spec.command))


def _num_nodes(spec: LaunchSpec) -> int:
    if ":" in spec.nnodes:
        raise LaunchError(
            "a batch job needs a fixed number of nodes",
            got=f"--nnodes {spec.nnodes}",
            fix="write one number, for example `--nnodes 2`",
        )
    return int(spec.nnodes)


def _check_supported(spec: LaunchSpec, launcher: str) -> None:
    """Raise for an option without an equivalent, instead of dropping it silently."""
    options = {
        "--max-restarts": spec.max_restarts,
        "--log-dir": spec.log_dir,
        "--rdzv-endpoint": spec.rdzv_endpoint,
    }
    for option, value in options.items():
        if value:
            raise LaunchError(
                f"{launcher} has no equivalent of `{option}`",
                got=f"{option} {value}",
                fix=f"remove `{option}`, or use `--print torchrun`",
            )
