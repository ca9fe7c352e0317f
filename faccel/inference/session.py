"""What a placed model holds while it runs: its hooks, its window and its original parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from faccel.errors import ModelError
from faccel.inference.copies import Copies, ReadRange, copies_to
from faccel.inference.placement import Placement
from faccel.inference.placement_units import UnitModule
from faccel.inference.set_tensors import set_param
from faccel.inference.unit_hooks import (
    MoveInputs,
    MoveOutputs,
    OffloadHooks,
    OneCall,
    ParamSlot,
    state_dict_hook,
)
from faccel.inference.window import OffloadedUnit, Source, Window
from faccel.offloaded_tensor import OffloadedTensor


@attrs.frozen(eq=False)
class ReadUnit:
    """The source of a unit: its parameters are read one after the other."""

    names: Sequence[str]
    read_range: ReadRange
    copies: Copies

    def read(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write the values into tensors."""
        for name, tensor in zip(self.names, tensors, strict=True):
            self.copies.read_param(self.read_range, name, tensor)


@attrs.frozen(eq=False)
class OriginalParam:
    """A parameter before the model was placed.

    Args:
        name: Its first name.
        param: The object.
        owners: Each module that has it, and its name there.
        shape: Its shape.
        dtype: That of its values while it is placed.
        requires_grad: Whether it required a gradient.
    """

    name: str
    param: nn.Parameter
    owners: Sequence[tuple[nn.Module, str]]
    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool


