"""The units of a placement: the modules whose parameters are on one device, and never split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import nn

from faccel.checks import instance_of, shown
from faccel.errors import ConfigError
from faccel.parallel.units import block_names
from faccel.plan import Plan

_MIN_BYTES = 2  # of an element that operators compute with


@attrs.frozen(eq=False)
class UnitModule:
    """A module whose parameters are placed together.

    Args:
        name: Of the module; "" is the root.
        module: The module.
        params: Parameters by their full names, in order; a tied one has each of its names.
        is_pinned: Whether the unit stays on the device that computes: another unit runs inside of
            its forward, so that it is in use all the time.
    """

    name: str
    module: nn.Module
    params: dict[str, torch.Tensor]
    is_pinned: bool

    def num_bytes(self, dtype: torch.dtype | None) -> int:
        """Return the size of the parameters, each counted once."""
        return sum(sizes_by_param(self.params.values(), dtype).values())


def sizes_by_param(
    params: Iterator[torch.Tensor] | Sequence[torch.Tensor] | object, dtype: torch.dtype | None
) -> dict[int, int]:
    """Return the sizes of parameters in bytes by `id`, in the dtype of a placement."""
    sizes: dict[int, int] = {}
    for param in params:  # type: ignore[attr-defined]
        sizes[id(param)] = param.numel() * placed_dtype(param.dtype, dtype).itemsize
    return sizes


# Buffers are not part of units: they are small, some are computed and not stored, and training mode
# writes into them, which an eviction would undo.
def placed_dtype(dtype: torch.dtype, target: torch.dtype | None) -> torch.dtype:
    """Return the dtype of a placed tensor: as `nn.Module.to`, ints and bools keep theirs."""
    if target is None or not dtype.is_floating_point:
        return dtype
    return target


def check_dtype(dtype: object) -> None:
    """Raise unless weights can be cast to a dtype and compute in it.

    Raises:
        ConfigError: It is not a floating-point dtype, or has 8 bits.
    """
    if dtype is None:
        return
    fix = "write `dtype=torch.bfloat16`"
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(
            "`dtype` must be a floating-point dtype of PyTorch", got=shown_dtype(dtype), fix=fix
        )
    if dtype.itemsize < _MIN_BYTES:
        raise ConfigError(
            "models do not compute in this `dtype`",
            got=str(dtype),
            fix=f"{fix}, or load 8 bits by `faccel.inference.load_quantized(model, path, ctx)`",
        )


def shown_dtype(dtype: object) -> str:
    """Return a dtype, or another value, in one short line."""
    if isinstance(dtype, torch.dtype):
        return str(dtype)
    return shown(dtype)


def plan_argument(plan: Plan | None) -> Plan:
    """Return a plan; None is `Plan()`.

    Raises:
        ConfigError: It is something else.
    """
    if plan is None:
        return Plan()
    instance_of("plan", plan, Plan, fix="write `plan=faccel.Plan(units=...)`")
    return plan


def unit_modules(module: nn.Module, plan: Plan) -> list[UnitModule]:
    """Return the units of a model, in the order in which its modules are defined.

    Blocks are not split: the modules of `plan.units`, else those of `_no_split_modules`, else the
    members of module lists. Outside of them, each module that has parameters is a unit with all
    inside of it.
    """
    blocks = {id(module.get_submodule(name)) for name in block_names(module, plan)}
    units: list[UnitModule] = []
    _collect(module, "", blocks, units, set())
    return units


def _collect(
    module: nn.Module, name: str, blocks: set[int], units: list[UnitModule], visited: set[int]
) -> None:
    # A module that two parents hold is a unit under its first name.
    # Its parameters would count twice otherwise.
    if id(module) in visited:
        return
    visited.add(id(module))
    # Parameters of a module with blocks inside are used while the blocks run.
    has_params = next(module.parameters(recurse=False), None) is not None
    has_blocks = any(id(inner) in blocks for inner in module.modules() if inner is not module)
    if id(module) in blocks or (has_params and not has_blocks):
        _add(module, name, units, recurse=True)
        visited.update(map(id, module.modules()))
        return
    if has_params:
        _add(module, name, units, recurse=False)
    for key, child in module.named_children():
        _collect(child, f"{name}.{key}" if name else key, blocks, units, visited)


def _add(module: nn.Module, name: str, units: list[UnitModule], *, recurse: bool) -> None:
    prefix = f"{name}." if name else ""
    # All names of a tied parameter, also inside of one unit.
    params: dict[str, torch.Tensor] = {}
    for key, param in module.named_parameters(recurse=recurse, remove_duplicate=False):
        params[prefix + key] = param
    if params:
        units.append(UnitModule(name, module, params, is_pinned=not recurse))
