"""Gradient clipping, and the checks before an optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import attrs
import torch
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from faccel.checks import positive
from faccel.context import DistContext
from faccel.errors import OptimizerError
from faccel.tree import is_dtensor, local_tensor


def parameters_with_gradients(opt: Optimizer, ctx: DistContext) -> list[torch.Tensor]:
    """Return the parameters of `opt` whose `.grad` is not None.

    Raises:
        OptimizerError: No parameter has a gradient. Not raised for a pipeline, where all
            parameters of a stage may be frozen.
    """
    params: list[torch.Tensor] = []
    for group in opt.param_groups:
        params += [param for param in group["params"] if param.grad is not None]
    if not ctx.is_replicated:
        params = [param for param in params if not is_unreduced(param.grad)]
    if not params and ctx.mesh.spec.pp == 1:
        num_params = sum(len(group["params"]) for group in opt.param_groups)
        raise OptimizerError(
            "`opt` has no parameter with a gradient",
            got=f"{num_params} parameters, all with `.grad` None or not reduced yet",
            fix="write `scaler = faccel.scaled_backward(loss, scaler, ctx)` first, the last one "
            "with `grad_sync(model, on=True)`, and make the optimizer from `model.parameters()` "
            "after `faccel.wrap`",
        )
    return params


def mark_unreduced(grad: torch.Tensor) -> None:
    """Mark a gradient of a sharded parameter as a placeholder for one that is not reduced yet.

    Updates `grad`, a tensor of the library; writing into it removes the mark.
    """
    grad.unreduced_version = _version(grad)  # type: ignore[attr-defined]


def is_unreduced(grad: torch.Tensor | None) -> bool:
    """Return whether `grad` is a placeholder that was not written since `mark_unreduced`."""
    version = getattr(grad, "unreduced_version", None)
    return grad is not None and version is not None and version == _version(grad)


def _version(grad: torch.Tensor) -> int:
    # An operation on a DTensor changes its version only; FSDP2 writes into the local tensor.
    return grad._version + local_tensor(grad)._version


def step_optimizer(opt: Optimizer) -> None:
    """Step `opt`, without a closure.

    Raises:
        OptimizerError: Its `step` needs a closure.
    """
    try:
        opt.step()
    except TypeError as error:
        # Python's message for the missing argument; any other TypeError is the optimizer's.
        if "closure" not in str(error):
            raise
        raise OptimizerError(
            "`optimizer_step` does not support an optimizer that needs a closure",
            got=f"a {type(opt).__name__}",
            fix="call `opt.step(closure)` yourself, with `scaled_backward` in the closure",
        ) from error


def check_limits(clip_norm: float | None, clip_value: float | None) -> None:
    """Raise unless the limits are positive or None.

    Raises:
        ConfigError: One is not positive.
    """
    if clip_norm is not None:
        positive("clip_norm", clip_norm)
    if clip_value is not None:
        positive("clip_value", clip_value)


@attrs.frozen(eq=False)
class _LocalGrad:
    """Stands for a parameter in torch's clipping functions: `.grad` is this rank's shard."""

    grad: torch.Tensor


def clip_(
    params: Sequence[torch.Tensor],
    clip_norm: float | None,
    clip_value: float | None,
    ctx: DistContext,
    *,
    tied_copies: Mapping[int, str],
) -> torch.Tensor | None:
    """Clip the gradients of `params` in place, by their total norm, then by value.

    Neither waits for the device. Collective over the ranks that have different shards.

    Args:
        params: Parameters with gradients.
        clip_norm: The largest 2-norm of all gradients together; `float("inf")` only measures.
        clip_value: The largest magnitude of an element.
        ctx: The context.
        tied_copies: As in `Parallelism.tied_copies`: parameters that another rank counts.

    Returns:
        The norm before clipping, 0-d; None without `clip_norm`.
    """
    # Replicas have equal gradients, so that each computes the same norm without communication.
    if ctx.is_replicated:
        return _clip(params, clip_norm, clip_value, get_total_norm)
    # torch clips what has `.grad`. It gets local shards, because its functions fail where DTensors
    # of several meshes are mixed.
    shards: list[_LocalGrad] = []
    counted: list[torch.Tensor] = []
    for param in params:
        if param.grad is not None:
            shards.append(_LocalGrad(local_tensor(param.grad)))
            # The rank of the first copy of a tied parameter counts its gradient.
            if id(param) not in tied_copies:
                counted.append(param.grad)
    stand_ins = cast("Sequence[torch.Tensor]", shards)
    return _clip(stand_ins, clip_norm, clip_value, lambda _: total_norm(counted, ctx))


def _clip(
    params: Sequence[torch.Tensor],
    clip_norm: float | None,
    clip_value: float | None,
    measure: Callable[[list[torch.Tensor]], torch.Tensor],
) -> torch.Tensor | None:
    norm = None
    if clip_norm is not None:
        # torch's two halves of `clip_grad_norm_`, with another norm between them. Neither reads
        # a value on the host.
        norm = measure([param.grad for param in params if param.grad is not None])
        clip_grads_with_norm_(params, clip_norm, norm)
    if clip_value is not None:
        clip_grad_value_(params, clip_value)
    return norm


def total_norm(grads: Sequence[torch.Tensor], ctx: DistContext) -> torch.Tensor:
    """Return the 2-norm of all gradients together, 0-d. Each shard counts once.

    torch's `get_total_norm` is wrong or fails where gradients are on several meshes. One
    all-reduce of a few numbers for each axis over which a gradient is sharded.
    """
    by_axes: dict[tuple[str, ...], list[torch.Tensor]] = {}
    for grad in grads:
        by_axes.setdefault(_sharded_axes(grad), []).append(local_tensor(grad))
    # squares[i] is the sum of squares of the shards here whose axes are the i-th key of `by_axes`
    if by_axes:
        # Norms of offloaded parameters are on the CPU.
        norms = [get_total_norm(shards).to(ctx.device) for shards in by_axes.values()]
        squares = torch.stack(norms).square()
    else:  # a pipeline stage without trainable parameters
        squares = torch.zeros(1, dtype=torch.float64, device=ctx.device)
    all_axes: set[str] = set().union(*by_axes)
    # Sorted, because every rank must reduce over the axes in the same order.
    for axis in sorted(all_axes):
        indices = [index for index, axes in enumerate(by_axes) if axis in axes]
        squares[indices] = ctx.comm.all_reduce(squares[indices], "sum", axis)
    # norm^2 = sum over groups of the sum of squares of their shards
    total = squares.sum()
    if ctx.mesh.spec.pp > 1:
        # In double, because stages may have gradients of different dtypes.
        total = ctx.comm.all_reduce(total.double(), "sum", "pp").to(total.dtype)
    return total.sqrt()


def _sharded_axes(grad: torch.Tensor) -> tuple[str, ...]:
    """Return the mesh axes on which ranks have different shards of a gradient."""
    if not is_dtensor(grad):
        return ()
    # Not `is_shard()`: it is False for the strided shards of FSDP over tensor parallel.
    names: tuple[str, ...] = grad.device_mesh.mesh_dim_names  # type: ignore[attr-defined]
    placements = zip(names, grad.placements, strict=True)  # type: ignore[attr-defined]
    return tuple(name for name, placement in placements if not placement.is_replicate())
