"""Gradients averaged over the data ranks after a backward, without DDP's reducer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from faccel.comm.buckets import BUCKET_CAP_MB, summed_buckets
from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.mesh import DATA


def average_grads(
    params: Mapping[str, nn.Parameter], changed: Sequence[bool], ctx: DistContext
) -> None:
    """Replace the gradients that a backward has changed by their means over the data ranks.

    Updates `.grad`; collective. A gradient that `create_graph` has made keeps its graph, that of
    this rank's loss: the value is the mean, and a later backward averages the derivative.

    Args:
        params: The parameters, with the same names in the same order on all ranks.
        changed: Whether the backward has changed the gradient of each, on this rank.
        ctx: The context.

    Raises:
        ModelError: A gradient is sparse.
    """
    # Ranks may have used different parameters: each takes part in all reductions.
    flags = torch.tensor(changed, dtype=torch.int32, device=ctx.device)
    changed_somewhere = ctx.comm.all_reduce(flags, "max", DATA).tolist()
    grads: dict[str, torch.Tensor] = {}
    for (name, param), is_changed in zip(params.items(), changed_somewhere, strict=True):
        if is_changed:
            grads[name] = _dense_grad(name, param)
    sums = summed_buckets(grads, ctx, bucket_cap_mb=BUCKET_CAP_MB, call="scaled_backward")
    for bucket in sums:
        for name, total in bucket.items():
            _set_value(params[name], total / ctx.data_world_size)


def _dense_grad(name: str, param: nn.Parameter) -> torch.Tensor:
    if param.grad is None:
        return torch.zeros_like(param, requires_grad=False)
    if param.grad.is_sparse:
        raise ModelError(
            "several backwards over one forward do not support sparse gradients",
            got=f"`{name}`",
            fix="write `nn.Embedding(..., sparse=False)`, or leave `retain_graph` out",
        )
    return param.grad.detach()


def _set_value(param: nn.Parameter, mean: torch.Tensor) -> None:
    """Write the mean into `.grad`, and keep the graph of `.grad`."""
    grad = param.grad
    if grad is None:
        param.grad = mean.clone()  # a view would keep its whole bucket in memory
    elif grad.requires_grad:
        param.grad = grad + (mean - grad.detach())
    else:
        grad.copy_(mean)
