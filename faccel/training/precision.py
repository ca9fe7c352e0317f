"""Mixed precision: autocast, and the fp16 loss scale as a value."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import attrs
import torch

from faccel.context import DistContext
from faccel.errors import ConfigError, ScalerError
from faccel.protocols import WORLD
from faccel.tree import local_tensor


class Stepped:
    """That an optimizer has stepped. It does not keep the optimizer alive, and forgets it when it is pickled.

    Args:
        opt: Which one; None is none that is known here.
    """

    def __init__(self, opt: object = None) -> None:
        self._opt = (lambda: None) if opt is None else weakref.ref(opt)

    def is_of(self, opt: object) -> bool:
        """Whether it was `opt`."""
        return self._opt() is opt

    def __reduce__(self) -> tuple[Any, ...]:
        return Stepped, ()


@attrs.frozen
class ScalerState:
    """The loss scale of fp16, threaded through the loop; the identity for other precisions.

    Dynamic loss scaling after Micikevicius et al. 2018 (arXiv:1710.03740), with the constants of torch's GradScaler.
    Optimizers that share one must step after the same backward: a scale that changes while another optimizer is still
    accumulating would mix two scales in its gradients (give that one a scaler of its own).

    Args:
        enabled: Whether losses are scaled at all.
        scale: What the next `scaled_backward` multiplies by.
        grad_scale: What the gradients that are there now were multiplied by; None before the first backward.
        stepped: Which optimizers have stepped with them, so that several share one verdict and none steps twice.
        num_good_steps: Finite updates since the scale last changed.
        num_skipped: Updates skipped so far.
        growth_factor: The scale is multiplied by it after `growth_interval` finite updates.
        backoff_factor: The scale is multiplied by it after one that is not finite.
        growth_interval: See `growth_factor`.
    """

    enabled: bool = False
    scale: float = 1.0
    grad_scale: float | None = None
    stepped: tuple[Stepped, ...] = attrs.field(default=(), eq=False, repr=False)
    num_good_steps: int = 0
    num_skipped: int = 0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __attrs_post_init__(self) -> None:
        fits = (
            self.scale > 0
            and self.growth_factor >= 1
            and 0 < self.backoff_factor <= 1
            and self.growth_interval >= 1
        )
        if not fits:
            raise ConfigError(
                "a loss scale is positive, grows by a factor of at least 1 and backs off by one of at most 1",
                got=str(self),
                fix="write `faccel.init_scaler(ctx, scale=65536.0, growth_factor=2.0, backoff_factor=0.5)`",
            )

    def after_backward(self) -> ScalerState:
        """Return the state in which gradients of the current scale are there."""
        if self.grad_scale == self.scale and not self.stepped:
            return self
        return attrs.evolve(self, grad_scale=self.scale, stepped=())

    def after_step(self, opt: object, *, finite: bool) -> ScalerState:
        """Return the state after one optimizer has stepped, or skipped, with the gradients that are there.

        Several optimizers that step after one backward count as one update, and one overflow among them is enough.
        """
        if not self.enabled:
            return self if finite else attrs.evolve(self, num_skipped=self.num_skipped + 1)
        stepped = (*self.stepped, Stepped(opt))
        if not finite:
            scale = self.scale_of_gradients(opt) * self.backoff_factor
            return attrs.evolve(
                self,
                scale=scale,
                stepped=stepped,
                num_good_steps=0,
                num_skipped=self.num_skipped + 1,
            )
        if self.stepped:
            return attrs.evolve(self, stepped=stepped)
        if self.num_good_steps + 1 < self.growth_interval:
            return attrs.evolve(self, stepped=stepped, num_good_steps=self.num_good_steps + 1)
        return attrs.evolve(
            self, scale=self.scale * self.growth_factor, stepped=stepped, num_good_steps=0
        )

    def scale_of_gradients(self, opt: object) -> float:
        """Return what the gradients of `opt` that are there were multiplied by.

        Raises:
            ScalerError: This state has seen no backward, or none since `opt` stepped last.
        """
        if self.grad_scale is None or any(each.is_of(opt) for each in self.stepped):
            raise ScalerError(
                "this step has seen no `scaled_backward`",
                got="a scaler that no `scaled_backward` returned"
                + " since the last step" * bool(self.stepped),
                fix="write `scaler = faccel.scaled_backward(loss, scaler, ctx)` instead of `loss.backward()`",
            )
        return self.grad_scale


def check_scaler(scaler: Any) -> None:
    """Refuse what is not a `ScalerState`."""
    if not isinstance(scaler, ScalerState):
        raise ScalerError(
            "the loop threads a `ScalerState` through its steps",
            got=repr(scaler),
            fix="start with `scaler = faccel.init_scaler(ctx)`, go on with `info, scaler = faccel.optimizer_step(...)`",
        )


def init_scaler(ctx: DistContext, **options: float) -> ScalerState:
    """Return the loss scale to start with: 65536 under fp16, the identity for other precisions.

    Effects: pure.

    Args:
        ctx: Its configuration chooses the precision.
        **options: `scale`, `growth_factor`, `backoff_factor`, `growth_interval`.

    Examples:
        >>> from faccel.testing import fake_context
        >>> init_scaler(fake_context(0, 1, config={"mixed_precision": "fp16"})).scale
        65536.0
        >>> init_scaler(fake_context(0, 1)).enabled
        False
    """
    allowed = ("scale", "growth_factor", "backoff_factor", "growth_interval")
    for name in options:
        if name not in allowed:
            raise ConfigError(
                f"`{name}` is not an option of the loss scale",
                fix=f"use one of {', '.join(allowed)}",
            )
    if ctx.config.mixed_precision != "fp16":
        return ScalerState()
    return ScalerState(enabled=True, **{"scale": 65536.0, **options})  # type: ignore[arg-type]


def autocast(ctx: DistContext) -> AbstractContextManager[object]:
    """Make a context that computes in the configured precision, for what is outside a wrapped model.

    Effects: pure. Inside, torch's autocast of this thread is on.

    Examples:
        >>> from faccel.testing import fake_context
        >>> x = torch.ones(2, 2)
        >>> with autocast(fake_context(0, 1, config={"mixed_precision": "bf16"})):
        ...     (x @ x).dtype
        torch.bfloat16
    """
    if ctx.compute_dtype is None:
        return nullcontext()
    return torch.autocast(ctx.device.type, dtype=ctx.compute_dtype)


def unscale_(grads: Iterable[torch.Tensor], scale: float, ctx: DistContext) -> bool:
    """Divide gradients by `scale` in place and return whether all of them are finite, on any rank.

    Collective where ranks hold different gradients: under DDP all have the same.

    Waits for the device once, as torch's GradScaler does, whose kernel this is.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for each in grads:
        grad = local_tensor(each)
        if grad.is_sparse:
            grad = grad._values()  # type: ignore[attr-defined]  # its numbers; scaling them in place scales it
        groups.setdefault((grad.device, grad.dtype), []).append(grad)
    overflows: list[torch.Tensor] = []
    for (device, _), members in groups.items():
        found = torch.zeros((), dtype=torch.float32, device=device)
        inverse = torch.full((), 1.0 / scale, dtype=torch.float32, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(members, found, inverse)  # pyright: ignore[reportPrivateUsage]
        overflows.append(found)
    found = (
        torch.stack([each.to(ctx.device) for each in overflows]).amax()
        if overflows
        else torch.zeros(())
    )
    if not ctx.is_replicated:
        found = ctx.comm.all_reduce(found.to(ctx.device), "max", WORLD)
    return not found.item()
