"""What an update does to the gradients of one optimizer before it applies them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from faccel.errors import ConfigError, OptimizerError


def parameters_with_gradients(opt: Optimizer) -> list[torch.Tensor]:
    """Return the parameters of `opt` that a gradient has reached.

    Raises:
        OptimizerError: There is none.
    """
    found = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
    if not found:
        raise OptimizerError(
            "no gradient has reached a parameter of this optimizer",
            saw=f"{sum(len(g['params']) for g in opt.param_groups)} parameters, all with `.grad` None",
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
            saw=f"a {type(opt).__name__}",
            fix="call `opt.step(closure)` yourself, with `scaled_backward` in the closure",
        ) from error


def check_limits(norm: float | None, value: float | None) -> None:
    """Refuse a limit that is not positive."""
    for name, limit in (("clip_norm", norm), ("clip_value", value)):
        if limit is not None and not limit > 0:
            raise ConfigError(f"`{name}` must be positive", saw=str(limit), fix="leave it out to clip nothing")


def clip_(params: Sequence[torch.Tensor], norm: float | None, value: float | None) -> torch.Tensor | None:
    """Clip the gradients of `params` in place, by their total norm, then by value.

    Neither waits for the device.

    Args:
        params: Parameters with gradients.
        norm: The largest 2-norm of all gradients together; `float("inf")` measures without clipping.
        value: The largest magnitude of an element.

    Returns:
        The norm from before clipping, 0-d; None where `norm` is.
    """
    total = None
    if norm is not None:
        total = get_total_norm([p.grad for p in params if p.grad is not None])
        clip_grads_with_norm_(params, norm, total)
    if value is not None:
        clip_grad_value_(params, value)
    return total
