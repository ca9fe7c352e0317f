"""A launch as text for another launcher: what `faccel launch --print` prints."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping

from faccel.config import LAUNCH
from faccel.config_file import VARIABLE
from faccel.errors import LaunchError
from faccel.launching.kubernetes_files import as_jobset, as_pytorchjob
from faccel.launching.node_command import check_no_addresses, node_command, num_nodes_of
from faccel.launching.ray_script import as_ray
from faccel.launching.sky_task import as_sky
from faccel.launching.spec import LaunchSpec, torchrun_arguments

_RUN = {"script": "python {}", "module": "python -m {}", "executable": "{}"}
# `faccel.preemption` handles SIGUSR1. The exit code 75 is `node_command.SAVED`.
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
# GKE sets both variables. A Cloud TPU VM has the values in its metadata: the third field of each
# endpoint is an address.
_TPU_HOSTS = """\
#!/bin/bash
# Run it on every host: gcloud compute tpus tpu-vm ssh NAME --worker=all --command "bash FILE"
set -euo pipefail
metadata() {
  curl -sf -H 'Metadata-Flavor: Google' \\
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
if [ -z "${TPU_WORKER_HOSTNAMES:-}" ]; then
  endpoints=$(metadata worker-network-endpoints)
  TPU_WORKER_HOSTNAMES=$(tr , '\\n' <<<"$endpoints" | cut -d : -f 3 | paste -sd ,)
  TPU_WORKER_ID=$(metadata agent-worker-number)
fi
export TPU_WORKER_HOSTNAMES TPU_WORKER_ID="${TPU_WORKER_ID:-${JOB_COMPLETION_INDEX:-}}"
"""


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
    num_nodes = num_nodes_of(spec)
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
    num_nodes = num_nodes_of(spec)
    _check_supported(spec, "srun")
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=faccel",
        f"#SBATCH --nodes={num_nodes}",
        f"#SBATCH --ntasks-per-node={spec.nproc}",
    ]
    # SLURM grants no GPU that the script does not request.
    if spec.device != "cpu":
        lines.append(f"#SBATCH --gpus-per-node={spec.nproc}")
    lines.append(_SLURM_PREEMPTION)
    lines += [f"export {key}={shlex.quote(value)}" for key, value in _environment(spec).items()]
    if spec.main_port is not None:
        lines.append(f"export MASTER_PORT={spec.main_port}")
    lines += [f"srun {_command(spec)}", _SLURM_REQUEUE]
    return "\n".join(lines) + "\n"


def as_tpu_pod(spec: LaunchSpec) -> str:
    """Return a script that starts the ranks of one host of a TPU pod; run it on every host.

    Effects: pure.

    Raises:
        LaunchError: The launch names its nodes, which the script reads from the pod.
    """
    check_no_addresses(spec, "a TPU pod")
    if spec.nnodes != "1":
        raise LaunchError(
            "a TPU pod sets the number of nodes",
            got=f"--nnodes {spec.nnodes}",
            fix="remove `--nnodes`",
        )
    return f"{_TPU_HOSTS}exec {node_command(spec)}\n"


RENDERINGS: Mapping[str, Callable[[LaunchSpec], str]] = {
    "k8s": as_jobset,
    "k8s-pytorchjob": as_pytorchjob,
    "mpirun": as_mpirun,
    "ray": as_ray,
    "sky": as_sky,
    "slurm": as_slurm,
    "torchrun": as_torchrun,
    "tpu-pod": as_tpu_pod,
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


def _check_supported(spec: LaunchSpec, launcher: str) -> None:
    """Raise for an option without an equivalent, instead of dropping it silently."""
    options = {
        "--max-restarts": spec.max_restarts,
        "--log-dir": spec.log_dir,
        "--rdzv-endpoint": spec.rdzv_endpoint,
        "--numa-binding": spec.numa_binding,
    }
    for option, value in options.items():
        if value:
            raise LaunchError(
                f"{launcher} has no equivalent of `{option}`",
                got=f"{option} {value}",
                fix=f"remove `{option}`, or use `--print torchrun`",
            )
