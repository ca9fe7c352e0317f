"""A launch as text for another launcher: what `faccel launch --print` writes instead of starting anything."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping

from faccel.config import LAUNCH
from faccel.config_file import VARIABLE
from faccel.errors import LaunchError
from faccel.launching.spec import LaunchSpec, arguments

_RUN = {"script": "python {}", "module": "python -m {}", "executable": "{}"}


def _environment(spec: LaunchSpec) -> dict[str, str]:
    flags = {LAUNCH: json.dumps(dict(spec.flags))} if spec.flags else {}
    return flags | ({VARIABLE: spec.config} if spec.config else {})


def _command(spec: LaunchSpec) -> str:
    return _RUN[spec.kind].format(shlex.join(spec.command))


def _machines(spec: LaunchSpec) -> int:
    if ":" in spec.nnodes:
        raise LaunchError(
            "a batch job has a number of machines",
            got=f"--nnodes {spec.nnodes}",
            fix="give one number",
        )
    return int(spec.nnodes)


def _refuse(spec: LaunchSpec, launcher: str) -> None:
    """Refuse what another launcher has nothing for, instead of leaving it out."""
    given = {
        "--max-restarts": spec.max_restarts,
        "--log-dir": spec.log_dir,
        "--rdzv-endpoint": spec.rdzv_endpoint,
    }
    for option, value in given.items():
        if value:
            fix = "leave it out, or use `--print torchrun`"
            raise LaunchError(
                f"`{option}` means nothing to {launcher}", got=f"{option} {value}", fix=fix
            )


def as_torchrun(spec: LaunchSpec) -> str:
    """Return the command line of torchrun."""
    given = [f"{key}={shlex.quote(value)}" for key, value in _environment(spec).items()]
    return " ".join([*given, "torchrun", shlex.join(arguments(spec))]) + "\n"


def as_mpirun(spec: LaunchSpec) -> str:
    """Return the command line of Open MPI's mpirun."""
    processes = spec.nproc * _machines(spec)
    _refuse(spec, "mpirun")
    given = [word for key, value in _environment(spec).items() for word in ("-x", f"{key}={value}")]
    if _machines(spec) > 1:
        given += [
            "--map-by",
            f"ppr:{spec.nproc}:node",
            "-x",
            f"MASTER_ADDR={spec.main_address or 'HOST'}",
        ]
    if spec.main_port is not None:
        given += ["-x", f"MASTER_PORT={spec.main_port}"]
    return f"{shlex.join(['mpirun', '-np', str(processes), *given])} {_command(spec)}\n"


def as_slurm(spec: LaunchSpec) -> str:
    """Return a batch script for SLURM, which saves and goes on where the job is preempted."""
    machines = _machines(spec)
    _refuse(spec, "srun")
    lines = ["#!/bin/bash", "#SBATCH --job-name=faccel", f"#SBATCH --nodes={machines}",
             f"#SBATCH --ntasks-per-node={spec.nproc}"]  # fmt: skip
    if not str(spec.flags.get("device") or "").startswith("cpu"):
        lines.append(f"#SBATCH --gpus-per-node={spec.nproc}")
    lines += [
        "# two minutes before the end `faccel.preemption` hears of it",
        "#SBATCH --signal=USR1@120",
    ]
    lines += ["#SBATCH --requeue", ""]
    lines += [f"export {key}={shlex.quote(value)}" for key, value in _environment(spec).items()]
    if spec.main_port is not None:
        lines.append(f"export MASTER_PORT={spec.main_port}")
    lines += [f"srun {_command(spec)}", "code=$?", "# 75: it has saved, and the same command goes on",
              '[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"', "exit $code"]  # fmt: skip
    return "\n".join(lines) + "\n"


RENDERINGS: Mapping[str, Callable[[LaunchSpec], str]] = {
    "mpirun": as_mpirun,
    "slurm": as_slurm,
    "torchrun": as_torchrun,
}
