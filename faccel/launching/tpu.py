"""Launches on TPUs: the hosts of a pod, and the environment that TorchTPU needs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import attrs

from faccel.checks import parse_count
from faccel.config import Config
from faccel.errors import LaunchError, short_text
from faccel.launching.spec import LaunchSpec

_COUNTS = (
    "a host runs 1, 2, 4 or 8 processes on v4 and v5p, 1, 4 or 8 on v5e and v6e, "
    "and 2, 4 or 8 on v7"
)
_PORT = 29500


def is_tpu(config: Config) -> bool:
    """Return whether the ranks of a launch will compute on TPUs.

    Effects: ambient. Imports PyTorch if TorchTPU is installed and the configuration names no
    device.
    """
    if config.device is not None:
        return config.device.partition(":")[0] == "tpu"
    if importlib.util.find_spec("torch_tpu") is None:
        return False
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == "tpu"


def within_tpu_pod(spec: LaunchSpec, env: Mapping[str, str]) -> LaunchSpec:
    """Return `spec` for this host of a TPU pod, whose hosts rendezvous at the first one.

    `spec` is returned unchanged on a single host, or if it has a rendezvous.

    Effects: pure.

    Args:
        spec: The launch, as the command line describes it.
        env: The environment. `TPU_WORKER_HOSTNAMES` lists the hosts, and `TPU_WORKER_ID` (or
            `JOB_COMPLETION_INDEX` on Kubernetes) is the number of this one.

    Raises:
        LaunchError: The number of this host is missing or invalid.

    Examples:
        >>> env = {"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}
        >>> spec = within_tpu_pod(LaunchSpec(command=("train.py",), nproc=4), env)
        >>> spec.nnodes, spec.node_rank, spec.main_address
        ('2', 1, 't0')
    """
    has_rendezvous = spec.rdzv_endpoint is not None or spec.main_address is not None
    hosts = list(filter(None, env.get("TPU_WORKER_HOSTNAMES", "").split(",")))
    # A TPU VM of a single host sets the variable, too, to one name.
    if has_rendezvous or spec.nnodes != "1" or len(hosts) < 2:
        return spec
    text = env.get("TPU_WORKER_ID") or env.get("JOB_COMPLETION_INDEX") or ""
    node_rank = parse_count(text)
    if node_rank is None or node_rank >= len(hosts):
        raise LaunchError(
            "the number of this host of the TPU pod is missing or invalid",
            got=f"TPU_WORKER_ID={short_text(text)}, and {len(hosts)} hosts in "
            "`TPU_WORKER_HOSTNAMES`",
            fix=f"set `TPU_WORKER_ID` to a number from 0 to {len(hosts) - 1}, or run "
            "`faccel launch --print tpu-pod ...` for a script that sets it",
        )
    return attrs.evolve(
        spec,
        nnodes=str(len(hosts)),
        node_rank=node_rank,
        main_address=hosts[0],
        main_port=spec.main_port or _PORT,
    )


def prepare_tpus(spec: LaunchSpec) -> None:
    """Set the variables that all ranks of a launch on TPUs must share.

    Effects: ambient. Sets them in the environment of this process.

    Raises:
        LaunchError: TorchTPU finds no chips, or cannot divide them into `spec.nproc` processes.
    """
    num_nodes = parse_count(spec.nnodes)
    if num_nodes is None:
        raise LaunchError(
            "TPUs need a fixed number of hosts",
            got=f"--nnodes {spec.nnodes}",
            fix="write one number, for example `--nnodes 2`",
        )
    if num_nodes > 1 and spec.node_rank is not None:
        # Before TorchTPU, which would number the hosts by their position in the mesh of chips.
        os.environ.setdefault("NODE_RANK", str(spec.node_rank))
        os.environ.setdefault("MASTER_ADDR", str(spec.main_address))
        os.environ.setdefault("MASTER_PORT", str(spec.main_port or _PORT))
    set_tpu_variables(num_nodes, spec.nproc)


def set_tpu_variables(num_nodes: int, nproc: int) -> None:
    """Set what `torch.tpu.distributed.set_tpu_launch_env` sets, for all ranks of a launch.

    Effects: ambient. Sets variables in the environment of this process.

    Raises:
        LaunchError: TorchTPU finds no chips, or cannot divide them into `nproc` processes.
    """
    import torch

    from faccel.device_table import KINDS, without_stage_warnings

    tpu: Any = getattr(torch, "tpu", None)
    if tpu is None:
        raise LaunchError(
            "no `tpu` device: `torch-tpu`, which adds it to PyTorch, is not loaded",
            got=f"{nproc} processes on `tpu`",
            fix="run `pip install torch-tpu` on a host with TPU chips, or compute on the CPU",
        )
    # TorchTPU lists as many addresses per host, and its ranks share a store on each host.
    os.environ.setdefault("TORCH_TPU_DEVICES_PER_HOST", str(nproc))
    try:
        with without_stage_warnings():
            tpu.distributed.set_tpu_launch_env(nnodes=num_nodes, nproc_per_node=nproc)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"TorchTPU cannot run {nproc} processes on the TPU chips of this host",
            got=str(error),
            fix=f"start 4 processes (`--nproc 4`): {_COUNTS}",
        ) from None
    variable = KINDS["tpu"].launch_variable
    addresses = os.environ.get(variable, "").split(",")
    # TorchTPU never changes a variable, and it remembers the values of an earlier launch.
    if len(addresses) != num_nodes * nproc:
        raise LaunchError(
            f"`{variable}` is for another number of processes",
            got=f"{len(addresses)} addresses for {num_nodes * nproc} processes",
            fix=f"unset `{variable}`, or launch from a new process",
        )
