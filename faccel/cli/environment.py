"""What `faccel env` finds: versions, devices, the place in the world and the configuration."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import attrs

from faccel.cli.output import fields_document
from faccel.config import Config
from faccel.context import DistContext

_PACKAGES = ("faccel", "torch", "numpy", "safetensors", "tensordict", "transformers", "datasets", "deepspeed",
             "torchao", "torch-xla")  # fmt: skip


def describe(config: Config, ctx: DistContext | None) -> dict[str, Any]:
    """Return it as a document that JSON can hold; what is not there is left out."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "platform": platform.platform(),
        "devices": {"cpu_cores": os.cpu_count(), "memory_bytes": _memory(), **_accelerators()},
        **(
            {}
            if ctx is None
            else {"device": str(ctx.device), "topology": attrs.asdict(ctx.topology)}
        ),
        "config": fields_document(config),
    }


def as_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the document for people, without the configuration."""
    devices = document["devices"]
    cards = devices.get("accelerators", [])
    memory = devices["memory_bytes"]
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in document["versions"].items())),
        ("platform", document["platform"]),
        ("cpu", f"{devices['cpu_cores']} cores" + (f", {memory / 2**30:.1f} GiB" if memory else "")),
        *((f"{card['kind']}:{i}", f"{card['name']}, {card['memory_bytes'] / 2**30:.1f} GiB")
          for i, card in enumerate(cards)),
        *(_place(document["device"], document["topology"]) if "topology" in document else ()),
    ]  # fmt: skip
    libraries = ", ".join(
        f"{name} {version}" for name, version in devices.get("libraries", {}).items()
    )
    return [*rows, *([("libraries", libraries)] if libraries else [])]


def _place(device: str, topology: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (("rank", "rank", "world_size"), ("local", "local_rank", "local_world_size"),
             ("machine", "node_rank", "num_nodes"))  # fmt: skip
    place = ", ".join(
        f"{name} {topology[part]} of {topology[whole]}" for name, part, whole in pairs
    )
    address = topology["main_address"]
    meeting = f", meeting at {address}:{topology['main_port']}" if address else ""
    return [("device", device), ("place", place), ("said by", topology["source"] + meeting)]


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _accelerators() -> dict[str, Any]:
    import torch

    if not torch.accelerator.is_available():
        return {}
    kind = torch.accelerator.current_accelerator()
    found: dict[str, Any] = {"accelerators": []}
    if kind is not None and kind.type == "cuda":
        from torch.cuda import nccl

        every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found["accelerators"] = [
            {"kind": "cuda", "name": p.name, "memory_bytes": p.total_memory} for p in every
        ]
        version = nccl.version() if torch.distributed.is_nccl_available() else ()
        found["libraries"] = {
            "CUDA": str(torch.version.cuda or torch.version.hip),
            "NCCL": ".".join(map(str, version)),
        }
    elif kind is not None:
        found["accelerators"] = [{"kind": kind.type, "name": kind.type, "memory_bytes": 0}] * (
            torch.accelerator.device_count()
        )
    return found
