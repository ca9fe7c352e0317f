"""A training step as a pure function from a state and a batch to metrics and the next state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import attrs
import torch
from tensordict import TensorDict

from faccel.comm.buckets import BUCKET_CAP_MB, check_replicas
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError, OptimizerError, with_source
from faccel.func.grad import GradInputs, LossAndGrads, mean_gradient
from faccel.func.gradient_transformation import (
    GradientTransformation,
    Role,
    Updates,
    apply_updates,
    check_transformation,
    is_traced,
)
from faccel.func.loss import LossFunction, LossOptions, Weight, check_precision
from faccel.func.rng_streams import NoGenerator, RandomSource, reseed
from faccel.func.tensordicts import named_leaves, to_tensordict
from faccel.func.train_state import TrainState, check_state, mark_donated
from faccel.training.precision import ScalerState
from faccel.tree import Tree, map_leaves

Metrics = dict[str, Tree]

GradientFn = Callable[[GradInputs], LossAndGrads]
"""Computes the loss and the gradient that a step applies, averaged over data ranks; collective."""


class Step(Protocol):
    """A training step: `step(state, batch) -> (metrics, state)`."""

    def __call__(
        self, state: TrainState, batch: Tree, /, generator: torch.Generator | None = None
    ) -> tuple[Metrics, TrainState]: ...


@effectful(COLLECTIVE)
def make_step(
    loss_fn: LossFunction,
    transformation: GradientTransformation,
    ctx: DistContext,
    *,
    has_aux: bool = False,
    has_buffers: bool = False,
    weight: Weight | None = None,
    num_micro_batches: int = 1,
    bucket_cap_mb: float = BUCKET_CAP_MB,
    donate: bool = False,
) -> Step:
    """Return the function that makes one training step.

    Effects: collective. The returned step is, too: one all-reduce per bucket of gradients. Without
    `donate` it is pure: it writes neither to the state nor to the batch, and its result depends on
    them and on the data rank only.

    Args:
        loss_fn: As in `value_and_grad`.
        transformation: An optimizer such as `adamw(1e-3)`, or a `chain` with one: the one that
            `init_state` made the state for.
        ctx: The context; its mesh must have replicas only.
        has_aux: Whether the loss function returns more; it becomes `metrics["aux"]`.
        has_buffers: Whether the loss function takes buffers and returns new ones.
        weight: Returns the number of rows or tokens of this rank's batch; the loss is then a sum.
        num_micro_batches: How many micro-batches a batch is cut into.
        bucket_cap_mb: Size of the buckets in which gradients are reduced, in MiB.
        donate: Whether the next state overwrites the tensors of the old one, as the classes of
            `torch.optim` do. Using the old state then raises `DonatedError`. Tensors that alias
            it change: results of `unstack`, states before or after a skipped update, tensors that
            you read from it.

    Returns:
        `step(state, batch, generator=None) -> (metrics, state)`.

        `metrics` is a dict of 0-d tensors, not yet synchronized with the host: `loss`, the mean
        over all ranks, and those of the transformation, `grad_norm` and `skipped`.

        The generator of the loss function is seeded from the seed and step of the state and the
        data rank, so that a step can be repeated. You can pass another one.

        `torch.compile`, `torch.vmap` and `torch.func.grad` can trace the step. On several ranks,
        the derivative of its result is this rank's contribution; the mean over ranks is the
        derivative. Use `compiled` if the loss function draws random numbers.

    Raises:
        ConfigError: The mesh shards parameters or work, or a number is not positive. Or
            `num_micro_batches` contradicts the configured `grad_accum`.
        OptimizerError: `transformation` has no optimizer.
        DonatedError: In the step: the state was donated before.

    Examples:
        >>> import torch
        >>> from faccel.func import functional_call, init_state, make_step, sgd
        >>> from faccel.testing import fake_context
        >>> ctx, model = fake_context(0, 1), torch.nn.Linear(2, 1)
        >>> def loss_fn(params, batch, generator):
        ...     return functional_call(model, params, batch).square().mean()
        >>> state = init_state(model, sgd(0.1), ctx, seed=0)
        >>> metrics, new_state = make_step(loss_fn, sgd(0.1), ctx)(state, torch.ones(4, 2))
        >>> int(state.step), int(new_state.step), sorted(metrics)
        (0, 1, ['loss'])
    """
    require_context(ctx, "faccel.func.make_step(loss_fn, transformation, ctx)")
    options = LossOptions(loss_fn, has_buffers, has_aux, weight, num_micro_batches, bucket_cap_mb)
    return build_step(mean_gradient, options, transformation, ctx, donate=donate)


def _check_micro_batches(num_micro_batches: int, ctx: DistContext) -> None:
    """Raise if the step ignores a configured `grad_accum`."""
    grad_accum = ctx.config.grad_accum
    if grad_accum not in (1, num_micro_batches):
        error = ConfigError(
            "`num_micro_batches` contradicts the configured `grad_accum`",
            got=f"num_micro_batches={num_micro_batches}, grad_accum={grad_accum}",
            fix="pass `num_micro_batches=ctx.config.grad_accum`, or configure no `grad_accum`",
        )
        raise with_source(error, ctx.config.sources.get("grad_accum", "argument"))


def build_step(
    gradient_fn: GradientFn,
    options: LossOptions,
    transformation: GradientTransformation,
    ctx: DistContext,
    *,
    donate: bool,
) -> Step:
    """Return the step that applies what `gradient_fn` returns; see `make_step`."""
    check_precision(ctx)
    check_replicas(ctx, "use `faccel.wrap` and `faccel.optimizer_step`, which train on every mesh")
    _check_micro_batches(options.num_micro_batches, ctx)
    check_transformation(transformation)
    if transformation.role is not Role.OPTIMIZER:
        raise OptimizerError(
            "`transformation` must be an optimizer, or a chain with one",
            got=f"`{transformation.name}`, which only changes gradients",
            fix=f"write `chain({transformation.name}(...), adamw(1e-3))`",
        )
    # Seeded again for every step: making a generator takes longer than that.
    step_generator = torch.Generator(ctx.device)
    # Only the first call checks for writes: it is a pass over all values.
    has_checked_writes: list[bool] = []

    def step(
        state: TrainState, batch: Tree, generator: RandomSource | None = None
    ) -> tuple[Metrics, TrainState]:
        check_state(state)
        traced = is_traced(state.params)
        _check_call(state, donate=donate, traced=traced)
        if generator is None:
            generator = _generator_for(state, step_generator, ctx, traced=traced)
        # After an exception in the loss function the next call checks again.
        check_writes = not traced and not has_checked_writes
        inputs = GradInputs(
            options,
            ctx,
            state.params,
            batch,
            generator,
            state.buffers if options.has_buffers else None,
            state.scaler.scale,
            check_writes,
        )
        # Forward, backward and all-reduce; everything after this is local.
        result = gradient_fn(inputs)
        if check_writes:
            has_checked_writes.append(True)
        # Before the update: it may overwrite what the loss is a view of.
        metrics = _metrics_of(result, has_aux=options.has_aux, copy=donate)
        # Inside of a graph nothing is donated; `_overwrite` copies at its end instead.
        updates, opt, scaler = _update(transformation, result, state, donate=donate and not traced)
        buffers = state.buffers
        if result.buffers is not None:
            # `call_loss` checks that all buffers are returned.
            buffers = to_tensordict(result.buffers)
        new_state = TrainState(
            apply_updates(state.params, updates),
            buffers,
            opt,
            scaler,
            state.step + 1,
            state.seed,
        )
        if donate:
            if traced:
                new_state = _overwrite(state, new_state)
            # Last: an error before this leaves the old state usable.
            mark_donated(state)
        return metrics | dict(updates.metrics), new_state

    return step


def _generator_for(
    state: TrainState, generator: torch.Generator, ctx: DistContext, *, traced: bool
) -> RandomSource:
    """Return the source of random numbers of one step."""
    if traced:
        return NoGenerator()
    return reseed(generator, state.seed, state.step, ctx)


def _metrics_of(result: LossAndGrads, *, has_aux: bool, copy: bool) -> Metrics:
    metrics: Metrics = {"loss": result.loss}
    if has_aux:
        metrics["aux"] = result.aux
    if not copy:
        return metrics
    # A donated step overwrites parameters, and a loss or an aux output may be one of them.
    return map_leaves(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, metrics)


def _update(
    transformation: GradientTransformation, result: LossAndGrads, state: TrainState, *, donate: bool
) -> tuple[Updates, TensorDict, ScalerState]:
    """Return the updates, the optimizer state and the scaler after them.

    With fp16 an update whose gradients overflowed is skipped.
    """
    scaler = state.scaler
    updates = Updates(to_tensordict(result.grads), donate=donate)
    if not scaler.enabled:
        updates, opt = transformation.update(updates, state.opt, state.params)
        return updates, opt, scaler
    # Gradients are all-reduced, so all ranks decide the same without communication.
    finite = _all_finite(result)
    # The transitions that `optimizer_step` makes for modules.
    scaler = scaler.after_backward().after_step(transformation, finite=finite)
    skipped = {"skipped": result.loss.new_full((), not finite, dtype=torch.bool)}
    if not finite:
        return updates._replace(metrics=skipped), state.opt, scaler
    updates, opt = transformation.update(updates, state.opt, state.params)
    return updates._replace(metrics=skipped | dict(updates.metrics)), opt, scaler


def _check_call(state: TrainState, *, donate: bool, traced: bool) -> None:
    """Raise if this step cannot run on this state under the active transforms."""
    if traced and state.scaler.enabled:
        raise ConfigError(
            "fp16 is unsupported in a compiled or vmapped step, "
            "because the host chooses the loss scale from values",
            got="mixed_precision=fp16 under a transform",
            fix='use `mixed_precision="bf16"`',
        )
    # torch.compile is different: the graph may write to its inputs
    if traced and donate and not torch.compiler.is_compiling():
        raise ConfigError(
            "a step with `donate=True` cannot be vmapped or differentiated, "
            "because it would overwrite tensors outside of the transform",
            got="`donate=True` under a transform",
            fix="write `make_step(..., donate=False)`",
        )
    if not traced and state.seed.ndim:
        raise ConfigError(
            "a step expects one state, not stacked ones",
            got=f"{state.seed.numel()} states, stacked",
            fix="write `ensemble(step, ctx)(states, batch)`",
        )


def _all_finite(result: LossAndGrads) -> bool:
    """Return whether every gradient is finite. Waits for the device, as PyTorch's GradScaler."""
    return bool(torch.stack([grad.isfinite().all() for grad in result.grads.values()]).all())


def _overwrite(old: TrainState, new: TrainState) -> TrainState:
    """Return `new` in the tensors of `old`, inside of a compiled step."""
    for name in ("params", "buffers", "opt"):
        targets = named_leaves(getattr(old, name))
        for path, value in named_leaves(getattr(new, name)).items():
            # Unchanged tensors are the same objects.
            if targets[path] is not value:
                targets[path].copy_(value)
    return attrs.evolve(new, params=old.params, buffers=old.buffers, opt=old.opt)
