"""One update: clip the gradients, step the optimizer, and drop the gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import attrs
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import ConfigError
from faccel.training.failures import stop_all_ranks
from faccel.training.grad_clip import (
    check_limits,
    clip_,
    ids_of,
    parameters_with_gradients,
    step_optimizer,
)
from faccel.training.optimizer_binding import OptimizerBinding, binding_of, tied_copies_of
from faccel.training.precision import ScalerState, check_scaler, unscale_
from faccel.training.replica_checks import check_gradients
from faccel.training.windows import check_accumulated
from faccel.update_options import UpdateOptions


@attrs.frozen(eq=False)
class StepInfo:
    """The result of one `optimizer_step`.

    Args:
        grad_norm: Norm of the gradients of the optimizer (or of `clip_params`) before clipping,
            0-d; None without `clip_norm` (`clip_norm=float("inf")` measures and clips nothing).
        skipped: Whether the update was skipped because a gradient was not finite.
        scale: The loss scale that the gradients were divided by.
    """

    grad_norm: torch.Tensor | None
    skipped: bool
    scale: float


@effectful(updates("opt"), COLLECTIVE)
def optimizer_step(
    opt: Optimizer,
    scaler: ScalerState,
    ctx: DistContext,
    *,
    clip_norm: float | torch.Tensor | None = None,
    clip_value: float | torch.Tensor | None = None,
    norm_type: float = 2.0,
    clip_params: Iterable[torch.Tensor] | None = None,
    scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
    skip_nonfinite: bool = False,
) -> tuple[StepInfo, ScalerState]:
    """Clip the gradients, step, and set this optimizer's gradients to None.

    Effects: updates opt, collective. Also its parameters, their gradients and `scheduler`. Under
    DDP nothing is communicated: every rank has the same gradients.

    In fp16 the gradients are unscaled first, unless `unscale` has done it. An update with a
    gradient that is not finite is skipped. Other precisions neither inspect gradients nor wait for
    the device, unless `skip_nonfinite`. A changed loss scale applies from the next
    `scaled_backward`, so several optimizers can use one scaler.

    Args:
        opt: From `wrap_optimizer`.
        scaler: From `scaled_backward`.
        ctx: The context that the model of `opt` was wrapped with.
        clip_norm: The largest norm of all gradients together, a number or a 0-d tensor.
        clip_value: The largest magnitude of an element, applied after `clip_norm`.
        norm_type: The order of the norm; `float("inf")` is the largest magnitude.
        clip_params: The parameters of `opt` that `clip_norm` measures and clips; None is all.
        scheduler: One scheduler or several, stepped once per update and not on a skipped one.
            Step a scheduler that moves per epoch or needs a metric yourself.
        skip_nonfinite: Whether to skip an update with a gradient that is not finite, in any
            precision, on all ranks. The host waits for the device once. Where ranks have different
            shards, they reduce one number; replicas communicate nothing.

    Returns:
        The result, and the new scaler.

    Raises:
        OptimizerError: No parameter of `opt` has a gradient, its step needs a closure, `ctx` is
            not the context of its model, or `clip_params` has parameters of another optimizer. Or a
            gradient is not averaged over the data ranks.
        ModelError: A part of the model took no part in the loss, or replicas differ.
        ScalerError: `scaler` was not returned by `scaled_backward` (in fp16: since the last step
            of `opt`).
        ConfigError: A limit or a scheduler is invalid, or the loop ignores a given `grad_accum`.
        RankFailedError: Another rank failed in its step. Parameters may differ between ranks then:
            load a checkpoint to continue. The gradients of `opt` are dropped after a failure.

    Examples:
        >>> from faccel.testing import fake_context
        >>> from faccel.training.backward import scaled_backward
        >>> from faccel.training.precision import init_scaler
        >>> ctx, w = fake_context(0, 1), torch.nn.Parameter(torch.ones(()))
        >>> opt = torch.optim.SGD([w], lr=0.1)
        >>> scaler = scaled_backward(3 * w, init_scaler(ctx), ctx)
        >>> info, scaler = optimizer_step(opt, scaler, ctx, clip_norm=1.0)
        >>> info.grad_norm, info.skipped, w.grad
        (tensor(3.), False, None)
    """
    require_context(ctx, "info, scaler = faccel.optimizer_step(opt, scaler, ctx)")
    check_scaler(scaler)
    binding = binding_of(opt, ctx)
    if scaler.has_skipped_window:
        return _without_gradients(opt, scaler, ctx, measures=clip_norm is not None)
    run = ctx.parallelism.optimizer_step
    params: list[torch.Tensor] = []
    if run is None:
        params = parameters_with_gradients(opt, ctx)
        run = partial(_update, params=params, binding=binding)
    # Everything is checked before a gradient changes: an error leaves the gradients as they were.
    grad_scale = scaler.scale_of_gradients(opt)
    schedulers = _schedulers(scheduler)
    overflow = scaler.overflow_of(opt)
    options = UpdateOptions(
        clip_norm,
        clip_value,
        grad_scale,
        skip_nonfinite=skip_nonfinite or scaler.enabled,
        norm_type=norm_type,
        clip_params=ids_of(clip_params, opt),
        overflow=overflow,
    )
    if overflow is not None:  # `unscale` has divided and checked them
        options = options._replace(grad_scale=1.0, skip_nonfinite=skip_nonfinite)
    check_limits(options)
    check_accumulated(ctx)
    reducers = check_gradients(opt, params, ctx)
    try:
        with ctx.lifetime.span("optimizer"):
            grad_norm, finite = run(opt, options, ctx)
    except Exception as error:
        # Some of them may be unscaled, clipped or used already: the next window begins without.
        _drop_gradients(params)
        ctx.lifetime.drop_backwards()
        stop_all_ranks(error, "optimizer_step", ctx)
        raise
    for reducer in reducers:
        reducer.after_step(opt)
    ctx.lifetime.add_update(ctx.config.grad_accum)
    # A skipped update is none: the schedule counts updates.
    if finite:
        for one_scheduler in schedulers:
            one_scheduler.step()
    else:
        ctx.lifetime.add_skip()
    return StepInfo(grad_norm, not finite, grad_scale), scaler.after_step(opt, finite=finite)


def _without_gradients(
    opt: Optimizer, scaler: ScalerState, ctx: DistContext, *, measures: bool
) -> tuple[StepInfo, ScalerState]:
    """Skip the update of a window that was left out; the norm of no gradients is 0."""
    ctx.lifetime.add_update(ctx.config.grad_accum)
    ctx.lifetime.add_skip()
    for group in opt.param_groups:
        for param in group["params"]:
            param.grad = None
    grad_norm = None
    if measures:
        grad_norm = torch.zeros((), device=ctx.device)
    return StepInfo(grad_norm, True, scaler.scale), scaler


def _update(
    opt: Optimizer,
    options: UpdateOptions,
    ctx: DistContext,
    *,
    params: Sequence[torch.Tensor],
    binding: OptimizerBinding | None,
) -> tuple[torch.Tensor | None, bool]:
    """Unscale, clip and step with the gradients in `.grad` of `params`, then drop them.

    Returns:
        The norm of the gradients, and whether they were finite and `opt` stepped.
    """
    finite = True
    grad_norm = None
    overflow = options.overflow
    # fp16 always skips, so unscaling and the check are one pass over the gradients.
    if options.skip_nonfinite:
        grads = [param.grad for param in params if param.grad is not None]
        nonfinite = unscale_(grads, options.grad_scale, ctx)
        overflow = nonfinite if overflow is None else torch.maximum(overflow, nonfinite)
    if overflow is not None:
        # The one point where the host waits for the device.
        finite = not overflow.item()
    if options.clip_norm is not None or options.clip_value is not None:
        grad_norm = clip_(params, options, ctx, tied_copies=tied_copies_of(opt, binding, ctx))
    if finite:
        step_optimizer(opt, None if binding is None else binding.guard)
    _drop_gradients(params)
    return grad_norm, finite


def _drop_gradients(params: Sequence[torch.Tensor]) -> None:
    # Not `opt.zero_grad()`: its profiler range costs 9 us, which a small step would notice.
    for param in params:
        param.grad = None


def _schedulers(
    scheduler: LRScheduler | Sequence[LRScheduler] | None,
) -> Sequence[LRScheduler]:
    if scheduler is None:
        return ()
    schedulers = scheduler if isinstance(scheduler, Sequence) else (scheduler,)
    # Duck-typed, because users write schedulers that inherit from nothing.
    for one_scheduler in schedulers:
        if isinstance(one_scheduler, ReduceLROnPlateau) or not hasattr(one_scheduler, "step"):
            raise ConfigError(
                "`scheduler` must be a scheduler whose `step` needs no metric",
                got=f"a {type(one_scheduler).__name__}",
                fix="step a ReduceLROnPlateau yourself, as in `plateau.step(metric)`",
            )
    return schedulers
