"""`placement_for`: chooses the device of each unit from a budget. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import nn

from faccel.checks import instance_of, one_of
from faccel.errors import ConfigError, ModelError, nearest, short_repr
from faccel.inference.budget import DISK, device_name, is_accelerator, parse_budget, size_text
from faccel.inference.placement import PlacedUnit, Placement, check_placement
from faccel.inference.placement_units import (
    UnitModule,
    check_dtype,
    placed_dtype,
    plan_argument,
    sizes_by_param,
    unit_modules,
)
from faccel.plan import Plan

STRATEGIES = ("balanced", "sequential")


def placement_for(
    model: nn.Module,
    budget: Mapping[str, str | int],
    *,
    strategy: str | Mapping[str, str] = "balanced",
    dtype: torch.dtype | None = None,
    plan: Plan | None = None,
) -> Placement:
    """Choose the device of each unit of a model, in the order in which its modules are defined.

    Effects: pure. The model may be on the meta device: only shapes and dtypes are read.

    A unit is a block of the model (see `Plan.units`), or another module that has parameters. Units
    with a tied parameter are on one device. If the accelerators cannot hold all units, the first
    one reserves room for two of the largest units: one in use, and the next one.

    Args:
        model: The module.
        budget: Bytes of weights by device, such as `{"cuda:0": "20GB", "cpu": "60GB"}`. Without
            an accelerator, the CPU computes.
        strategy: `"sequential"` fills one device after the other. `"balanced"` gives accelerators
            that can hold the model equal parts. Or a mapping from names of modules to devices; the
            longest name that contains a unit applies.
        dtype: That floating-point weights are cast to; None keeps them.
        plan: For its `units`; None is `Plan()`.

    Returns:
        A record that can be printed and edited.

    Raises:
        ConfigError: The budget is invalid or too small; the message names the largest unit. Or a
            mapping splits a unit or a tie, or leaves out a unit.

    Examples:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> placement_for(net, {"cuda:0": 100, "cuda:1": 100}).device_map
        {'0': 'cuda:0', '1': 'cuda:1'}
    """
    instance_of("model", model, nn.Module, fix="pass the module itself", error=ModelError)
    check_dtype(dtype)
    units = unit_modules(model, plan_argument(plan))
    sizes = parse_budget(budget)
    placement = Placement(
        units=tuple(_unplaced(units, next(iter(sizes)), dtype)),
        budget=tuple(sizes.items()),
        buffer_bytes=buffer_bytes(model, dtype),
    )
    if isinstance(strategy, Mapping):
        placement = _with_map(placement, strategy)
    else:
        one_of("strategy", strategy, STRATEGIES)
        placement = _filled(placement, is_balanced=strategy == "balanced")
    check_placement(placement)
    return placement


def buffer_bytes(model: nn.Module, dtype: torch.dtype | None) -> int:
    """Return the size of the buffers of a model in the dtype of a placement."""
    total = 0
    for buffer in model.buffers():
        total += buffer.numel() * placed_dtype(buffer.dtype, dtype).itemsize
    return total


def _unplaced(
    units: Sequence[UnitModule], device: str, dtype: torch.dtype | None
) -> list[PlacedUnit]:
    """Return the units on the first device, in groups of those with a tied parameter."""
    groups = _groups(units)
    # A tie to a pinned unit is pinned, too.
    pinned_groups = set[str]()
    for unit in units:
        if unit.is_pinned:
            pinned_groups.add(groups[unit.name])
    counted: set[int] = set()
    placed: list[PlacedUnit] = []
    for unit in units:
        sizes = sizes_by_param(unit.params.values(), dtype)
        group = groups[unit.name]
        placed.append(
            PlacedUnit(
                name=unit.name,
                device=device,
                num_bytes=sum(sizes.values()),
                tied_bytes=sum(size for key, size in sizes.items() if key in counted),
                group=group,
                is_pinned=group in pinned_groups,
            )
        )
        counted.update(sizes)
    return placed


def _groups(units: Sequence[UnitModule]) -> dict[str, str]:
    """Return the name of the first unit of the group of each unit."""
    group_of: dict[str, str] = {}
    owner: dict[int, str] = {}
    for unit in units:
        group_of[unit.name] = unit.name
        for param in unit.params.values():
            first = group_of[owner.setdefault(id(param), unit.name)]
            current = group_of[unit.name]
            if first != current:  # joins two groups under the name of the earlier one
                for name, group in group_of.items():
                    if group == current:
                        group_of[name] = first
    return group_of


@attrs.frozen
class _Group:
    name: str
    num_bytes: int
    is_pinned: bool


def _filled(placement: Placement, *, is_balanced: bool) -> Placement:
    groups = _sizes_of_groups(placement.units)
    budget = dict(placement.budget)
    device = placement.compute_device
    computing = list(filter(is_accelerator, budget)) or ["cpu"]
    caps = dict(zip(computing, map(budget.__getitem__, computing), strict=True))
    caps[device] -= placement.buffer_bytes
    # Without room for a window first: if all units fit, none is offloaded.
    chosen = _fill(groups, caps)
    if chosen is not None:  # the devices that compute can hold all
        if is_balanced:
            chosen = _balanced(groups, caps)
        return _on(placement, chosen)
    caps = {**budget, device: caps[device] - _reserve(placement)}
    # What is in use all the time comes first.
    pinned: dict[str, str] = {}
    others: list[_Group] = []
    for group in groups:
        if group.is_pinned:
            pinned[group.name] = device
            caps[device] -= group.num_bytes
        else:
            others.append(group)
    chosen = _fill(others, caps)
    if caps[device] < 0 or chosen is None:
        raise _too_small(placement, groups)
    return _on(placement, chosen | pinned)


def _sizes_of_groups(units: Sequence[PlacedUnit]) -> list[_Group]:
    sizes: dict[str, int] = {}
    pinned: set[str] = set()
    for unit in units:
        sizes[unit.group] = sizes.get(unit.group, 0) + unit.num_bytes - unit.tied_bytes
        if unit.is_pinned:
            pinned.add(unit.group)
    return [_Group(name, size, name in pinned) for name, size in sizes.items()]


# In order, without a search: the order of definition is nearly that of use, so that activations
# move between two accelerators once. A better packing of the last bytes would move them more
# often.
def _fill(groups: Sequence[_Group], caps: Mapping[str, int]) -> dict[str, str] | None:
    """Fill devices in order; None if a group is left over.

    A device that has no room for the next group gets no later one, unless the group is larger than
    all of the device.
    """
    devices = list(caps)
    index, used = 0, dict.fromkeys(devices, 0)
    chosen: dict[str, str] = {}
    for group in groups:
        target = index
        while target < len(devices):
            device = devices[target]
            if used[device] + group.num_bytes <= caps[device]:
                break
            # Neighbours stay on one device: activations move once between two devices.
            if target == index and group.num_bytes <= caps[device]:
                index += 1
            target += 1
        if target == len(devices):
            return None
        used[devices[target]] += group.num_bytes
        chosen[group.name] = devices[target]
    return chosen


# The largest part decides when the first device is full, and how large a batch can be.
# Minimizing it over contiguous parts is the linear partition problem; with a cap c the greedy
# filling succeeds if any filling does, so that the smallest c is found in log2(bytes) fillings.
def _balanced(groups: Sequence[_Group], caps: Mapping[str, int]) -> dict[str, str]:
    """Return the filling in order whose largest device has the fewest bytes."""
    # Each prefix that a smaller cap admits, a larger one does: binary search.
    low, high = max(group.num_bytes for group in groups), max(caps.values())
    while low < high:
        middle = (low + high) // 2
        if _fill(groups, _at_most(middle, caps)) is None:
            low = middle + 1
        else:
            high = middle
    chosen = _fill(groups, _at_most(low, caps))
    return chosen or _fill(groups, caps) or {}


def _at_most(limit: int, caps: Mapping[str, int]) -> dict[str, int]:
    return {name: min(limit, cap) for name, cap in caps.items()}


def _reserve(placement: Placement) -> int:
    """Return the room for two of the largest units; for one, where two do not fit.

    Raises:
        ConfigError: The largest unit does not fit.
    """
    # Of a tied embedding and head, only one is in use at a time.
    # Pinned units are not in the window: they are counted as resident.
    largest_of_group: dict[str, int] = {}
    for unit in placement.units:
        if not unit.is_pinned:
            size = max(unit.num_bytes, largest_of_group.get(unit.group, 0))
            largest_of_group[unit.group] = size
    sizes = sorted(largest_of_group.values(), reverse=True)
    device = placement.compute_device
    free = dict(placement.budget)[device] - placement.pinned_bytes
    # With room for one, reading does not overlap with computation, and the model still runs.
    for num_units in (2, 1):
        if sum(sizes[:num_units]) <= free:
            return sum(sizes[:num_units])
    largest = max(placement.units, key=lambda unit: unit.num_bytes)
    raise ConfigError(
        f"the budget of `{device}` is too small for the largest unit, `{largest.name}`",
        got=f"{size_text(free)} without buffers, for {size_text(largest.num_bytes)}",
        fix=f"raise the budget of `{device}`, or choose smaller units with `plan=faccel.Plan(units"
        "=...)`",
    )


def _too_small(placement: Placement, groups: Sequence[_Group]) -> ConfigError:
    budget = dict(placement.budget)
    total = sum(group.num_bytes for group in groups) + placement.buffer_bytes
    room = _reserve(placement)
    fix = "raise the budget"
    # A disk takes any rest, as long as the units in use fit the memory.
    if DISK not in budget:
        fix = 'add `"disk": "100GB"`, to read the other units from the file in each forward'
    return ConfigError(
        "the model does not fit the budget",
        got=f"{size_text(total)} of weights, and {size_text(room)} for the units in use, for "
        f"{', '.join(map(': '.join, zip(budget, map(size_text, budget.values()), strict=True)))}",
        fix=fix,
    )


def _on(placement: Placement, device_of_group: Mapping[str, str]) -> Placement:
    units = [attrs.evolve(unit, device=device_of_group[unit.group]) for unit in placement.units]
    return attrs.evolve(placement, units=tuple(units))


def _with_map(placement: Placement, device_map: Mapping[str, str]) -> Placement:
    names = list(placement.device_map)
    # First all keys: a misspelled one would leave its units to a shorter key, without an error.
    for key in device_map:
        _check_key(key, names)
    units: list[PlacedUnit] = []
    for unit in placement.units:
        parts = unit.name.split(".")
        # The longest name that contains the unit: "layers.0", then "layers", then "".
        prefixes = list(itertools.accumulate(parts, lambda a, b: f"{a}.{b}"))
        for key in [*reversed(prefixes), ""]:
            if key in device_map:
                device = device_name(device_map[key], f"strategy[{short_repr(key)}]")
                units.append(attrs.evolve(unit, device=device))
                break
        else:
            raise ConfigError(
                f"`strategy` has no device for the unit `{unit.name}`",
                got=short_repr(dict(device_map)),
                fix=f'add `"{unit.name}": "cpu"`, or `"": "cpu"` for all others',
            )
    return attrs.evolve(placement, units=tuple(units))


def _check_key(key: str, names: Sequence[str]) -> None:
    contains = any(name == key or not key or name.startswith(f"{key}.") for name in names)
    if contains:
        return
    outer = [name for name in names if key.startswith(f"{name}.")]
    if outer:
        raise ConfigError(
            f"`strategy` splits the unit `{outer[0]}`",
            got=short_repr(key),
            fix=f'write `"{outer[0]}"`, or choose other units with `plan=faccel.Plan(units=...)`',
        )
    raise ConfigError(
        f"`strategy` names no unit `{key}`", got=short_repr(key), fix=nearest(key, names)
    )
