"""What stands for an offloaded parameter: shape, dtype and device, without memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from faccel.errors import ModelError

# What state dicts and `nn.Parameter` do with a tensor: they need no values.
_ALIASES = frozenset({"aten.detach.default", "aten.alias.default"})
_CAST = "aten._to_copy.default"  # `module.to(...)`


# A wrapper without memory instead of a tensor on meta: operations on meta tensors return results
# without values, or an error about devices that does not name the parameter. And `model.device` of
# transformers, which reads the first parameter, is the device that computes.
class OffloadedTensor(torch.Tensor):
    """A parameter whose values are in memory only while the forward of its unit runs.

    Attributes:
        full_name: Of the parameter.
        unit: Name of its unit.
        read: Returns a copy of the values on the CPU.
    """

    full_name: str
    unit: str
    read: Callable[[], torch.Tensor]

    @staticmethod
    def of(
        full_name: str,
        unit: str,
        like: torch.Tensor,
        device: torch.device,
        read: Callable[[], torch.Tensor],
    ) -> OffloadedTensor:
        """Return one with the shape and dtype of `like`; its device is the one that computes."""
        tensor: OffloadedTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            OffloadedTensor, like.shape, dtype=like.dtype, device=device, requires_grad=False
        )
        tensor.full_name, tensor.unit, tensor.read = full_name, unit, read
        return tensor

    # `copy.deepcopy`, `pickle` and `torch.save` of a module: the copy would have no values, and its
    # hooks would be those of the original.
    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            "a placed model cannot be copied or pickled",
            got=f"the offloaded parameter `{self.full_name}`",
            fix="place a second model from the same files, save `module.state_dict()`, or call "
            "`faccel.inference.materialize(placed)` first",
        )

    def __deepcopy__(self, memo: Any) -> Any:
        return self.__reduce_ex__(2)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        shape, dtype = list(self.shape), self.dtype
        return f"OffloadedTensor({self.full_name!r}, shape={shape}, dtype={dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        tensor = _first_offloaded([*args, *(kwargs or {}).values()])
        if str(func) in _ALIASES:
            return cls.of(tensor.full_name, tensor.unit, tensor, tensor.device, tensor.read)
        if str(func) == _CAST:
            raise ModelError(
                "a placed model cannot be moved or cast",
                got=f"the offloaded parameter `{tensor.full_name}`",
                # PyTorch casts one parameter after the other: those before this one are changed.
                fix="place the model again, with `budget=` and `dtype=` of "
                "`faccel.inference.place`, or call `faccel.inference.materialize(placed)` first",
            )
        # Reading the file for each such operation would work, and be slow without an error.
        raise ModelError(
            f"the offloaded parameter `{tensor.full_name}` is used outside of the forward of "
            f"`{tensor.unit}`",
            got=f"the operator {func}",
            fix="make one unit of both modules with `plan=faccel.Plan(units=...)`, place this unit "
            "on the device that computes, or call `faccel.inference.materialize(placed)`",
        )


def _first_offloaded(values: list[Any]) -> OffloadedTensor:
    for value in values:
        if isinstance(value, OffloadedTensor):
            return value
        if isinstance(value, (list, tuple)):
            inner = [item for item in value if isinstance(item, OffloadedTensor)]
            if inner:
                return inner[0]
    raise AssertionError("an operator without an offloaded tensor")
