"""One update: backward for each micro-batch, then the optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeGuard

import attrs
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from faccel.checks import shown
from faccel.comm.rank_errors import raise_naming_rank
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import ConfigError, ModelError
from faccel.mesh import DATA
from faccel.training.grad_clip import (
    check_limits,
    clip_,
    ids_of,
    parameters_with_gradients,
    step_optimizer,
)
from faccel.training.model import (
    OptimizerBinding,
    WrappedModel,
    binding_of,
    check_context,
    check_wrapped,
    grad_sync,
    tied_copies_of,
)
from faccel.training.precision import ScalerState, check_scaler, unscale_
from faccel.training.replica_checks import check_gradients
from faccel.training.windows import Window, check_accumulated, uneven_tail_error
from faccel.tree import Tree, full_tensor, is_sharded
from faccel.update_options import BackwardOptions, UpdateOptions

if TYPE_CHECKING:
    from faccel.protocols import MicroBatchLoss


def _is_loss(loss: object) -> TypeGuard[torch.Tensor]:
    return isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad


def _loss_error(loss: object) -> ModelError:
    if not isinstance(loss, torch.Tensor):
        return ModelError(
            "`loss` must be a scalar tensor that depends on parameters",
            got=shown(loss),
            fix="pass the tensor: `loss` instead of `loss.item()`",
        )
    if loss.numel() != 1:
        fix = "reduce it, as in `loss.mean()`"
    else:
        fix = "compute it from parameters, and outside of `torch.no_grad()` or inside of "
        fix += "`torch.enable_grad()`"
    return ModelError(
        "`loss` must be a scalar tensor that depends on parameters",
        got=f"a tensor of shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}",
        fix=fix,
    )


def _mixed_loss_error() -> ModelError:
    return ModelError(
        "`loss` adds a DTensor, computed from sharded parameters, to the output of a model",
        got="a DTensor as `loss`",
        fix="write `loss = loss + sum(p.full_tensor().square().sum() for p in "
        "model.parameters())`, or any other function of full tensors",
    )


@effectful(updates(".grad"), COLLECTIVE)
def scaled_backward(
    loss: torch.Tensor,
    scaler: ScalerState,
    ctx: DistContext,
    *,
    scale: float | torch.Tensor = 1.0,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> ScalerState:
    """Run backward on `loss`, multiplied by `scale` and by the loss scale of fp16.

    Effects: updates .grad, collective. Gradients are averaged over the data ranks, unless inside
    `grad_sync(model, on=False)`. Where backward raises, gradients are incomplete: a loop that
    continues calls `opt.zero_grad()`, and on replicas `model = faccel.rewrap(model, ctx)`.

    Args:
        loss: A scalar that depends on parameters.
        scaler: From `init_scaler`, or from the last function that returned it.
        ctx: The context.
        scale: `MicroBatch.scale` of a window.
        retain_graph: Whether the graph stays for another backward, as in `Tensor.backward`. Each
            backward then averages the gradients that it adds; parameters may be left out.
        create_graph: Whether gradients can be differentiated, on one process and replicas. Values
            are averages. The derivative comes from this rank's loss, until a backward averages it.
        inputs: The parameters or tensors whose gradients are accumulated; None is all.

    Returns:
        The new scaler.

    Raises:
        ModelError: The loss is not a scalar, or depends on no parameter. Or the strategy does not
            support an option of backward.
        ScalerError: `scaler` is not a `ScalerState`, or the gradients are unscaled already.
        DataError: A loader with an uneven tail is iterated outside of `join`: the other ranks
            would wait for those with fewer batches.
        RankFailedError: Another rank left or failed before its backward; names it.

    Examples:
        >>> from faccel.training.precision import init_scaler
        >>> from faccel.testing import fake_context
        >>> ctx, w = fake_context(0, 1), torch.ones((), requires_grad=True)
        >>> scaler = scaled_backward(3 * w, init_scaler(ctx), ctx, scale=0.5)
        >>> w.grad
        tensor(1.5000)
    """
    require_context(ctx, "scaler = faccel.scaled_backward(loss, scaler, ctx)")
    if not _is_loss(loss):
        raise _loss_error(loss)
    check_scaler(scaler)
    scaler.check_before_backward()
    if ctx.lifetime.has_uneven_iteration and not ctx.lifetime.has_join:
        raise uneven_tail_error(
            ", or train inside `with faccel.parallel.join(model, opt, ctx)`, without `windows`"
        )
    factor = scaler.scale
    if isinstance(scale, torch.Tensor):
        # A tensor stays on the device: reading it would wait for the all-reduce of the weights.
        loss = loss * scale.to(loss.dtype)
    else:
        factor = factor * scale
    # A multiplication by 1 would cost a kernel and a node of the graph.
    if factor != 1.0:
        loss = loss * factor
    if inputs is None and retain_graph is None and not create_graph:
        options = _PLAIN
    else:
        options = BackwardOptions(retain_graph, create_graph, _as_sequence(inputs))
    _backward(loss, options, ctx)
    ctx.lifetime.add_backward()
    return scaler.after_backward()


_PLAIN = BackwardOptions()


def _as_sequence(
    inputs: torch.Tensor | Sequence[torch.Tensor] | None,
) -> Sequence[torch.Tensor] | None:
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    return inputs


def _backward(loss: torch.Tensor, options: BackwardOptions, ctx: DistContext) -> None:
    reducers = ctx.lifetime.reducers()
    inputs = options.inputs
    try:
        for reducer in reducers:
            reducer.before_backward(loss, options)
            if inputs is not None:
                inputs = reducer.graph_inputs(inputs)
        torch.autograd.backward(
            loss,
            retain_graph=options.retain_graph,
            create_graph=options.create_graph,
            inputs=inputs,
        )
    except BaseException as error:
        for reducer in reducers:
            reducer.after_failed_backward()
        if isinstance(error, RuntimeError):
            _raise_backward_error(error, loss, ctx)
        raise
    for reducer in reducers:
        reducer.after_backward(options)


def _raise_backward_error(error: RuntimeError, loss: torch.Tensor, ctx: DistContext) -> NoReturn:
    if is_sharded(loss) and "mixed torch.Tensor and DTensor" in str(error):
        raise _mixed_loss_error() from error
    raise_naming_rank(error, "backward", DATA, ctx.comm)


@effectful(updates(".grad"), COLLECTIVE)
def pipeline_step(
    loss_fn: Callable[[Callable[..., Tree], Tree], torch.Tensor],
    model: WrappedModel,
    window: Window,
    scaler: ScalerState,
    ctx: DistContext,
) -> tuple[torch.Tensor, ScalerState]:
    """Run forward and backward of all micro-batches of a window, on any mesh.

    Effects: updates .grad, collective. As `scaled_backward` for each micro-batch; gradients are
    reduced once.

    Where the mesh has pipeline stages, micro-batches run through the pipeline. On other meshes
    they run one by one.

    Args:
        loss_fn: `loss_fn(model, data)` calls `model` once and returns a scalar. On a pipeline the
            arguments of that call are the input of the first stage, and its result is the output
            of the last stage.
        model: From `wrap`.
        window: From `windows`. A pipeline needs as many micro-batches as ranks, of equal shapes.
        scaler: From `init_scaler`, or from the last function that returned it.
        ctx: The context.

    Returns:
        The loss of each micro-batch as `T[len(window)]`, without its `scale`, equal on all ranks
        of a pipeline; and the new scaler.

    Raises:
        ModelError: A loss is not a scalar, `loss_fn` does not call its model, or `model` is not
            wrapped with `ctx`.
        ConfigError: The window has too few micro-batches for the schedule.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from faccel.data.loader import shard
        >>> from faccel.training.model import wrap
        >>> from faccel.training.precision import init_scaler
        >>> from faccel.training.windows import windows
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(1, 1), ctx)
        >>> loader = shard(DataLoader(torch.ones(4, 1), batch_size=1), ctx)
        >>> window = next(windows(loader, ctx, size=4))
        >>> loss_fn = lambda model, x: model(x).mean()
        >>> losses, scaler = pipeline_step(loss_fn, model, window, init_scaler(ctx), ctx)
        >>> losses.shape
        torch.Size([4])
    """
    require_context(ctx, "faccel.parallel.pipeline_step(loss_fn, model, window, scaler, ctx)")
    check_wrapped(model)
    check_context(model, ctx)
    forward_backward = model.parallelism.pipeline_forward_backward
    if forward_backward is None:
        return _one_by_one(loss_fn, model, window, scaler, ctx)
    check_scaler(scaler)
    scaler.check_before_backward()
    # A pipeline interleaves forward and backward of all micro-batches: it needs them at once.
    micro_batches = list(window)
    losses: list[MicroBatchLoss] = []
    factors: list[float | torch.Tensor] = []
    for micro_batch in micro_batches:
        losses.append(_bind_loss(loss_fn, micro_batch.data))
        factors.append(micro_batch.scale * scaler.scale)
    values = forward_backward(model.engine, losses, factors, ctx)
    return values, scaler.after_backward()


def _one_by_one(
    loss_fn: Callable[[Callable[..., Tree], Tree], torch.Tensor],
    model: WrappedModel,
    window: Window,
    scaler: ScalerState,
    ctx: DistContext,
) -> tuple[torch.Tensor, ScalerState]:
    values: list[torch.Tensor] = []
    for micro_batch in window:
        with grad_sync(model, on=micro_batch.sync):
            loss = loss_fn(model, micro_batch.data)
            scaler = scaled_backward(loss, scaler, ctx, scale=micro_batch.scale)
        # Under `loss_parallel` a loss is a DTensor.
        values.append(full_tensor(loss.detach()))
    return torch.stack(values), scaler


def _bind_loss(
    loss_fn: Callable[[Callable[..., Tree], Tree], torch.Tensor], data: Tree
) -> MicroBatchLoss:
    """Return a function from a callable model to the checked loss of one micro-batch."""

    def loss_of(model: Callable[..., Tree]) -> torch.Tensor:
        loss = loss_fn(model, data)
        if not _is_loss(loss):
            raise _loss_error(loss)
        return loss

    return loss_of


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
            precision.

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

    Examples:
        >>> from faccel.training.precision import init_scaler
        >>> from faccel.testing import fake_context
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
    engine_step = ctx.parallelism.optimizer_step
    params: list[torch.Tensor] = []
    if engine_step is None:
        params = parameters_with_gradients(opt, ctx)
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
    if engine_step is None:
        grad_norm, finite = _update(opt, params, options, ctx, binding)
    else:
        grad_norm, finite = engine_step(opt, options, ctx)
    for reducer in reducers:
        reducer.after_step(opt)
    ctx.lifetime.add_update(ctx.config.grad_accum)
    # A skipped update is none: the schedule counts updates.
    if finite:
        for one_scheduler in schedulers:
            one_scheduler.step()
    return StepInfo(grad_norm, not finite, grad_scale), scaler.after_step(opt, finite=finite)


def _update(
    opt: Optimizer,
    params: Sequence[torch.Tensor],
    options: UpdateOptions,
    ctx: DistContext,
    binding: OptimizerBinding | None,
) -> tuple[torch.Tensor | None, bool]:
    """Unscale, clip and step with the gradients in `.grad` of `params`, then drop them.

    Returns:
        The norm of the gradients, and whether they were finite and `opt` stepped.
    """
    finite = True
    grad_norm = None
    # fp16 always skips, so unscaling and the check are one pass over the gradients.
    if options.skip_nonfinite:
        grads = [param.grad for param in params if param.grad is not None]
        # The one point where the host waits for the device.
        finite = not unscale_(grads, options.grad_scale, ctx).item()
    if options.overflow is not None:
        finite = finite and not options.overflow.item()
    if options.clip_norm is not None or options.clip_value is not None:
        grad_norm = clip_(params, options, ctx, tied_copies=tied_copies_of(opt, binding, ctx))
    if finite:
        step_optimizer(opt, None if binding is None else binding.guard)
    # Not `opt.zero_grad()`: its profiler range costs 9 us, which a small step would notice.
    for param in params:
        param.grad = None
    return grad_norm, finite


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
