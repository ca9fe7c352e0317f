"""Mixed precision: autocast, and the fp16 loss scale as a value."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import attrs
import torch

from faccel.checks import instance_of, integer
from faccel.context import DistContext, require_context
from faccel.device_table import kind_of
from faccel.errors import ConfigError, ScalerError, nearest, short_repr
from faccel.mesh import WORLD
from faccel.tree import local_tensor

_OPTIONS = ("scale", "growth_factor", "backoff_factor", "growth_interval")


class OptimizerRef:
    """A weak reference to an optimizer; a pickled copy refers to none.

    Args:
        opt: The optimizer; None is an optimizer of another process.
    """

    def __init__(self, opt: object = None) -> None:
        self._ref: Callable[[], object] | None = None
        if opt is not None:
            self._ref = weakref.ref(opt)

    def refers_to(self, opt: object) -> bool:
        """Whether `opt` is the optimizer."""
        return self._ref is not None and self._ref() is opt

    def opt(self) -> object | None:
        """Return the optimizer; None if it was freed."""
        return None if self._ref is None else self._ref()

    def __reduce__(self) -> tuple[type[OptimizerRef], tuple[()]]:
        return OptimizerRef, ()


@attrs.frozen(eq=False)
class Unscaled:
    """An optimizer whose gradients `unscale` has divided by the loss scale.

    Args:
        opt: The optimizer.
        overflow: Above 0 if a gradient was not finite, 0-d. On the device: the host reads it in
            `optimizer_step`.
    """

    opt: OptimizerRef
    overflow: torch.Tensor


@attrs.frozen
class ScalerState:
    """The loss scale of fp16; it does nothing in other precisions.

    Dynamic loss scaling (Micikevicius et al. 2018, arXiv:1710.03740), with the constants of
    torch's GradScaler. Optimizers that use one scaler must step after the same backward. If one
    accumulates while another changes the scale, its gradients would mix two scales: give it
    another scaler.

    Args:
        enabled: Whether losses are scaled.
        scale: The factor of the next `scaled_backward`.
        grad_scale: The factor of the present gradients; None before the first backward.
        stepped: The optimizers that have stepped with the present gradients. Together they count
            as one update, and none steps twice.
        unscaled: The optimizers whose present gradients `unscale` has divided by the scale.
        num_good_steps: The number of finite updates since the scale last changed.
        max_rows: The most rows of a micro-batch in `forward_backward`; None is no limit. It gets
            smaller where a window has run again after a rank ran out of memory.
        has_skipped_window: Whether `forward_backward` has left out the last window: the next
            `optimizer_step` of each optimizer does nothing.
        num_skipped: The number of updates skipped so far.
        growth_factor: Multiplies the scale after `growth_interval` finite updates.
        backoff_factor: Multiplies the scale after an update that is not finite.
        growth_interval: See `growth_factor`.
    """

    enabled: bool = False
    scale: float = 1.0
    grad_scale: float | None = None
    stepped: tuple[OptimizerRef, ...] = attrs.field(default=(), eq=False, repr=False)
    unscaled: tuple[Unscaled, ...] = attrs.field(default=(), eq=False, repr=False)
    num_good_steps: int = 0
    num_skipped: int = 0
    max_rows: int | None = None
    has_skipped_window: bool = False
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __attrs_post_init__(self) -> None:
        # A checkpoint of any origin may have the value.
        if self.max_rows is not None:
            integer("max_rows", self.max_rows, at_least=1)
        # `not >`, so that NaN is invalid, too
        invalid = (
            not self.scale > 0
            or not self.growth_factor >= 1
            or not 0 < self.backoff_factor <= 1
            or not self.growth_interval >= 1
        )
        if invalid:
            raise ConfigError(
                "`scale` must be positive, `growth_factor` and `growth_interval` at least 1, and "
                "`backoff_factor` above 0 and at most 1",
                got=", ".join(f"{name}={getattr(self, name)}" for name in _OPTIONS),
                fix="write `faccel.init_scaler(ctx, scale=65536.0, growth_factor=2.0, "
                "backoff_factor=0.5)`",
            )

    def after_backward(self) -> ScalerState:
        """Return the state after a backward with the current scale."""
        # The second micro-batch of a window changes nothing: the same record, without allocation.
        if self.grad_scale == self.scale and not self.stepped and not self.has_skipped_window:
            return self
        return attrs.evolve(
            self, grad_scale=self.scale, stepped=(), unscaled=(), has_skipped_window=False
        )

    def after_skipped_window(self) -> ScalerState:
        """Return the state after a window was left out, which counts as one skipped update."""
        return attrs.evolve(
            self,
            grad_scale=self.scale,
            stepped=(),
            unscaled=(),
            num_skipped=self.num_skipped + 1,
            has_skipped_window=True,
        )

    def after_unscale(self, opt: object, overflow: torch.Tensor) -> ScalerState:
        """Return the state after `unscale` divided the gradients of `opt`."""
        unscaled = (*self.unscaled, Unscaled(OptimizerRef(opt), overflow))
        return attrs.evolve(self, unscaled=unscaled)

    def overflow_of(self, opt: object) -> torch.Tensor | None:
        """Return what `unscale` found in the gradients of `opt`; None if they are still scaled."""
        for record in self.unscaled:
            if record.opt.refers_to(opt):
                return record.overflow
        return None

    def check_before_backward(self) -> None:
        """Raise if a backward would add scaled gradients to those that `unscale` has divided.

        Raises:
            ScalerError: An optimizer has not stepped since `unscale`.
        """
        for record in self.unscaled:
            opt = record.opt.opt()
            has_stepped = any(reference.refers_to(opt) for reference in self.stepped)
            if opt is not None and not has_stepped:
                raise ScalerError(
                    "`scaled_backward` would add scaled gradients to unscaled ones",
                    got=f"a {type(opt).__name__} that has not stepped since `faccel.unscale`",
                    fix="call `unscale` after the last backward of an update, and then "
                    "`faccel.optimizer_step(opt, scaler, ctx)`",
                )

    def after_step(self, opt: object, *, finite: bool) -> ScalerState:
        """Return the state after `opt` stepped (`finite`) or skipped the update.

        Several optimizers that step after one backward count as one update. It counts as not
        finite if the gradients of one optimizer are not finite.
        """
        if not self.enabled:
            if finite:
                return self
            return attrs.evolve(self, num_skipped=self.num_skipped + 1)
        # A backed-off scale starts from the one of the gradients: the second optimizer that
        # overflows after one backward does not halve it again.
        stepped = (*self.stepped, OptimizerRef(opt))
        if not finite:
            scale = self.scale_of_gradients(opt) * self.backoff_factor
            num_skipped = self.num_skipped + 1
            return attrs.evolve(
                self, scale=scale, stepped=stepped, num_good_steps=0, num_skipped=num_skipped
            )
        if self.stepped:  # another optimizer counted this update already
            return attrs.evolve(self, stepped=stepped)
        num_good_steps = self.num_good_steps + 1
        if num_good_steps < self.growth_interval:
            return attrs.evolve(self, stepped=stepped, num_good_steps=num_good_steps)
        scale = self.scale * self.growth_factor
        return attrs.evolve(self, scale=scale, stepped=stepped, num_good_steps=0)

    def scale_of_gradients(self, opt: object) -> float:
        """Return the factor of the present gradients of `opt`.

        Raises:
            ScalerError: No backward returned this state, or none since `opt` last stepped.
        """
        if self.grad_scale is None:
            raise _not_threaded("a `ScalerState` before its first `scaled_backward`")
        for reference in self.stepped:
            if reference.refers_to(opt):
                raise _not_threaded("a `ScalerState` from before the last step of this optimizer")
        return self.grad_scale


def _not_threaded(got: str) -> ScalerError:
    return ScalerError(
        "`scaler` was not returned by `scaled_backward` for these gradients",
        got=got,
        fix="write `scaler = faccel.scaled_backward(loss, scaler, ctx)` instead of "
        "`loss.backward()`",
    )


def check_scaler(scaler: object) -> None:
    """Raise unless `scaler` is a `ScalerState`.

    Raises:
        ScalerError: It is not.
    """
    # Called twice in every step, so the ordinary case is one test.
    if isinstance(scaler, ScalerState):
        return
    fix = (
        "start with `scaler = faccel.init_scaler(ctx)`, and continue with "
        "`scaler = faccel.scaled_backward(loss, scaler, ctx)` and "
        "`info, scaler = faccel.optimizer_step(opt, scaler, ctx)`"
    )
    instance_of("scaler", scaler, ScalerState, fix=fix, error=ScalerError)


def init_scaler(ctx: DistContext, **options: float) -> ScalerState:
    """Return the initial loss scale: 65536 in fp16, disabled in other precisions.

    Effects: pure.

    Args:
        ctx: Its configuration chooses the precision.
        **options: `scale`, `growth_factor`, `backoff_factor`, `growth_interval`.

    Raises:
        ConfigError: An option is unknown or out of range.

    Examples:
        >>> from faccel.testing import fake_context
        >>> init_scaler(fake_context(0, 1, config={"mixed_precision": "fp16"})).scale
        65536.0
        >>> init_scaler(fake_context(0, 1)).enabled
        False
    """
    require_context(ctx, "faccel.init_scaler(ctx)")
    for name in options:
        if name not in _OPTIONS:
            raise ConfigError(
                f"`{name}` is not an option of `init_scaler`",
                got=f"{name}={short_repr(options[name])}",
                fix=nearest(name, _OPTIONS),
            )
    # A misspelled option raises in any precision; only fp16 uses them.
    if ctx.config.mixed_precision != "fp16":
        return ScalerState()
    return ScalerState(enabled=True, **{"scale": 65536.0, **options})  # type: ignore[arg-type]


def autocast(ctx: DistContext) -> AbstractContextManager[object]:
    """Return a context that computes in the configured precision, for code outside of the model.

    Effects: pure. Inside, torch's autocast of this thread is on.

    Examples:
        >>> from faccel.testing import fake_context
        >>> x = torch.ones(2, 2)
        >>> with autocast(fake_context(0, 1, config={"mixed_precision": "bf16"})):
        ...     (x @ x).dtype
        torch.bfloat16
    """
    require_context(ctx, "faccel.autocast(ctx)")
    if ctx.compute_dtype is None:
        return nullcontext()
    return torch.autocast(ctx.device.type, dtype=ctx.compute_dtype)


def unscale_(grads: Iterable[torch.Tensor], scale: float, ctx: DistContext) -> torch.Tensor:
    """Divide gradients by `scale` in place, and return whether one is not finite on any rank.

    Collective where ranks have different gradients. DDP's replicas have the same ones. It uses the
    kernel of torch's GradScaler where the device has it, and does not wait for the device.

    Args:
        grads: Gradients of any dtypes and devices; DTensors and sparse ones, too.
        scale: The loss scale that they were multiplied by.
        ctx: The context.

    Returns:
        float32[]: above 0 if a gradient is not finite. Equal on all ranks.
    """
    # The kernel takes tensors of one device and dtype.
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for grad in grads:
        values = local_tensor(grad)
        if values.is_sparse:
            # A view: `_values()` of an uncoalesced gradient works, `values()` raises.
            values = values._values()  # type: ignore[attr-defined]
        groups.setdefault((values.device, values.dtype), []).append(values)
    overflow = torch.zeros((), dtype=torch.float32, device=ctx.device)
    for (device, _), values in groups.items():
        group_overflow = torch.zeros((), dtype=torch.float32, device=device)
        inverse = torch.full((), 1.0 / scale, dtype=torch.float32, device=device)
        if kind_of(device).has_fp16_unscale:
            torch._amp_foreach_non_finite_check_and_unscale_(  # pyright: ignore[reportPrivateUsage]
                values, group_overflow, inverse
            )
        else:
            group_overflow = unscale_without_kernel(values, inverse)
        overflow = torch.maximum(overflow, group_overflow.to(ctx.device))
    # All ranks must skip the same updates, or their parameters would differ.
    if not ctx.is_replicated:
        overflow = ctx.comm.all_reduce(overflow, "max", WORLD)
    return overflow


def unscale_without_kernel(values: list[torch.Tensor], inverse: torch.Tensor) -> torch.Tensor:
    """Do what the kernel of torch's GradScaler does, with ordinary operators.

    Args:
        values: Gradients of one device and dtype, which are multiplied in place.
        inverse: float32[]: one over the loss scale.

    Returns:
        float32[]: 1 if an element was not finite, else 0.
    """
    # The largest |x| is infinite or NaN if an element is. An empty tensor has none.
    filled = [tensor for tensor in values if tensor.numel() > 0]
    if not filled:
        return torch.zeros_like(inverse)
    norms = torch._foreach_norm(filled, torch.inf)  # pyright: ignore[reportPrivateUsage]
    largest = torch.stack(norms)
    torch._foreach_mul_(filled, inverse)  # pyright: ignore[reportPrivateUsage]
    return largest.isfinite().logical_not().any().to(inverse)


class StepGuard:
    """A hook that raises where an optimizer steps with gradients times the loss scale of fp16.

    `wrap_optimizer` registers it with `Optimizer.register_step_pre_hook`, in fp16 only.
    """

    def __init__(self) -> None:
        self._is_open = False

    @contextmanager
    def open(self) -> Generator[None]:
        """Let the optimizer step: its gradients were unscaled."""
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False

    def __call__(self, opt: object, args: object, kwargs: object) -> None:
        if not self._is_open:
            raise ScalerError(
                "`opt.step()` was called in fp16, whose gradients are multiplied by the loss scale",
                got=f"a {type(opt).__name__} outside of `optimizer_step`",
                fix="write `info, scaler = faccel.optimizer_step(opt, scaler, ctx)`, which divides "
                "them and leaves out an update that overflowed",
            )


def guard_steps(
    opt: torch.optim.Optimizer, guard: StepGuard | None, ctx: DistContext
) -> StepGuard | None:
    """Return the guard of an optimizer, registered once; None in other precisions than fp16.

    Args:
        opt: The optimizer.
        guard: The guard that it has already, or None.
        ctx: Its configuration chooses the precision.
    """
    if guard is None and ctx.config.mixed_precision == "fp16":
        guard = StepGuard()
        opt.register_step_pre_hook(guard)
    return guard
