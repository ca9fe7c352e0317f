"""What an update does to the gradients of one optimizer before it applies them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from faccel.context import DistContext
from faccel.errors import ConfigError, OptimizerError
from faccel.tree import is_dtensor, local_tensor


def parameters_with_gradients(opt: Optimizer, ctx: DistContext) -> list[torch.Tensor]:
    """Return the parameters of `opt` that a gradient has reached.

    Raises:
        OptimizerError: There is none; a stage of a pipeline may have none.
    """
    found = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
    if not found and ctx.mesh.spec.pp == 1:
        raise OptimizerError(
            "no gradient has reached a parameter of this optimizer",
            got=f"{sum(len(g['params']) for g in opt.param_groups)} parameters, all with `.grad` None",
            fix="call `scaled_backward` on a loss of its model first, and make the optimizer from `model.parameters()` "
            "of what `faccel.wrap` returned",
        )
    return found


def apply(opt: Optimizer) -> None:
    """Step `opt`, without a closure.

    Raises:
        OptimizerError: It needs one.
    """
    try:
        opt.step()
    except TypeError as error:
        if "closure" not in str(error):
            raise
        raise OptimizerError(
            "this optimizer evaluates the loss itself, through a closure",
            got=f"a {type(opt).__name__}",
            fix="call `opt.step(closure)` yourself, with `scaled_backward` in the closure",
        ) from error


def check_limits(norm: float | None, value: float | None) -> None:
    """Refuse a limit that is not positive."""
    for name, limit in (("clip_norm", norm), ("clip_value", value)):
        if limit is not None and not limit > 0:
            raise ConfigError(
                f"`{name}` must be positive", got=str(limit), fix="leave it out to clip nothing"
            )


@attrs.frozen(eq=False)
class _Part:
    """What torch's clipping takes for a parameter: this rank's part of its gradient."""

    grad: torch.Tensor


def clip_(
    params: Sequence[torch.Tensor], norm: float | None, value: float | None, ctx: DistContext
) -> torch.Tensor | None:
    """Clip the gradients of `params` in place, by their total norm, then by value.

    Neither waits for the device. Collective over the ranks that hold different parts of the gradients.

    Args:
        params: Parameters with gradients.
        norm: The largest 2-norm of all gradients together; `float("inf")` measures without clipping.
        value: The largest magnitude of an element.
        ctx: The world.

    Returns:
        The norm from before clipping, 0-d; None where `norm` is.
    """
    if ctx.is_replicated:
        return _clip(params, norm, value, get_total_norm)
    counted = [p.grad for p in params if p.grad is not None and not hasattr(p, "_faccel_name")]
    parts: Any = [_Part(local_tensor(p.grad)) for p in params if p.grad is not None]
    return _clip(parts, norm, value, lambda _: total_norm(counted, ctx))


def _clip(
    params: Any,
    norm: float | None,
    value: float | None,
    measure: Callable[[list[torch.Tensor]], torch.Tensor],
) -> torch.Tensor | None:
    total = None
    if norm is not None:
        total = measure([p.grad for p in params if p.grad is not None])
        clip_grads_with_norm_(params, norm, total)
    if value is not None:
        clip_grad_value_(params, value)
    return total


def total_norm(grads: Sequence[torch.Tensor], ctx: DistContext) -> torch.Tensor:
    """Return the 2-norm of all gradients together, 0-d; of those that are spread over ranks all parts count, once.

    torch's own is wrong or fails where gradients lie on several meshes. One all-reduce of a few numbers for each axis
    over which some gradient is spread.
    """
    groups: dict[tuple[str, ...], list[torch.Tensor]] = {}
    for grad in grads:
        groups.setdefault(_spread_over(grad), []).append(local_tensor(grad))
    if not groups:  # a stage of a pipeline in which nothing is trained
        squares = torch.zeros(1, dtype=torch.float64, device=ctx.device)
    else:
        squares = torch.stack(
            [get_total_norm(parts).to(ctx.device).square() for parts in groups.values()]
        )
    for axis in sorted({axis for axes in groups for axis in axes}):
        here = [i for i, axes in enumerate(groups) if axis in axes]
        squares[here] = ctx.comm.all_reduce(squares[here], "sum", axis)
    square = squares.sum()
    if ctx.mesh.spec.pp > 1:
        square = ctx.comm.all_reduce(square.double(), "sum", "pp").to(square.dtype)
    return square.sqrt()


def _spread_over(grad: Any) -> tuple[str, ...]:
    """Return the axes on which ranks hold different parts of a gradient."""
    if not is_dtensor(grad):
        return ()
    # `is_shard` is False for the strided shards of FSDP over tensor parallel
    names = grad.device_mesh.mesh_dim_names
    return tuple(
        name for name, place in zip(names, grad.placements, strict=True) if not place.is_replicate()
    )