# PyTorch's public hooks put parameters into their places and take them away. Nothing is set on
# the user's modules that `close` does not remove, and `forward` stays the user's, so that
# methods such as `generate`, which call modules inside, work while a model is offloaded.
class Session:
    """The state of a placed model.

    Args:
        module: The user's module.
        originals: All parameters of the model, by `id`.
        read_range: Reads the values of a parameter that is offloaded.
        close: Called when the model is materialized.
    """

    def __init__(
        self,
        module: nn.Module,
        originals: Mapping[int, OriginalParam],
        read_range: ReadRange,
        close: Callable[[], None],
    ) -> None:
        self.module = module
        self.originals = originals
        self._positions = {key: index for index, key in enumerate(originals)}
        self.read_range = read_range
        self.window: Window | None = None
        self._close = close
        self._handles: list[Any] = []
        self._unit_hooks: list[OffloadHooks] = []
        self.is_open = True
        self.offloaded: set[int] = set()

    def check_open(self) -> None:
        """Raise unless the model is still placed.

        Raises:
            ModelError: It was materialized.
        """
        if not self.is_open:
            raise ModelError(
                "the model was materialized",
                got=f"a {type(self.module).__name__}",
                fix="call the module that `materialize` returned",
            )

    def offload(self, units: Sequence[UnitModule], capacity: int, device: torch.device) -> None:
        """Replace the parameters of units by placeholders, and register the hooks. Updates them."""
        # Units with the same parameters, such as a tied head and embedding, are read once.
        window_names: dict[str, str] = {}
        keys_of: dict[str, frozenset[int]] = {}
        name_of: dict[frozenset[int], str] = {}
        for unit in units:
            keys = frozenset(map(id, unit.params.values()))
            window_names[unit.name] = name_of.setdefault(keys, unit.name)
            keys_of[window_names[unit.name]] = keys
            # `materialize` reads these again, and moves the others.
            self.offloaded.update(keys)
        if not units:
            return
        copies = copies_to(device, [self._num_bytes(key) for key in self.offloaded])
        offloaded: dict[str, OffloadedUnit] = {}
        for name, keys in keys_of.items():
            offloaded[name] = self._offloaded_unit(keys, copies)
        # A placement counts bytes without those that align parameters in a buffer.
        capacity += 2 * max(unit.num_padding_bytes for unit in offloaded.values())
        self.window = Window(offloaded, capacity, copies)
        placeholders: dict[int, nn.Parameter] = {}
        for unit in units:
            self._hook(unit, window_names[unit.name], placeholders, device)
        # The first hook of all, so that units are out of use before the first one is loaded.
        one_call = OneCall(self._reset)
        self._handles += [
            self.module.register_forward_pre_hook(one_call.begin, prepend=True, with_kwargs=True),
            self.module.register_forward_hook(one_call.end, always_call=True),
        ]

    def _reset(self) -> None:
        for hooks in self._unit_hooks:
            hooks.reset()
        if self.window is not None:
            self.window.release_all()

    def _num_bytes(self, key: int) -> int:
        original = self.originals[key]
        return original.shape.numel() * original.dtype.itemsize

    def _offloaded_unit(self, keys: frozenset[int], copies: Copies) -> OffloadedUnit:
        names: list[str] = []
        shapes: list[torch.Size] = []
        dtypes: list[torch.dtype] = []
        for key in sorted(keys, key=self._positions.__getitem__):
            original = self.originals[key]
            names.append(original.name)
            shapes.append(original.shape)
            dtypes.append(original.dtype)
        source: Source = ReadUnit(names, self.read_range, copies)
        return OffloadedUnit(shapes, dtypes, source)

    def _hook(
        self,
        unit: UnitModule,
        window_name: str,
        placeholders: dict[int, nn.Parameter],
        device: torch.device,
    ) -> None:
        assert self.window is not None
        keys = sorted(
            {id(param) for param in unit.params.values()}, key=self._positions.__getitem__
        )
        slots: list[ParamSlot] = []
        by_owner: dict[nn.Module, dict[str, nn.Parameter]] = {}
        for index, key in enumerate(keys):
            original = self.originals[key]
            # A tied parameter has one placeholder, so that it stays one parameter.
            if key not in placeholders:
                placeholders[key] = self._placeholder(original, unit.name, device)
            inside = set(map(id, unit.module.modules()))
            for owner, param_key in original.owners:
                if id(owner) in inside:
                    slots.append(ParamSlot(owner, param_key, placeholders[key], index))
                    by_owner.setdefault(owner, {})[param_key] = placeholders[key]
                    set_param(owner, param_key, placeholders[key])
            _free(original.param)
        hooks = OffloadHooks(window_name, slots, self.window)
        self._unit_hooks.append(hooks)
        module = unit.module
        self._handles += [
            module.register_forward_pre_hook(hooks.load, prepend=True, with_kwargs=True),
            module.register_forward_hook(hooks.unload, always_call=True),
        ]
        for owner, params in by_owner.items():
            self._handles.append(owner.register_state_dict_post_hook(state_dict_hook(params)))

    def _placeholder(
        self, original: OriginalParam, unit: str, device: torch.device
    ) -> nn.Parameter:
        def read() -> torch.Tensor:
            values = torch.empty(original.shape, dtype=original.dtype)
            self.read_range(original.name, values, 0)
            return values

        like = torch.empty(original.shape, dtype=original.dtype, device="meta")
        tensor = OffloadedTensor.of(original.name, unit, like, device, read)
        return nn.Parameter(tensor, requires_grad=False)

    def move_tensors(
        self, placement: Placement, units: Sequence[UnitModule], compute: torch.device
    ) -> None:
        """Register the hooks that move inputs and outputs between devices. Updates the modules."""
        device_of = placement.device_map
        for unit in units:
            device = compute
            if device_of[unit.name] not in ("cpu", "disk"):
                device = torch.device(device_of[unit.name])
            # Before the user's hooks, which may compute with the inputs.
            self._handles.append(
                unit.module.register_forward_pre_hook(
                    MoveInputs(device).move, prepend=True, with_kwargs=True
                )
            )
        # As Accelerate: the caller computes with the outputs beside its inputs.
        outputs = MoveOutputs()
        self._handles += [
            self.module.register_forward_pre_hook(outputs.remember, prepend=True, with_kwargs=True),
            self.module.register_forward_hook(outputs.move, always_call=True),
        ]

    def close(self) -> None:
        """Remove the hooks, and free the memory for units in use. Updates the module."""
        # Hooks of the user stay.
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.window is not None:
            self.window.close()
        self._close()
        self.is_open = False


def _free(param: nn.Parameter) -> None:
    """Free the memory of a parameter that a placeholder has replaced; the object stays."""
    # The optimizer of a model that is materialized later has this object.
    if not param.is_meta:
        param.data = param.data.new_empty(0)
