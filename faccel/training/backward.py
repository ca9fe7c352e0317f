"""Backward of one micro-batch: the loss scale, and the reduction of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, TypeGuard

import torch

from faccel.checks import shown
from faccel.comm.rank_errors import raise_naming_rank
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import ModelError
from faccel.mesh import DATA
from faccel.training.gradient_guard import gradient_guard
from faccel.training.precision import ScalerState, check_scaler
from faccel.training.windows import uneven_tail_error
from faccel.tree import is_sharded
from faccel.update_options import BackwardOptions


def is_loss(loss: object) -> TypeGuard[torch.Tensor]:
    """Return whether backward can start from `loss`: a scalar that depends on parameters."""
    return isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad


def loss_error(loss: object) -> ModelError:
    """Return the error for a loss that is not one."""
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
            support an option of backward. Or, in debug mode, a gradient of this rank is not finite
            before it is averaged; fp16 has no such check.
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
    if not is_loss(loss):
        raise loss_error(loss)
    check_scaler(scaler)
    scaler.check_before_backward()
    # The ranks with fewer batches would not begin the reduction of the last ones.
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
    # Nearly every step: no record is created.
    if inputs is None and retain_graph is None and not create_graph:
        options = _PLAIN
    else:
        options = BackwardOptions(retain_graph, create_graph, _as_sequence(inputs))
    with ctx.lifetime.span("backward"):
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
        with gradient_guard(ctx):
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
