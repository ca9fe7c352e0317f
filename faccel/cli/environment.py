"""What `faccel env` reports: versions, devices, the rank of this process and the configuration."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs

from faccel.cli.output import fields_document
from faccel.config import Config
from faccel.context import DistContext

if TYPE_CHECKING:
    import torch

# Packages whose versions matter in a bug report.
_PACKAGES = (
    "faccel",
    "torch",
    "numpy",
    "safetensors",
    "tensordict",
    "transformers",
    "datasets",
    "deepspeed",
    "megatron-core",
    "torchao",
)


@attrs.frozen
class _Devices:
    """The hardware of this node.

    Args:
        cpu_cores: Number of CPU cores.
        memory_bytes: Physical memory; None if the system does not report it.
        accelerators: Kind, name and memory of each accelerator; 0 bytes are unknown.
        libraries: Versions of the libraries that drive the accelerators.
    """

    cpu_cores: int | None
    memory_bytes: int | None
    accelerators: tuple[_Accelerator, ...] = ()
    libraries: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen
class _Accelerator:
    kind: str
    name: str
    memory_bytes: int


def describe(config: Config, ctx: DistContext | None) -> dict[str, object]:
    """Return the report as a JSON document; `ctx` is None if `init` failed.

    Effects: ambient. Asks the operating system for the hardware.
    """
    devices = _devices()
    # Keys without a value are left out, so that a reader can test for their presence.
    hardware: dict[str, object] = {
        "cpu_cores": devices.cpu_cores,
        "memory_bytes": devices.memory_bytes,
    }
    if devices.accelerators:
        hardware["accelerators"] = [attrs.asdict(card) for card in devices.accelerators]
    if devices.libraries:
        hardware["libraries"] = dict(devices.libraries)
    document: dict[str, object] = {
        "versions": _versions(),
        "platform": platform.platform(),
        "devices": hardware,
    }
    if ctx is not None:
        document["device"] = str(ctx.device)
        document["topology"] = attrs.asdict(ctx.topology)
    return document | {"config": fields_document(config)}


def as_rows(ctx: DistContext | None) -> list[tuple[str, str]]:
    """Return the report as rows of a table, without the configuration.

    Effects: ambient. Asks the operating system for the hardware.
    """
    devices = _devices()
    cpu = f"{devices.cpu_cores} cores"
    # GiB, as tools of operating systems print it.
    if devices.memory_bytes is not None:
        cpu += f", {devices.memory_bytes / 2**30:.1f} GiB"
    rows = [
        ("versions", _listed(_versions())),
        ("platform", platform.platform()),
        ("cpu", cpu),
    ]
    for index, card in enumerate(devices.accelerators):
        description = card.name
        if card.memory_bytes:
            description += f", {card.memory_bytes / 2**30:.1f} GiB"
        rows.append((f"{card.kind}:{index}", description))
    if ctx is not None:
        rows += _process_rows(ctx)
    if devices.libraries:
        rows.append(("libraries", _listed(devices.libraries)))
    return rows


def _process_rows(ctx: DistContext) -> list[tuple[str, str]]:
    topology = ctx.topology
    process = (
        f"rank {topology.rank} of {topology.world_size}, "
        f"local rank {topology.local_rank} of {topology.local_world_size}, "
        f"node {topology.node_rank} of {topology.num_nodes}"
    )
    # The launcher that `detect` found, which explains an unexpected world size.
    launcher = topology.source
    if topology.main_address:
        launcher += f", rendezvous at {topology.main_address}:{topology.main_port}"
    return [("device", str(ctx.device)), ("process", process), ("launcher", launcher)]


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        # Not installed: it does not appear in the report.
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _memory_bytes() -> int | None:
    # `sysconf` is POSIX, and the two names exist on Linux and most Unixes only
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _devices() -> _Devices:
    import torch

    from faccel.device_table import library_versions

    cpu_cores, memory_bytes = os.cpu_count(), _memory_bytes()
    if not torch.accelerator.is_available():
        return _Devices(cpu_cores, memory_bytes)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return _Devices(cpu_cores, memory_bytes)
    indices = range(torch.accelerator.device_count())
    cards = tuple(_accelerator(torch.device(accelerator.type, index)) for index in indices)
    return _Devices(cpu_cores, memory_bytes, cards, library_versions(accelerator.type))


def _accelerator(device: torch.device) -> _Accelerator:
    import torch

    from faccel.device_table import without_stage_warnings

    module: Any = torch.get_device_module(device)
    properties: object = None
    # Not every type has the function, and the devices may be in use or broken.
    with suppress(AttributeError, RuntimeError, ValueError), without_stage_warnings():
        properties = module.get_device_properties(device)
    name = getattr(properties, "name", device.type)
    return _Accelerator(device.type, str(name), int(getattr(properties, "total_memory", 0)))
