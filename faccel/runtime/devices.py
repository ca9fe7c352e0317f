"""The choice of the device of a process, and the c10d backend of each kind of device."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from faccel.config import Config
from faccel.context import Topology
from faccel.errors import DeviceError, short_repr, with_source

# The communication library of each device type. Other types (mps, for example) have none, so that
# they serve a single process only.
_COMM_LIBRARIES: Mapping[str, str] = {"cuda": "nccl", "xpu": "xccl", "npu": "hccl", "hpu": "hccl"}


def c10d_backend(device: torch.device) -> str:
    """Return the backend of `init_process_group`: gloo for CPU tensors, the device's library too.

    Effects: pure.

    Examples:
        >>> c10d_backend(torch.device("cuda", 0))
        'cpu:gloo,cuda:nccl'
    """
    if device.type == "cpu":
        return "gloo"
    # gloo as well: objects and counters are CPU tensors on every device.
    return f"cpu:gloo,{device.type}:{_COMM_LIBRARIES[device.type]}"


def choose_device(config: Config, topology: Topology) -> torch.device:
    """Return the device of this process: one accelerator for each local rank, or the CPU.

    Effects: ambient. Asks PyTorch for the accelerators of this node.

    Raises:
        DeviceError: The device does not exist, or there are more processes than devices. The
            message names the file or variable that the device is from.
    """
    try:
        return _device_of(config.device, topology)
    except DeviceError as error:
        raise with_source(error, config.sources.get("device", "argument")) from error.__cause__


def _device_of(name: str | None, topology: Topology) -> torch.device:
    device = _requested_device(name, topology)
    if device.type == "cpu":
        return torch.device("cpu")
    num_devices = 0
    if torch.accelerator.is_available():
        num_devices = torch.accelerator.device_count()
    index = device.index
    if index is None:  # pyright: ignore[reportUnnecessaryComparison] (torch's stub lacks None)
        index = topology.local_rank
    if index < num_devices:
        return torch.device(device.type, index)
    fix = 'use `device="cpu"`'
    # The number that fits, so that the command can be corrected at once.
    if num_devices:
        fix = f"start {num_devices} processes on this node, or {fix}"
    raise DeviceError(
        f"no `{device.type}` device for process {topology.local_rank} of this node",
        got=f"{num_devices} devices for {topology.local_world_size} processes",
        fix=fix,
    )


def _requested_device(name: str | None, topology: Topology) -> torch.device:
    """Return the device that the configuration names, or the best available type."""
    if name is None:
        return _default_device(topology)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(
            "`device` is not a device of PyTorch",
            got=short_repr(name),
            fix='use `"cpu"` or `"cuda"`',
        ) from error
    if topology.world_size > 1 and not _can_communicate(device):
        raise DeviceError(
            f"`{device.type}` devices cannot communicate with each other",
            got=f"{topology.world_size} processes",
            fix='start one process, or use `device="cpu"`',
        )
    return device


def _default_device(topology: Topology) -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return torch.device("cpu")
    # A Mac with two processes computes on the CPU: mps has no collectives.
    if topology.world_size > 1 and not _can_communicate(accelerator):
        return torch.device("cpu")
    return torch.device(accelerator.type)


def _can_communicate(device: torch.device) -> bool:
    return device.type == "cpu" or device.type in _COMM_LIBRARIES
