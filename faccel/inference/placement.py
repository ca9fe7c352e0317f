"""The record of a placement: which unit of a model is on which device, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from faccel.checks import instance_of
from faccel.errors import ConfigError, nearest
from faccel.inference.budget import device_name, is_accelerator, size_text
from faccel.parallel.units import matches


@attrs.frozen(kw_only=True)
class PlacedUnit:
    """A unit of a model on its device.

    Args:
        name: Of the module; "" is what the root uses itself.
        device: "cuda:0", "cpu" or "disk".
        num_bytes: Size of its parameters.
        tied_bytes: The part of `num_bytes` that an earlier unit of the group counts.
        group: Name of the first unit that has a tied parameter of this one; else its name.
        is_pinned: Whether the unit must be on the device that computes, because other units run
            inside of its forward.
    """

    name: str
    device: str
    num_bytes: int
    tied_bytes: int = 0
    group: str = ""
    is_pinned: bool = False


@attrs.frozen(kw_only=True)
class Placement:
    """Which unit of a model is on which device. `print` shows it as a table.

    Args:
        units: The units in the order in which the model defines them.
        budget: Bytes of each device: accelerators, then "cpu", then "disk".
        buffer_bytes: Size of the model's buffers, which stay on the device that computes.
    """

    units: tuple[PlacedUnit, ...]
    budget: tuple[tuple[str, int], ...]
    buffer_bytes: int = 0

    @property
    def compute_device(self) -> str:
        """The device that computes units without an accelerator: the first of the budget."""
        return self.budget[0][0]

    @property
    def device_map(self) -> dict[str, str]:
        """The device of each unit by its name, as `strategy` of `placement_for` accepts it."""
        return {unit.name: unit.device for unit in self.units}

    def is_offloaded(self, unit: PlacedUnit) -> bool:
        """Return whether a unit is copied to the device that computes before each use."""
        return unit.device != self.compute_device and not is_accelerator(unit.device)

    @property
    def bytes_on(self) -> dict[str, int]:
        """The bytes of weights on each device; a tied parameter counts once."""
        # Devices without units are listed, too: their budget is free.
        sizes = dict.fromkeys(dict(self.budget), 0)
        sizes[self.compute_device] += self.buffer_bytes
        for unit in self.units:
            sizes[unit.device] += unit.num_bytes - unit.tied_bytes
        return sizes

    @property
    def pinned_bytes(self) -> int:
        """The bytes that must be on the device that computes: buffers, and what the root uses."""
        size = self.buffer_bytes
        for unit in self.units:
            if unit.is_pinned:
                size += unit.num_bytes - unit.tied_bytes
        return size

    @property
    def window_bytes(self) -> int:
        """The bytes of the device that computes for offloaded units in use: what is left of it."""
        if not any(map(self.is_offloaded, self.units)):
            return 0
        device = self.compute_device
        return dict(self.budget)[device] - self.bytes_on[device]

    @property
    def transfer_bytes(self) -> dict[str, int]:
        """The bytes that one forward pass reads from "cpu" and "disk", if each unit runs once."""
        sizes: dict[str, int] = {}
        for unit in filter(self.is_offloaded, self.units):
            sizes[unit.device] = sizes.get(unit.device, 0) + unit.num_bytes
        return sizes

    def with_device(self, name: str, device: str) -> Placement:
        """Return the placement with units on another device, and the units of their groups.

        Args:
            name: Name of a unit, or a pattern such as `"layers.*"`.
            device: A device of the budget.

        Raises:
            ConfigError: No unit matches, or the budget has no such device.
        """
        instance_of("name", name, str, fix='write `placement.with_device("layers.*", "disk")`')
        target = device_name(device, "device")
        if target not in dict(self.budget):
            raise ConfigError(
                f"the budget has no device `{target}`",
                got=str(device),
                fix=nearest(target, dict(self.budget)),
            )
        names = list(self.device_map)
        matched = {name} if name in names else set(matches(name, names))
        if not matched:
            raise ConfigError(f"no unit matches `{name}`", got=name, fix=nearest(name, names))
        # A tied unit takes the others with it.
        groups = {unit.group for unit in self.units if unit.name in matched}
        units: list[PlacedUnit] = []
        for unit in self.units:
            # A tied parameter is stored once.
            if unit.group in groups:
                unit = attrs.evolve(unit, device=target)
            units.append(unit)
        return attrs.evolve(self, units=tuple(units))

    def __str__(self) -> str:
        width = max(map(len, ["(root)", *self.device_map]))
        lines = [f"{'unit':<{width}}  device    bytes"]
        for unit in self.units:
            line = (
                f"{unit.name or '(root)':<{width}}  {unit.device:<8}  {size_text(unit.num_bytes)}"
            )
            if unit.group != unit.name:
                line += f", tied to {unit.group or '(root)'}"
            lines.append(line)
        for device, num_bytes in self.bytes_on.items():
            budget = size_text(dict(self.budget)[device])
            lines.append(f"{device}: {size_text(num_bytes)} of {budget}")
        if self.window_bytes:
            lines.append(f"window for offloaded units: {size_text(self.window_bytes)}")
        for device, num_bytes in self.transfer_bytes.items():
            lines.append(f"read from {device} in each forward: {size_text(num_bytes)}")
        return "\n".join(lines)


def check_placement(placement: Placement) -> None:
    """Raise unless the units of a placement fit its devices.

    Raises:
        ConfigError: Names the unit or the device, and the sizes.
    """
    _check_devices(placement)
    budget = dict(placement.budget)
    # One unit at least is on the device that computes while it runs.
    largest = 0
    for unit in filter(placement.is_offloaded, placement.units):
        largest = max(largest, unit.num_bytes)
    for device, num_bytes in placement.bytes_on.items():
        needed = num_bytes
        if device == placement.compute_device:
            needed += largest
        # The message has both parts, because either can be made smaller.
        if needed > budget[device]:
            got = f"{size_text(needed)} for {size_text(budget[device])}"
            if needed > num_bytes:
                got += f", of it {size_text(largest)} to run the largest unit that is offloaded"
            raise ConfigError(
                f"the units on `{device}` do not fit its budget",
                got=got,
                fix="move units with `placement.with_device(name, device)`, or raise the budget",
            )


def _check_devices(placement: Placement) -> None:
    budget: Mapping[str, int] = dict(placement.budget)
    # A record that was edited by hand is checked as one from `placement_for`.
    device_of_group: dict[str, PlacedUnit] = {}
    for unit in placement.units:
        if unit.device not in budget:
            raise ConfigError(
                f"the unit `{unit.name}` is on a device without a budget",
                got=unit.device,
                fix=nearest(unit.device, budget),
            )
        # Its values must be there while the units inside of it run.
        if unit.is_pinned and placement.is_offloaded(unit):
            raise ConfigError(
                f"the parameters of `{unit.name or '(root)'}` cannot be offloaded: other units run "
                "inside of its forward",
                got=unit.device,
                fix=f"place it on `{placement.compute_device}`",
            )
        first = device_of_group.setdefault(unit.group, unit)
        if first.device != unit.device:
            raise ConfigError(
                "a tied parameter is on two devices",
                got=f"`{first.name}` on {first.device}, `{unit.name}` on {unit.device}",
                fix="place both units on one device",
            )
