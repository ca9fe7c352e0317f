"""Finds parameters that are used outside of the forward of their unit, before they are loaded."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from faccel.errors import ModelError, short_text, summary
from faccel.inference.placement import Placement
from faccel.inference.placement_units import UnitModule, placed_dtype
from faccel.tree import Tree, flatten


# Which parameters a module reads is visible only while it runs. PyTorch's fake tensors compute
# shapes without values, so that a model of any size runs without memory. Not the meta device:
# transformers asks for fake tensors, and then leaves out the branches that need values.
def check_uses(
    model: nn.Module,
    units: Sequence[UnitModule],
    placement: Placement,
    dtype: torch.dtype | None,
    sample: Tree,
) -> None:
    """Run the forward of a model without values, and raise for a use that would fail later.

    Effects: pure, unless the forward itself has effects.

    Args:
        model: The module.
        units: Its units.
        placement: Where they are.
        dtype: Of floating-point weights; None keeps them.
        sample: The arguments of forward: a tuple, a mapping of keywords, or the only argument.

    Raises:
        ModelError: Names the parameters and their units. Or forward cannot run without values.
    """
    device_of = placement.device_map
    away = [unit for unit in units if device_of[unit.name] != placement.compute_device]
    # Tensors without a device in the user's code, and those that are not parameters, are real.
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, torch.Tensor] = {}  # by the `id` of the parameter: ties stay ties
    tensors: dict[str, torch.Tensor] = {}
    with fake_mode:
        for name, param in model.named_parameters(remove_duplicate=False):
            if id(param) not in fakes:
                fakes[id(param)] = torch.empty(param.shape, dtype=placed_dtype(param.dtype, dtype))
            tensors[name] = fakes[id(param)]
        for name, buffer in model.named_buffers(remove_duplicate=False):
            tensors[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    units_of: dict[int, set[str]] = {}  # by the `id` of the fake tensor
    for unit in away:
        for param in unit.params.values():
            units_of.setdefault(id(fakes[id(param)]), set()).add(unit.name)
    uses = _Uses(units_of)
    with _tracked(away, uses.running):
        _run(model, tensors, sample, fake_mode, uses)
    if not uses.outside:
        return
    names = {id(param): name for name, param in reversed(tensors.items())}
    used = {names[key]: sorted(units_of[key])[0] for key in uses.outside}
    listed = ", ".join(f"`{name}` of the unit `{unit}`" for name, unit in used.items())
    unit = next(iter(used.values()))
    raise ModelError(
        "offloaded parameters are used outside of the forward of their unit",
        got=short_text(listed),
        fix="make one unit of both modules with `plan=faccel.Plan(units=...)`, or place this one "
        f'with `placement.with_device("{unit}", "{placement.compute_device}")`',
    )


class _Uses(TorchDispatchMode):
    """Records operators on parameters whose units are not running.

    Args:
        units_of: The units of each parameter, by `id`.
    """

    def __init__(self, units_of: Mapping[int, set[str]]) -> None:
        super().__init__()
        self._units_of = units_of
        self.running: list[str] = []
        self.outside: dict[int, None] = {}  # in the order of use

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in flatten((list(args), kwargs))[0]:
            units = self._units_of.get(id(leaf), set())
            if units and units.isdisjoint(self.running):
                self.outside[id(leaf)] = None
        return func(*args, **kwargs)


@contextmanager
def _tracked(units: Sequence[UnitModule], running: list[str]) -> Generator[None]:
    """Keep the names of the units whose forward runs in a list, which is updated."""
    handles: list[Any] = []
    try:
        for unit in units:
            begin, end = _hooks(unit.name, running)
            handles.append(unit.module.register_forward_pre_hook(begin, prepend=True))
            handles.append(unit.module.register_forward_hook(end, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(name: str, running: list[str]) -> tuple[Any, Any]:
    def begin(module: nn.Module, args: Any) -> None:
        running.append(name)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        running.remove(name)

    return begin, end


def _run(
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    sample: Tree,
    fake_mode: FakeTensorMode,
    uses: _Uses,
) -> None:
    args: tuple[Any, ...] = (_faked(sample, fake_mode),)
    kwargs: dict[str, Any] = {}
    if isinstance(sample, tuple):
        args = args[0]
    if isinstance(sample, Mapping):
        args, kwargs = (), dict(args[0])
    try:
        # Tensors that forward makes are fake, too.
        with torch.no_grad(), fake_mode, uses:
            torch.func.functional_call(model, tensors, args, kwargs)
    # Of any class: the user's forward runs.
    except Exception as error:
        raise ModelError(
            "the forward of the model does not run with `sample` without values",
            got=short_text(summary(error)),
            fix="pass the arguments of its forward; if it needs values, leave `sample` out: a "
            "parameter that is used outside of its unit then raises at its first use",
        ) from error


def _faked(sample: Tree, fake_mode: FakeTensorMode) -> Any:
    leaves, rebuild = flatten(sample)
    fakes: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            leaf = fake_mode.from_tensor(torch.empty_like(leaf, device="cpu"))
        fakes.append(leaf)
    return rebuild(fakes)
