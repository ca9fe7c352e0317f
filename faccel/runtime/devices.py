"""The choice of the device of a process, and how devices of its type communicate."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
import torch.distributed as dist

from faccel.config import Config
from faccel.context import Topology
from faccel.device_table import KINDS, is_host, kind_of, without_stage_warnings
from faccel.errors import ConfigError, DeviceError, WorldError, short_repr, with_source

# c10d's names of backends that do not communicate between devices: gloo serves the host, and
# "fake" stands where a plugin has not registered its library yet.
_NOT_OF_DEVICES = (None, "gloo", "fake", "undefined")


def c10d_backend(device: torch.device, name: str | None = None) -> str:
    """Return the backend of `init_process_group`: gloo for CPU tensors, the device's library too.

    Effects: pure.

    Args:
        device: The device of this process.
        name: The backend for its tensors; None is the library of its type.

    Raises:
        ConfigError: PyTorch has no such backend.

    Examples:
        >>> c10d_backend(torch.device("xpu", 0))
        'cpu:gloo,xpu:xccl'
    """
    if name is not None and not dist.is_backend_available(name):
        raise ConfigError(
            "`comm_backend` is not a backend of this PyTorch",
            got=short_repr(name),
            fix='use `"gloo"`, or leave it out for the library of the device',
        )
    if is_host(device):
        return name or "gloo"
    # gloo as well: objects and counters are CPU tensors on every device.
    return f"cpu:gloo,{device.type}:{name or _library(device)}"


def _library(device: torch.device) -> str | None:
    """Return the c10d backend that was registered for a device type; None if there is none."""
    if is_host(device):
        return "gloo"
    name = dist.Backend.default_device_backend_map.get(device.type)
    if name in _NOT_OF_DEVICES:
        return None
    return name


def bound_device(device: torch.device) -> torch.device | None:
    """Return the `device_id` of `init_process_group`; None if the group cannot be bound.

    Effects: pure.
    """
    # c10d looks the bound device up in every later group, and raises in those of gloo if gloo does
    # not serve its type.
    served_types = dist.Backend.backend_capability[dist.Backend.GLOO]
    if is_host(device) or device.type not in served_types:
        return None
    return device


def choose_device(config: Config, topology: Topology) -> torch.device:
    """Return the device of this process: one accelerator for each local rank, or the CPU.

    Effects: ambient. Asks PyTorch for the accelerators of this node.

    Raises:
        DeviceError: The device does not exist, its type cannot communicate, or there are more
            processes than devices. The message names the file or variable that the device is from.
    """
    try:
        return _device_of(config.device, topology)
    except DeviceError as error:
        raise with_source(error, config.sources.get("device", "argument")) from error.__cause__


def check_launched(device: torch.device, topology: Topology, env: Mapping[str, str]) -> None:
    """Raise if the launcher did not set a variable that several devices of this type need.

    Effects: pure.

    Raises:
        WorldError: It is not set.

    Examples:
        >>> check_launched(torch.device("cpu"), Topology(), {})
    """
    variable = kind_of(device).launch_variable
    # Without it the library of the device aborts the process.
    if topology.world_size > 1 and variable and variable not in env:
        raise WorldError(
            f"the launcher did not prepare the `{device.type}` devices for several processes",
            got=f"{topology.world_size} processes by {topology.source}, and no `{variable}`",
            fix="start them with `faccel launch --nproc 4 train.py`, which sets it",
        )


def use_device(device: torch.device) -> None:
    """Make `device` the current one, and initialize it, so that errors come from `faccel.init`.

    Effects: ambient.

    Raises:
        DeviceError: The device cannot be used.
    """
    if is_host(device):
        return
    try:
        with without_stage_warnings():
            # FSDP2, DTensor and the communication libraries use the current device.
            if not kind_of(device).is_process_bound:
                torch.accelerator.set_device_index(device)
            # A copy, because without a chip TorchTPU aborts the process in an operator.
            torch.zeros(1).to(device)
    except (RuntimeError, ValueError) as error:
        raise DeviceError(
            f"the device `{device}` cannot be used",
            got=str(error).strip().split("\n")[0],
            fix='check that no other process uses it, or use `device="cpu"`',
        ) from None


def _device_of(name: str | None, topology: Topology) -> torch.device:
    device = _requested_device(name)
    kind = kind_of(device)
    if kind.is_host:
        return torch.device(device.type)
    if topology.world_size > 1 and _library(device) is None:
        raise DeviceError(
            f"`{device.type}` devices cannot communicate with each other",
            got=f"{topology.world_size} processes",
            fix='start one process, or use `device="cpu"`',
        )
    num_devices = _num_devices(device.type)
    index = device.index
    if index is None:  # pyright: ignore[reportUnnecessaryComparison] (torch's stub lacks None)
        index = topology.local_rank
        if kind.is_process_bound:
            index = 0
    if kind.is_process_bound and index != 0:
        raise DeviceError(
            f"a process sees one `{device.type}` device, its own, under the number 0",
            got=f"device {device}",
            fix=f'use `device="{device.type}"`',
        )
    if index < num_devices and (kind.is_process_bound or topology.local_rank < num_devices):
        return torch.device(device.type, index)
    raise _no_device(device, num_devices, topology)


def _num_devices(device_type: str) -> int:
    """Return the number of devices of a type on this node."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != device_type:
        return 0
    return torch.accelerator.device_count()


def _no_device(device: torch.device, num_devices: int, topology: Topology) -> DeviceError:
    fix = 'use `device="cpu"`'
    # The number that fits, so that the command can be corrected at once.
    if num_devices:
        fix = f"start {num_devices} processes on this node, or {fix}"
    return DeviceError(
        f"no `{device.type}` device for process {topology.local_rank} of this node",
        got=f"{num_devices} devices for {topology.local_world_size} processes",
        fix=fix,
    )


def _requested_device(name: str | None) -> torch.device:
    """Return the device that the configuration names, or the best available type."""
    if name is None:
        return _default_device()
    try:
        return torch.device(name)
    except RuntimeError as error:
        package = ""
        kind = KINDS.get(name.partition(":")[0])
        if kind is not None:
            package = kind.package
        if package:
            raise DeviceError(
                f"no `{name}` device: `{package}`, which adds it to PyTorch, is not loaded",
                got=f"device={short_repr(name)}",
                fix=f'install `{package}` and import it, or use `device="cpu"`',
            ) from None
        raise DeviceError(
            "`device` is not a device of PyTorch",
            got=short_repr(name),
            fix='use `"cpu"`, or leave it out to take the accelerator of this node',
        ) from error


def _default_device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        return torch.device(accelerator.type)
    # Its plugin was installed to compute on this type: the CPU would be a silent fallback.
    for device_type, kind in KINDS.items():
        if kind.module and kind.module in sys.modules:
            raise DeviceError(
                f"no `{device_type}` device on this node",
                got=f"`{kind.package}`, and no hardware that it can use",
                fix='use `device="cpu"` or `faccel launch --cpu`, or uninstall the package',
            )
    return torch.device("cpu")
