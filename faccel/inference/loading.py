"""From files to a placed module: everything is read before the module is changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from faccel.checkpoint.tensor_names import first_names
from faccel.errors import ConfigError, ModelError, short_text
from faccel.inference.budget import DISK, available_device, is_accelerator, size_text
from faccel.inference.copies import ReadRange
from faccel.inference.outside_uses import check_uses
from faccel.inference.placement import Placement, check_placement
from faccel.inference.placement_units import UnitModule, check_dtype, placed_dtype, unit_modules
from faccel.inference.session import OriginalParam, Session
from faccel.inference.set_tensors import set_buffer, set_param
from faccel.offloaded_tensor import OffloadedTensor
from faccel.plan import Plan
from faccel.training.module_names import uncompiled
from faccel.tree import Tree


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and the stored buffers of a model, under all of their names."""
    state = model.state_dict(keep_vars=True)  # the objects themselves: equal ones are tied
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def check_not_compiled(model: nn.Module) -> None:
    """Raise for what `torch.compile(model)` has returned.

    Raises:
        ModelError: Its parameters have other names than in the files.
    """
    if uncompiled(model) is not model:
        raise ModelError(
            "the model is compiled",
            got=f"an object of type {type(model).__name__}",
            fix="load the weights first, then write `torch.compile(model)`",
        )


def check_placeable(model: nn.Module) -> None:
    """Raise if a model was placed and not materialized, or has parameters of another class.

    Raises:
        ModelError: Names the parameter.
    """
    for name, param in model.named_parameters():
        if isinstance(param, OffloadedTensor):
            raise ModelError(
                "the model is placed already",
                got=f"the offloaded parameter `{name}`",
                fix="call `faccel.inference.materialize(placed)` first",
            )
        # Shards, quantized weights, and those of lazy modules: their memory is not shape x dtype.
        if type(param) is not nn.Parameter:
            raise ModelError(
                f"the parameter `{name}` is not an ordinary one",
                got=f"a {type(param).__name__}",
                fix="pass a model that is not wrapped or quantized, best built inside of "
                "`faccel.inference.on_meta()`",
            )


def check_buffers(model: nn.Module, stored: Mapping[str, object]) -> None:
    """Raise if a buffer has no values, neither in the model nor in the files.

    Raises:
        ModelError: Names the buffers.
    """
    names = {name for name, buffer in model.named_buffers() if buffer.is_meta}
    missing = names - stored.keys()
    if missing:
        raise ModelError(
            "buffers are on the meta device, and the files do not have them",
            got=first_names(missing),
            fix="build the model inside of `faccel.inference.on_meta()`, which keeps the values of "
            "buffers",
        )


def check_matches(
    placement: Placement, units: Sequence[UnitModule], dtype: torch.dtype | None
) -> None:
    """Raise unless a placement is one of the model in a dtype.

    Raises:
        ConfigError: It has other or smaller units, or does not fit its devices.
    """
    names = {unit.name for unit in units}
    placed = {unit.name: unit.num_bytes for unit in placement.units}
    if names != placed.keys():
        raise ConfigError(
            "`placement` is not one of this model",
            got=f"different units: {short_text(first_names(names ^ placed.keys()))}",
            fix="write `placement = faccel.inference.placement_for(model, budget)`, with the same "
            "`plan`",
        )
    for unit in units:
        num_bytes = unit.num_bytes(dtype)
        # The memory would exceed the budget.
        if num_bytes > placed[unit.name]:
            raise ConfigError(
                "`placement` is for a smaller model, or for a dtype with fewer bytes",
                got=f"`{unit.name or '(root)'}`: {size_text(num_bytes)} in the model, "
                f"{size_text(placed[unit.name])} in the placement",
                fix="pass the same model and `dtype` to `placement_for` and `place`",
            )
    check_placement(placement)


