"""The gradient of a gather: each rank gets the sum of all ranks' gradients of its rows.

Let `y` be the gathered rows and `L_r` the loss of rank `r`. The gradient of row `i` of this rank is
`sum_r dL_r/dy_i`. A model with averaged gradients then gets the gradient of `mean_r L_r`, as one
process does that computes all losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from faccel.comm.pack import pad_to
from faccel.context import DistContext


@attrs.frozen(eq=False)
class GatherCall:
    """The part of a gather that its gradient needs.

    Args:
        gather: Gathers the leaves of this rank.
        counts: Valid rows of each rank, in rank order; None if all ranks have as many as this one.
        ctx: The world.
        axis: The axis of the gather.
    """

    gather: Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]
    counts: list[int] | None
    ctx: DistContext
    axis: str


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(fn_ctx: Any, call: GatherCall, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fn_ctx.call = call
        fn_ctx.shapes = [leaf.shape for leaf in leaves]
        outputs = call.gather(leaves)
        fn_ctx.mark_non_differentiable(*[out for out in outputs if not _has_gradient(out)])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        fn_ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        own_grads: list[torch.Tensor | None] = []
        for grad, shape in zip(grads, fn_ctx.shapes, strict=True):
            # Also for a leaf that needs no gradient here: another rank may need it.
            own_grad = _own_gradient(grad, shape, fn_ctx.call) if _has_gradient(grad) else None
            own_grads.append(own_grad)
        return None, *own_grads


def _has_gradient(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _own_gradient(grad: torch.Tensor, shape: torch.Size, call: GatherCall) -> torch.Tensor:
    """Return the sum over the ranks of the gradients `grad: T[rows of all ranks, ...]`."""
    comm, axis = call.ctx.comm, call.axis
    size = comm.size(axis)
    counts = call.counts
    if counts is None or not shape:  # a 0-d leaf is one row, which is never dropped
        counts = [grad.shape[0] // size] * size
    pieces = [pad_to(piece, max(counts)) for piece in grad.split(counts)]
    # Row `r` is sent to rank `r`: a reduce-scatter, which sums in the order of the ranks.
    rows = comm.all_to_all(torch.stack(pieces), axis)
    own_grad = rows.sum(0)[: counts[comm.rank(axis)]]
    if not shape:
        return own_grad.reshape(shape)
    # Rows that were dropped have no influence on any loss.
    return pad_to(own_grad, shape[0])


def gather_with_gradients(call: GatherCall, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Gather leaves so that gradients flow back to the ranks they came from.

    Effects: collective, and so is backward.
    """
    return list(_Gather.apply(call, *leaves))  # type: ignore[call-overload]
