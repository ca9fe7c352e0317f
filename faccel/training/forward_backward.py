"""Forward and backward of all micro-batches of an update, on any mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, overload

import torch

from faccel.checks import instance_of, shown
from faccel.comm.objects import broadcast_objects
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import DataError, ModelError
from faccel.training.backward import is_loss, loss_error, scaled_backward
from faccel.training.model import WrappedModel, check_context, check_wrapped, grad_sync
from faccel.training.precision import ScalerState, check_scaler
from faccel.training.windows import MicroBatch, Window
from faccel.tree import Tree, full_tensor, map_leaves

if TYPE_CHECKING:
    from faccel.protocols import MicroBatchLoss

Model = Callable[..., Tree]
LossFn = Callable[[Model, MicroBatch], torch.Tensor]
"""`loss_fn(model, batch)` calls the model once and returns a scalar."""
LossAndAuxFn = Callable[[Model, MicroBatch], tuple[torch.Tensor, Tree]]
"""`loss_fn(model, batch)` calls the model once and returns a scalar and any other value."""


@overload
def forward_backward(
    loss_fn: LossFn,
    model: WrappedModel,
    window: Window,
    scaler: ScalerState,
    ctx: DistContext,
    *,
    has_aux: Literal[False] = False,
) -> tuple[torch.Tensor, ScalerState]: ...


@overload
def forward_backward(
    loss_fn: LossAndAuxFn,
    model: WrappedModel,
    window: Window,
    scaler: ScalerState,
    ctx: DistContext,
    *,
    has_aux: Literal[True],
) -> tuple[tuple[torch.Tensor, list[Tree]], ScalerState]: ...


@effectful(updates(".grad"), COLLECTIVE)
def forward_backward(
    loss_fn: LossFn | LossAndAuxFn,
    model: WrappedModel,
    window: Window,
    scaler: ScalerState,
    ctx: DistContext,
    *,
    has_aux: bool = False,
) -> tuple[torch.Tensor | tuple[torch.Tensor, list[Tree]], ScalerState]:
    """Run forward and backward of all micro-batches of a window, on any mesh.

    Effects: updates .grad, collective. As `scaled_backward` for each micro-batch, with its `scale`;
    gradients are reduced once.

    Where the mesh has pipeline stages, micro-batches run through the pipeline. On other meshes
    they run one by one.

    Args:
        loss_fn: `loss_fn(model, batch)` gets a `MicroBatch`, calls `model` once and returns a
            scalar: the mean over the rows, or the sum over the valid ones if the window has a
            `weight`. On a pipeline, the arguments of that call are the input of the first stage,
            and its result is the output of the last stage. The first rank runs the function up to
            the call, and the last rank runs all of it.
        model: From `wrap`.
        window: From `windows`; iterated once. A pipeline needs as many micro-batches as ranks, of
            equal shapes.
        scaler: From `init_scaler`, or from the last function that returned it.
        ctx: The context.
        has_aux: Whether `loss_fn` returns `(loss, aux)`.

    Returns:
        The loss of each micro-batch as `T[len(window)]`, without its `scale`, equal on all ranks
        of a pipeline; and the new scaler. With `has_aux`, `(losses, auxs)` instead of the losses:
        a list of what each micro-batch returned, with its tensors detached.

    Raises:
        ModelError: A loss is not a scalar, `loss_fn` does not call its model once, or `model` is
            not wrapped with `ctx`.
        ConfigError: The window has too few micro-batches for the schedule.
        DataError: `window` is not from `windows`, or its micro-batches have different shapes on
            a pipeline.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from faccel.data.loader import shard
        >>> from faccel.testing import fake_context
        >>> from faccel.training.model import wrap
        >>> from faccel.training.precision import init_scaler
        >>> from faccel.training.windows import windows
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(1, 1), ctx)
        >>> loader = shard(DataLoader(torch.ones(4, 1), batch_size=1), ctx)
        >>> window = next(windows(loader, ctx, size=4))
        >>> loss_fn = lambda model, batch: model(batch.data).mean()
        >>> losses, scaler = forward_backward(loss_fn, model, window, init_scaler(ctx), ctx)
        >>> losses.shape
        torch.Size([4])
    """
    call = "faccel.forward_backward(loss_fn, model, window, scaler, ctx)"
    require_context(ctx, call)
    check_wrapped(model)
    check_context(model, ctx)
    fix = f"write `for window in faccel.windows(loader, ctx)` and `{call}`"
    instance_of("window", window, Window, fix=fix, error=DataError)
    check_scaler(scaler)
    auxs: list[Tree] = [None] * len(window)

    def bind(index: int, batch: MicroBatch) -> MicroBatchLoss:
        def loss_of(called: Model) -> torch.Tensor:
            loss, aux = _loss_and_aux(loss_fn(called, batch), has_aux=has_aux)
            auxs[index] = map_leaves(_detached, aux)
            return loss

        return loss_of

    if model.parallelism.pipeline_forward_backward is None:
        losses, scaler = _one_by_one(bind, model, window, scaler, ctx)
    else:
        losses, scaler = _pipelined(bind, model, window, scaler, ctx)
        if has_aux:
            # The last rank has them, because it alone computes losses.
            auxs = broadcast_objects(auxs, ctx, src=ctx.mesh.spec.pp - 1, axis="pp")
    if has_aux:
        return (losses, auxs), scaler
    return losses, scaler


def _loss_and_aux(result: object, *, has_aux: bool) -> tuple[torch.Tensor, Tree]:
    """Return what a loss function returned, checked."""
    loss: object = result
    aux: Tree = None
    if has_aux:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ModelError(
                "`loss_fn` must return `(loss, aux)`, because of `has_aux=True`",
                got=shown(result),
                fix="write `return loss, aux`, or leave `has_aux` out",
            )
        loss, aux = result
    elif isinstance(result, tuple):
        raise ModelError(
            "`loss_fn` must return a scalar tensor",
            got=shown(result),
            fix="write `return loss`, or pass `has_aux=True` to return `(loss, aux)`",
        )
    if not is_loss(loss):
        raise loss_error(loss)
    return loss, aux


def _detached(leaf: Tree) -> Tree:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach()
    return leaf


def _one_by_one(
    bind: Callable[[int, MicroBatch], MicroBatchLoss],
    model: WrappedModel,
    window: Window,
    scaler: ScalerState,
    ctx: DistContext,
) -> tuple[torch.Tensor, ScalerState]:
    losses: list[torch.Tensor] = []
    for index, batch in enumerate(window):
        with grad_sync(model, on=batch.sync):
            loss = bind(index, batch)(model)
            scaler = scaled_backward(loss, scaler, ctx, scale=batch.scale)
        # Under `loss_parallel` a loss is a DTensor.
        losses.append(full_tensor(loss.detach()))
    return torch.stack(losses), scaler


def _pipelined(
    bind: Callable[[int, MicroBatch], MicroBatchLoss],
    model: WrappedModel,
    window: Window,
    scaler: ScalerState,
    ctx: DistContext,
) -> tuple[torch.Tensor, ScalerState]:
    run = model.parallelism.pipeline_forward_backward
    assert run is not None
    scaler.check_before_backward()
    # A pipeline interleaves forward and backward of all micro-batches: it needs them at once.
    losses: list[MicroBatchLoss] = []
    factors: list[float | torch.Tensor] = []
    for index, batch in enumerate(window):
        losses.append(bind(index, batch))
        factors.append(batch.scale * scaler.scale)
    values = run(model.engine, losses, factors, ctx)
    return values, scaler.after_backward()
