"""Budgets: how many bytes of weights each device may hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from faccel.checks import parse_size, shown
from faccel.errors import ConfigError, short_repr, summary

DISK = "disk"
_EXAMPLE = 'write `budget={"cuda:0": "20GB", "cpu": "60GB", "disk": "200GB"}`'


def parse_budget(budget: object) -> dict[str, int]:
    """Return the bytes of each device: accelerators in the given order, then "cpu", then "disk".

    Effects: pure.

    Raises:
        ConfigError: A device or a size is invalid.

    Examples:
        >>> parse_budget({"disk": "1TB", "cpu": "1.5GB"})
        {'cpu': 1500000000, 'disk': 1000000000000}
    """
    if not isinstance(budget, Mapping) or not budget:
        raise ConfigError(
            "`budget` must be a mapping from devices to sizes", got=shown(budget), fix=_EXAMPLE
        )
    sizes: dict[str, int] = {}
    for device, size in budget.items():
        name = device_name(device, "budget")
        if name in sizes:
            raise ConfigError(
                f"`budget` has the device `{name}` twice", got=short_repr(budget), fix=_EXAMPLE
            )
        sizes[name] = parse_size(size, f"budget[{short_repr(device)}]")
    if set(sizes) == {DISK}:
        raise ConfigError(
            "`budget` has no device that computes",
            got=short_repr(budget),
            fix='add memory for the weights in use, as in `{"cpu": "1GB", "disk": "10GB"}`',
        )
    return {name: sizes[name] for name in sorted(sizes, key=_rank)}


def _rank(name: str) -> int:
    # A stable sort keeps the order of the accelerators.
    return {"cpu": 1, DISK: 2}.get(name, 0)


def device_name(device: object, argument: str) -> str:
    """Return the name of a device with its index; "cpu" and "disk" have none.

    Raises:
        ConfigError: It is not a device.
    """
    if device == DISK:
        return DISK
    try:
        parsed = torch.device(device)  # type: ignore[arg-type]
    except (RuntimeError, TypeError):
        parsed = None
    # A model on meta has no values: nothing computes there.
    if parsed is None or parsed.type == "meta":
        raise ConfigError(
            f"`{argument}` has an unknown device",
            got=short_repr(device),
            fix='name an accelerator such as "cuda:0", "cpu" or "disk"',
        )
    # The host has one memory, whatever index a device of it has.
    if parsed.type == "cpu":
        return "cpu"
    return f"{parsed.type}:{parsed.index or 0}"


def available_device(device: object, argument: str) -> torch.device:
    """Return a device on which this process can compute.

    Effects: ambient: asks PyTorch.

    Raises:
        ConfigError: It is not a device, or this process does not have it.
    """
    name = device_name(device, argument)
    problem = "it has no memory for tensors"
    if name != DISK:
        try:
            torch.empty(0, device=name)
        # PyTorch raises asserts, too, and each plugin another class.
        except Exception as error:
            problem = summary(error)
        else:
            return torch.device(name)
    raise ConfigError(
        f"the device `{name}` of `{argument}` is unavailable",
        got=problem,
        fix="name a device of this process, such as `ctx.device`",
    )


def is_accelerator(name: str) -> bool:
    """Return whether a device of a placement is neither the host nor the disk."""
    return name not in ("cpu", DISK)


def size_text(num_bytes: int) -> str:
    """Return a size for people, in decimal units.

    Effects: pure.

    Examples:
        >>> size_text(1_234_567), size_text(12)
        ('1.23 MB', '12 B')
    """
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes} B"
