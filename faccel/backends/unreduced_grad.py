"""The `.grad` of a shard while FSDP2 accumulates its gradient elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from faccel.errors import OptimizerError

_ZERO = (torch.ops.aten.zero_.default, torch.ops.aten._foreach_zero_.default)


class UnreducedGrad(DTensor):
    """A gradient that is not reduced yet: it can be cleared, and any other use of it raises.

    Once it is cleared, or FSDP2 has written into it, it is a DTensor like any other. It is the
    library's own tensor: nothing is attached to the user's.

    Attributes:
        reduced: The gradient that was reduced before, whose memory it has; None for zeros.
        is_cleared: Whether `zero_grad(set_to_none=False)` has cleared it.
    """

    reduced: DTensor | None
    is_cleared: bool

    @staticmethod
    def __new__(cls: type[UnreducedGrad], shard: Any, reduced: Any) -> UnreducedGrad:
        """Make the gradient of a shard.

        Args:
            shard: The parameter.
            reduced: Its `.grad`, which earlier backwards have reduced; may be None.
        """
        source: Any = reduced
        if reduced is None:
            source = torch.zeros_like(shard.detach())
        local = source._local_tensor
        grad: Any = DTensor.__new__(cls, local, shard._spec, requires_grad=False)
        grad.reduced = reduced
        grad.is_cleared = False
        grad._first_version = local._version
        return grad

    @property
    def is_unreduced(self) -> bool:
        """Whether it was neither cleared nor written."""
        # FSDP2 writes into the local tensor.
        version = self._local_tensor._version
        is_written = version != self._first_version  # type: ignore[attr-defined]
        return not self.is_cleared and not is_written

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"UnreducedGrad(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` on DTensors; raise if it would read a gradient that is not reduced."""
        if func in _ZERO:
            for grad in _tensors(args[0]):
                grad._local_tensor.zero_()
                # Set here, because an operation inside a dispatch changes no version.
                grad.is_cleared = True
            return args[0]
        # In a backward, autograd adds a gradient of the shard itself, as of a penalty on weights.
        is_backward = torch._C._current_graph_task_id() != -1  # pyright: ignore

        def as_dtensor(value: Any) -> Any:
            if not isinstance(value, UnreducedGrad):
                return value
            if value.is_unreduced and not is_backward:
                raise OptimizerError(
                    "a gradient is not reduced yet",
                    got=f"`{func}` of `.grad`, after a backward in `grad_sync(model, on=False)`",
                    fix="run the last micro-batch before the step with "
                    "`with faccel.grad_sync(model, on=True):`",
                )
            return DTensor(value._local_tensor, value._spec, requires_grad=False)

        return func(*tree_map(as_dtensor, args), **tree_map(as_dtensor, dict(kwargs or {})))


def _tensors(value: Any) -> Sequence[Any]:
    if isinstance(value, torch.Tensor):
        return (value,)
    return value
