"""Gradient clipping, and the checks before an optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

import attrs
import torch
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from faccel.checks import positive, positive_or_tensor
from faccel.context import DistContext
from faccel.device_table import widest_dtype
from faccel.errors import OptimizerError
from faccel.training.precision import StepGuard
from faccel.tree import is_dtensor, local_tensor
from faccel.update_options import UpdateOptions


def parameters_with_gradients(opt: Optimizer, ctx: DistContext) -> list[torch.Tensor]:
    """Return the parameters of `opt` whose `.grad` is not None.

    Raises:
        OptimizerError: A gradient is not reduced yet, or no parameter has one. The latter is not
            raised for a pipeline, where all parameters of a stage may be frozen.
    """
    params: list[torch.Tensor] = []
    for group in opt.param_groups:
        params += [param for param in group["params"] if param.grad is not None]
    if not ctx.is_replicated:
        _check_reduced(params)
    if not params and ctx.mesh.spec.pp == 1:
        num_params = sum(len(group["params"]) for group in opt.param_groups)
        raise OptimizerError(
            "`opt` has no parameter with a gradient",
            got=f"{num_params} parameters, all with `.grad` None",
            fix="write `scaler = faccel.scaled_backward(loss, scaler, ctx)` first, and make the "
            "optimizer from `model.parameters()` after `faccel.wrap`",
        )
    return params


def _check_reduced(params: Sequence[torch.Tensor]) -> None:
    """Raise if the last backward of a parameter did not reduce its gradient."""
    unreduced = [param for param in params if is_unreduced(param.grad)]
    if unreduced:
        raise OptimizerError(
            "the gradients are not reduced over the data ranks",
            got=f"gradients of {len(unreduced)} parameters, not reduced yet: every backward since "
            "the last update was in `grad_sync(model, on=False)`",
            fix="run the last micro-batch of the update in `grad_sync(model, on=True)`: "
            "`with faccel.grad_sync(model, on=micro.sync)` in a window, or without `grad_sync`",
        )


def is_unreduced(grad: torch.Tensor | None) -> bool:
    """Return whether `grad` stands for a gradient that FSDP2 has accumulated and not reduced."""
    # The attribute of the tensor that stands for it.
    return getattr(grad, "is_unreduced", False)


def step_optimizer(opt: Optimizer, guard: StepGuard | None) -> None:
    """Step `opt`, without a closure. `guard` is its guard in fp16.

    Raises:
        OptimizerError: Its `step` needs a closure, or does not support sharded parameters.
    """
    try:
        if guard is None:
            opt.step()
        else:
            with guard.open():
                opt.step()
    except TypeError as error:
        # Python's message for the missing argument; any other TypeError is the optimizer's.
        if "closure" not in str(error):
            raise
        fix = "call `opt.step(closure)` yourself, with `scaled_backward` in the closure"
        if guard is not None:  # the closure's gradients would be multiplied by the loss scale
            fix = 'write `faccel.init(mixed_precision="bf16")`, and ' + fix
        raise OptimizerError(
            "`optimizer_step` does not support an optimizer that needs a closure",
            got=f"a {type(opt).__name__}",
            fix=fix,
        ) from error
    except RuntimeError as error:
        # Words of DTensor's errors about operations that it cannot do on shards.
        if not any(word in str(error) for word in ("DTensor", "placement", "sharded dimension")):
            raise
        raise OptimizerError(
            "the step of `opt` does not support sharded parameters",
            got=f"a {type(opt).__name__}: {str(error).splitlines()[0]}",
            fix='write `faccel.init(mesh="dp_replicate=-1")`, or use an element-wise optimizer '
            "such as AdamW",
        ) from error


def check_limits(options: UpdateOptions) -> None:
    """Raise unless the limits are positive, 0-d tensors or None.

    Raises:
        ConfigError: One is not positive.
    """
    if options.norm_type != 2.0:  # the default, in a step without any limit
        positive("norm_type", options.norm_type)
    if options.clip_norm is not None:
        positive_or_tensor("clip_norm", options.clip_norm)
    if options.clip_value is not None:
        positive_or_tensor("clip_value", options.clip_value)


def ids_of(params: Iterable[torch.Tensor] | None, opt: Optimizer) -> Collection[int] | None:
    """Return the `id` of each parameter; None for None.

    Raises:
        OptimizerError: A parameter is not one of `opt`.
    """
    if params is None:
        return None
    ids = set(map(id, params))
    opt_ids: set[int] = set()
    for group in opt.param_groups:
        opt_ids.update(map(id, group["params"]))
    num_others = len(ids - opt_ids)
    if num_others:
        # Its gradient may be scaled still, or dropped already by another optimizer's step.
        raise OptimizerError(
            "`clip_params` must be parameters of `opt`",
            got=f"{num_others} other parameters",
            fix="pass parameters of one optimizer; for others, call `faccel.unscale`, "
            "`faccel.grad_norm(params, ctx)` and `torch.nn.utils.clip_grads_with_norm_`",
        )
    return ids


@attrs.frozen(eq=False)
class _LocalGrad:
    """Stands for a parameter in torch's clipping functions: `.grad` is this rank's shard."""

    grad: torch.Tensor


def clip_(
    params: Sequence[torch.Tensor],
    options: UpdateOptions,
    ctx: DistContext,
    *,
    tied_copies: Mapping[int, str],
) -> torch.Tensor | None:
    """Clip the gradients of `params` in place, by their total norm, then by value.

    Neither waits for the device. Collective over the ranks that have different shards.

    Args:
        params: Parameters with gradients.
        options: The limits, and the parameters that `clip_norm` is for.
        ctx: The context.
        tied_copies: As in `Parallelism.tied_copies`: parameters that another rank counts.

    Returns:
        The norm before clipping, 0-d; None without `clip_norm`.
    """
    norm = None
    if options.clip_norm is not None:
        if options.clip_params is None:
            measured = params
        else:
            measured = [param for param in params if id(param) in options.clip_params]
        norm = norm_of(measured, ctx, options.norm_type, tied_copies=tied_copies)
        _scale_to_norm(_stand_ins(measured, ctx), options.clip_norm, norm)
    if options.clip_value is not None:
        _clip_value(_stand_ins(params, ctx), options.clip_value)
    return norm


def _stand_ins(params: Sequence[torch.Tensor], ctx: DistContext) -> Sequence[torch.Tensor]:
    """Return what torch's functions clip: parameters, or records with this rank's shards."""
    if ctx.is_replicated:
        return params
    # Its functions fail where DTensors of several meshes are mixed.
    shards: list[_LocalGrad] = []
    for param in params:
        if param.grad is not None:
            shards.append(_LocalGrad(local_tensor(param.grad)))  # noqa: PERF401
    return cast("Sequence[torch.Tensor]", shards)


def _scale_to_norm(
    params: Sequence[torch.Tensor], limit: float | torch.Tensor, norm: torch.Tensor
) -> None:
    if isinstance(limit, torch.Tensor):
        # torch reads `max_norm` on the host. Its factor is `max_norm / (norm + 1e-6)`, at most 1:
        # `max_norm=1` and the norm below give the same one.
        norm = (norm + 1e-6) / limit.to(norm.device) - 1e-6
        limit = 1.0
    clip_grads_with_norm_(params, limit, norm)


def _clip_value(params: Sequence[torch.Tensor], limit: float | torch.Tensor) -> None:
    if not isinstance(limit, torch.Tensor):
        clip_grad_value_(params, limit)
        return
    for param in params:
        if param.grad is not None:
            bound = limit.to(param.grad)
            param.grad.clamp_(-bound, bound)


def norm_of(
    params: Sequence[torch.Tensor],
    ctx: DistContext,
    norm_type: float,
    *,
    tied_copies: Mapping[int, str],
) -> torch.Tensor:
    """Return the norm of the gradients of `params` together, 0-d.

    Collective over the ranks that have different shards. The arguments are those of `clip_`.
    """
    # The rank of the first copy of a tied parameter counts its gradient.
    counted = [param for param in params if id(param) not in tied_copies]
    grads = [param.grad for param in counted if param.grad is not None]
    # Replicas have equal gradients, so that each computes the same norm without communication.
    if ctx.is_replicated:
        return get_total_norm(grads, norm_type)
    return total_norm(grads, ctx, norm_type)


def total_norm(
    grads: Sequence[torch.Tensor], ctx: DistContext, norm_type: float = 2.0
) -> torch.Tensor:
    """Return the norm of all gradients together, 0-d. Each shard counts once.

    torch's `get_total_norm` is wrong or fails where gradients are on several meshes. One
    all-reduce of a few numbers for each axis over which a gradient is sharded.
    """
    by_axes: dict[tuple[str, ...], list[torch.Tensor]] = {}
    for grad in grads:
        by_axes.setdefault(_sharded_axes(grad), []).append(local_tensor(grad))
    # powers[i] is sum |x|^p over the shards here whose axes are the i-th key of `by_axes`. The
    # norm of order infinity is the largest |x|.
    op = "sum"
    if norm_type == math.inf:
        op = "max"
    if by_axes:
        # Norms of offloaded parameters are on the CPU.
        norms = [_local_norm(shards, norm_type, ctx) for shards in by_axes.values()]
        powers = _power(torch.stack(norms), norm_type)
    else:  # a pipeline stage without trainable parameters
        powers = torch.zeros(1, dtype=widest_dtype(ctx.device), device=ctx.device)
    all_axes: set[str] = set().union(*by_axes)
    # Sorted, because every rank must reduce over the axes in the same order.
    for axis in sorted(all_axes):
        indices = [index for index, axes in enumerate(by_axes) if axis in axes]
        powers[indices] = ctx.comm.all_reduce(powers[indices], op, axis)
    # |x|^p = sum over groups of the sums of their shards
    total = powers.max() if op == "max" else powers.sum()
    if ctx.mesh.spec.pp > 1:
        # In the widest type, because stages may have gradients of different dtypes.
        wide_total = total.to(widest_dtype(ctx.device))
        total = ctx.comm.all_reduce(wide_total, op, "pp").to(total.dtype)
    return _root(total, norm_type)


def _local_norm(shards: Sequence[torch.Tensor], norm_type: float, ctx: DistContext) -> torch.Tensor:
    # A rank may have no rows of a small parameter, and an empty tensor has no largest element.
    filled = [shard for shard in shards if shard.numel() > 0]
    if not filled:
        return torch.zeros((), dtype=shards[0].dtype, device=ctx.device)
    return get_total_norm(filled, norm_type).to(ctx.device)


def _power(norms: torch.Tensor, norm_type: float) -> torch.Tensor:
    if norm_type == math.inf:
        return norms
    # torch computes `square` and `sqrt` exactly rounded, and `pow` not.
    if norm_type == 2.0:
        return norms.square()
    return norms**norm_type


def _root(total: torch.Tensor, norm_type: float) -> torch.Tensor:
    if norm_type == math.inf:
        return total
    if norm_type == 2.0:
        return total.sqrt()
    return total ** (1.0 / norm_type)


def _sharded_axes(grad: torch.Tensor) -> tuple[str, ...]:
    """Return the mesh axes on which ranks have different shards of a gradient."""
    if not is_dtensor(grad):
        return ()
    # Not `is_shard()`: it is False for the strided shards of FSDP over tensor parallel.
    names: tuple[str, ...] = grad.device_mesh.mesh_dim_names  # type: ignore[attr-defined]
    placements = zip(names, grad.placements, strict=True)  # type: ignore[attr-defined]
    return tuple(name for name, placement in placements if not placement.is_replicate())
