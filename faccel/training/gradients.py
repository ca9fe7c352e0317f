"""What a loop may do with gradients between backward and step: unscale them, and measure them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim import Optimizer

from faccel.checks import positive
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import OptimizerError, ScalerError
from faccel.training.grad_clip import is_unreduced, norm_of, parameters_with_gradients
from faccel.training.optimizer_binding import all_tied_copies, binding_of
from faccel.training.precision import ScalerState, check_scaler, unscale_


@effectful(updates(".grad"), COLLECTIVE)
def unscale(opt: Optimizer, scaler: ScalerState, ctx: DistContext) -> ScalerState:
    """Divide the gradients of `opt` by the loss scale of fp16, so that the loop can read them.

    Effects: updates .grad, collective. In other precisions it does nothing. The host does not wait
    for the device.

    `optimizer_step` with the returned scaler does not divide them again. It still skips an update
    whose gradients were not finite.

    Args:
        opt: From `wrap_optimizer`.
        scaler: From the last `scaled_backward` of the update.
        ctx: The context that the model of `opt` was wrapped with.

    Returns:
        The new scaler.

    Raises:
        OptimizerError: No parameter of `opt` has a gradient, `ctx` is not the context of its
            model, or its gradients are in an engine of DeepSpeed.
        ScalerError: `scaler` was not returned by `scaled_backward` for these gradients, or they are
            unscaled already.

    Examples:
        >>> from faccel.training.precision import init_scaler
        >>> from faccel.training.backward import scaled_backward
        >>> from faccel.training.step import optimizer_step
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1, config={"mixed_precision": "fp16"})
        >>> w = torch.nn.Parameter(torch.ones(()))
        >>> opt = torch.optim.SGD([w], lr=0.1)
        >>> scaler = scaled_backward(3 * w, init_scaler(ctx), ctx)
        >>> scaler = unscale(opt, scaler, ctx)
        >>> w.grad
        tensor(3.)
        >>> info, scaler = optimizer_step(opt, scaler, ctx)
        >>> w.data, info.scale
        (tensor(0.7000), 65536.0)
    """
    require_context(ctx, "scaler = faccel.unscale(opt, scaler, ctx)")
    check_scaler(scaler)
    if scaler.has_skipped_window:  # there are no gradients
        return scaler
    # Both raise on every rank, before a collective is begun.
    binding_of(opt, ctx)
    _check_has_grads("unscale", ctx)
    params = parameters_with_gradients(opt, ctx)
    grad_scale = scaler.scale_of_gradients(opt)
    if not scaler.enabled:  # fp32 and bf16: the scale is 1
        return scaler
    # A second division would make the gradients too small, without an error.
    if scaler.overflow_of(opt) is not None:
        raise ScalerError(
            "the gradients of `opt` are unscaled already",
            got="a second `unscale` after the last `scaled_backward`",
            fix="call `faccel.unscale(opt, scaler, ctx)` once per update",
        )
    grads = [param.grad for param in params if param.grad is not None]
    return scaler.after_unscale(opt, unscale_(grads, grad_scale, ctx))


@effectful(COLLECTIVE)
def grad_norm(
    params: Iterable[torch.Tensor], ctx: DistContext, *, norm_type: float = 2.0
) -> torch.Tensor:
    """Return the norm of the gradients of `params` together, on any mesh.

    Effects: collective. Under DDP nothing is communicated. The host does not wait for the device.

    In fp16 gradients are multiplied by the loss scale until `unscale`.

    Args:
        params: Parameters of models that were wrapped with `ctx`, the same ones on every rank. On a
            pipeline, those of this rank's stages.
        ctx: The context.
        norm_type: The order of the norm, above 0; `float("inf")` is the largest magnitude.

    Returns:
        The norm, 0-d, equal on all ranks; 0 if no parameter has a gradient.

    Raises:
        OptimizerError: A gradient is not reduced yet, or is in an engine of DeepSpeed; or, on a
            pipeline, no model has an optimizer.
        ConfigError: `norm_type` is not positive.

    Examples:
        >>> from faccel.testing import fake_context
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> w.square().sum().backward()
        >>> ctx = fake_context(0, 1)
        >>> grad_norm([w], ctx), grad_norm([w], ctx, norm_type=float("inf"))
        (tensor(10.), tensor(8.))
    """
    require_context(ctx, "faccel.grad_norm(params, ctx)")
    positive("norm_type", norm_type)
    _check_has_grads("grad_norm", ctx)
    listed = list(params)
    # The norm of this rank's gradients would differ between ranks.
    for param in listed:
        if is_unreduced(param.grad):
            raise OptimizerError(
                "a gradient is not reduced yet",
                got="a backward inside `grad_sync(model, on=False)`",
                fix="measure after the last micro-batch, as in `if micro.sync: "
                "faccel.grad_norm(model.parameters(), ctx)`",
            )
    return norm_of(listed, ctx, norm_type, tied_copies=all_tied_copies(ctx))


def _check_has_grads(function: str, ctx: DistContext) -> None:
    """Raise where gradients are not in `.grad` of the parameters."""
    if ctx.parallelism.optimizer_step is not None:
        raise OptimizerError(
            f"`{function}` is unsupported under {ctx.parallelism.name}, whose engine stores the "
            "gradients",
            got=f"strategy={ctx.parallelism.name}",
            fix='write `faccel.optimizer_step(opt, scaler, ctx, clip_norm=float("inf"))`, and read '
            "`grad_norm` of its result",
        )