class Loader:
    """Reads the weights of a model, then changes the model.

    Args:
        model: The module.
        placement: Where its units are.
        plan: For its units.
        dtype: Of floating-point weights; None keeps the model's.
        read_range: Reads the stored values of a name into a tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        plan: Plan,
        dtype: torch.dtype | None,
        read_range: ReadRange,
    ) -> None:
        self._model, self._placement = model, placement
        self._dtype, self._read_range = dtype, read_range
        check_dtype(dtype)
        self._units = unit_modules(model, plan)
        check_matches(placement, self._units, dtype)
        for device in filter(is_accelerator, dict(placement.budget)):
            available_device(device, "budget")
        self._compute = torch.device(placement.compute_device)
        self._device_of = placement.device_map
        self._originals = original_params(model, dtype)
        self._resident: dict[int, torch.Tensor] = {}  # on the devices that compute
        self._host: dict[str, torch.Tensor] = {}  # copied to an accelerator before each use
        self._buffers: list[tuple[nn.Module, str, torch.Tensor]] = []

    def check_uses(self, sample: Tree) -> None:
        """Raise if a parameter is used outside of the forward of its unit; without a sample, never.

        Raises:
            ModelError: Names the parameters.
        """
        if sample is not None:
            check_uses(self._model, self._units, self._placement, self._dtype, sample)

    def read(self, stored: Mapping[str, object]) -> None:
        """Read everything but the units on disk.

        Args:
            stored: The names in the files; other buffers keep their values.
        """
        # Nothing of the model is changed yet: an error leaves it as it was.
        for unit in self._units:
            for param in unit.params.values():
                self._read_resident(unit, self._originals[id(param)])
        for module, name, full_name, buffer in named_buffers(self._model):
            dtype = placed_dtype(buffer.dtype, self._dtype)
            device = self._device_of_buffer(full_name)
            if full_name in stored:
                value = torch.empty(buffer.shape, dtype=dtype, device=device)
                self._read_range(full_name, value, 0)
            else:  # computed by the model: it keeps its dtype, as the frequencies of rotary ones
                value = buffer.to(device)
            self._buffers.append((module, name, value))

    def _device_of_buffer(self, full_name: str) -> torch.device:
        for unit in self._units:
            is_inside = full_name.startswith(f"{unit.name}.") or not unit.name
            if is_inside and is_accelerator(self._device_of[unit.name]):
                return torch.device(self._device_of[unit.name])
        return self._compute

    def _read_resident(self, unit: UnitModule, original: OriginalParam) -> None:
        key, device = id(original.param), self._device_of[unit.name]
        is_read = key in self._resident or original.name in self._host
        if device == DISK or is_read:
            return
        # A tied parameter is read for its first unit.
        if device == "cpu" and is_accelerator(self._placement.compute_device):
            value = torch.empty(original.shape, dtype=original.dtype)
            self._host[original.name] = value
        else:
            value = torch.empty(original.shape, dtype=original.dtype, device=device)
            self._resident[key] = value
        self._read_range(original.name, value, 0)

    def install(self, close: Callable[[], None]) -> Session:
        """Put the weights and the hooks into the model, which it updates.

        Args:
            close: Called when the model is materialized.
        """
        session = Session(self._model, self._originals, self._read_offloaded, close)
        for key, value in self._resident.items():
            _put(self._originals[key], value)
        for module, name, value in self._buffers:
            set_buffer(module, name, value)
        offloaded: list[UnitModule] = []
        for unit, placed in zip(self._units, self._placement.units, strict=True):
            if self._placement.is_offloaded(placed):
                offloaded.append(unit)
        if is_accelerator(self._placement.compute_device):
            session.move_tensors(self._placement, self._units, self._compute)
        # The last hooks, because they come first in forward.
        session.offload(offloaded, self._placement.window_bytes, self._compute)
        return session

    def _read_offloaded(self, name: str, tensor: torch.Tensor, start: int) -> None:
        if name in self._host:
            copy_range(self._host[name], tensor, start)
        else:
            self._read_range(name, tensor, start)


def copy_range(source: torch.Tensor, tensor: torch.Tensor, start: int) -> None:
    """Write the elements of a tensor from `start` on into another one. Updates `tensor`."""
    if tensor.shape == source.shape:
        tensor.copy_(source)
        return
    # A chunk; the whole of a large tensor is not made contiguous for it.
    tensor.copy_(source.reshape(-1)[start : start + tensor.numel()])


def _put(original: OriginalParam, value: torch.Tensor) -> None:
    """Give a parameter its values, without gradients; the object stays if it had memory."""
    param = original.param
    # PyTorch cannot change the device of a parameter on meta.
    if param.is_meta:
        param = nn.Parameter(value, requires_grad=False)
    else:
        param.requires_grad_(False)
        param.data = value
    for owner, name in original.owners:
        set_param(owner, name, param)


def original_params(model: nn.Module, dtype: torch.dtype | None) -> dict[int, OriginalParam]:
    """Return the parameters of a model by `id`, with their owners, in the order of the model."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(param), []).append((module, name))
    # In the order of the model, which is usually that of the file: reads are sequential.
    originals: dict[int, OriginalParam] = {}
    for name, param in model.named_parameters():
        originals[id(param)] = OriginalParam(
            name,
            param,
            owners[id(param)],
            param.shape,
            placed_dtype(param.dtype, dtype),
            param.requires_grad,
        )
    return originals


def named_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, torch.Tensor]]:
    """Yield each buffer with its module, its name there and its full name."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            yield module, name, f"{prefix}.{name}" if prefix else name, buffer
