"""A training step as a pure function from a state and a batch to metrics and the next state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from tensordict import TensorDict

from faccel.comm.buckets import check_replicas
from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError, OptimizerError
from faccel.func.grad import LossSpec, Outcome, Task, Weight, gradient
from faccel.func.gradient_transformation import (
    GradientTransformation,
    Updates,
    apply_updates,
    check_transformation,
    is_traced,
)
from faccel.func.rng_streams import NoStream, Stream, seeded
from faccel.func.tensordicts import leaves, tensordict
from faccel.func.train_state import TrainState, check_state, donate
from faccel.training.precision import ScalerState
from faccel.tree import Tree, map_leaves

Metrics = dict[str, Any]
Step = Callable[..., tuple[Metrics, TrainState]]
"""`step(state, batch) -> (metrics, state)`."""


Direction = Callable[[Task], Outcome]
"""What a step moves along: what a loss gives, averaged over the data ranks; collective."""


@effectful(COLLECTIVE)
def make_step(
    loss_fn: Callable[..., Any],
    transformation: GradientTransformation,
    ctx: DistContext,
    *,
    has_aux: bool = False,
    has_buffers: bool = False,
    weight: Weight | None = None,
    num_micro_batches: int = 1,
    bucket_cap_mb: float = 25.0,
    donate: bool = False,
) -> Step:
    """Return the function that makes one training step.

    Effects: collective. What is returned is: one packed all-reduce per bucket of gradients. It is pure, unless
    `donate`: neither the state nor the batch is written to, and what it returns depends on them and on the rank alone.

    Args:
        loss_fn: As in `value_and_grad`, likewise the next four.
        transformation: An optimizer such as `adamw(1e-3)`, or a `chain` with one; the one that the state was made with.
        ctx: The world; its mesh has replicas only.
        has_aux: Puts what the loss function returns last into `metrics["aux"]`.
        has_buffers: Whether the loss function takes buffers and returns new ones.
        weight: What a batch counts on this rank; the loss is then a sum.
        num_micro_batches: MicroBatch-batches of a batch.
        bucket_cap_mb: Size of the buckets in which gradients travel, in MB.
        donate: Whether the next state is written into the storage of the old one, as an optimizer of torch's does.
            The old state then raises `DonatedError`. What shares tensors with it changes, too: what `unstack` gave, a
            state before or after an update that was left out, tensors that you took from it.

    Returns:
        `step(state, batch, generator=None) -> (metrics, state)`. `metrics` is a dict with `loss`, the mean over all
        ranks, and what the transformation tells (`grad_norm`, `skipped`), 0-d tensors that nobody has waited for. The
        generator of the loss function depends on the state's seed and step and on the data rank, so that a step can be
        repeated; another may be given. `torch.compile(step)`, `torch.vmap` and `torch.func.grad` go through it; on
        several ranks a derivative of what it returns is this rank's part, and their mean the derivative. A graph draws
        from the process's generator: `compiled` seeds it where a loss function draws.

    Raises:
        ConfigError: The mesh shares parameters or work between its ranks.
        OptimizerError: `transformation` holds no optimizer.
        DonatedError: Later: the state was donated before.

    Examples:
        >>> import torch
        >>> from faccel.func import functional_call, init_state, make_step, sgd
        >>> from faccel.testing import fake_context
        >>> ctx, model = fake_context(0, 1), torch.nn.Linear(2, 1)
        >>> def loss_fn(params, batch, generator):
        ...     return functional_call(model, params, batch).square().mean()
        >>> state = init_state(model, sgd(0.1), ctx, seed=0)
        >>> metrics, after = make_step(loss_fn, sgd(0.1), ctx)(state, torch.ones(4, 2))
        >>> int(state.step), int(after.step), sorted(metrics)
        (0, 1, ['loss'])
    """
    spec = LossSpec(loss_fn, has_buffers, has_aux, weight, num_micro_batches, bucket_cap_mb)
    return step_along(gradient, spec, transformation, ctx, donating=donate)


def step_along(
    direction: Direction,
    spec: LossSpec,
    transformation: GradientTransformation,
    ctx: DistContext,
    *,
    donating: bool,
) -> Step:
    """Return the step that moves along what `direction` gives; see `make_step`."""
    check_replicas(ctx, "use `faccel.wrap` and `faccel.optimizer_step`, which train on every mesh")
    check_transformation(transformation)
    if not transformation.makes_params:
        raise OptimizerError(
            "a step needs an optimizer, or nothing would be trained",
            got=f"`{transformation.name}`, which only changes gradients",
            fix=f"write `chain({transformation.name}(...), adamw(1e-3))`",
        )
    own = torch.Generator(
        ctx.device
    )  # seeded anew for every step: making one takes longer than that
    unchecked = [
        True
    ]  # the first call looks for writes by value; it would cost a pass over all values at every step

    def step(
        state: TrainState, batch: Tree, generator: Stream | None = None
    ) -> tuple[Metrics, TrainState]:
        check_state(state)
        traced = is_traced(state.params)
        _check_call(state, donating=donating, traced=traced)
        if generator is None:
            generator = NoStream() if traced else seeded(own, state.seed, state.step, ctx)
        scaler = state.scaler
        if traced and scaler.enabled:
            raise _no_scaling()
        buffers = state.buffers if spec.has_buffers else None
        by_value = not traced and unchecked[0]
        task = Task(spec, ctx, state.params, batch, generator, buffers, scaler.scale, by_value)
        found = direction(task)
        if by_value:
            unchecked[0] = False
        metrics = _metrics(found, has_aux=spec.has_aux, copied=donating)
        updates, opt, scaler = _updated(
            transformation, found, state, donate=donating and not traced
        )
        held = (
            state.buffers
            if found.buffers is None
            else tensordict(dict(state.buffers.items()) | found.buffers)
        )
        new = TrainState(
            apply_updates(state.params, updates), held, opt, scaler, state.step + 1, state.seed
        )
        if donating:
            new = _into(state, new) if traced else new
            donate(state)
        return metrics | dict(updates.metrics), new

    return step


def _metrics(found: Outcome, *, has_aux: bool, copied: bool) -> Metrics:
    metrics: Metrics = {"loss": found.loss} | ({"aux": found.aux} if has_aux else {})
    if not copied:
        return metrics
    # a loss, or what else is returned, may be a parameter itself
    return map_leaves(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, metrics)


def _updated(
    transformation: GradientTransformation, found: Outcome, state: TrainState, *, donate: bool
) -> tuple[Updates, TensorDict, ScalerState]:
    """Return updates and the state of the optimizer behind them; an update that overflowed in fp16 is left out."""
    scaler, updates = state.scaler, Updates(tensordict(found.grads), donate=donate)
    if not scaler.enabled:
        return (*transformation.update(updates, state.opt, state.params), scaler)
    finite = _all_finite(found)
    scaler = scaler.after_backward().after_step(transformation, finite=finite)
    skipped = {"skipped": found.loss.new_full((), not finite, dtype=torch.bool)}
    if not finite:
        return updates._replace(metrics=skipped), state.opt, scaler
    updates, opt = transformation.update(updates, state.opt, state.params)
    return updates._replace(metrics=skipped | dict(updates.metrics)), opt, scaler


def _check_call(state: TrainState, *, donating: bool, traced: bool) -> None:
    if traced and donating and not torch.compiler.is_compiling():
        raise ConfigError(
            "a step that donates cannot be vmapped or differentiated: it would write into what is outside",
            got="`donate=True` under a transform",
            fix="write `make_step(..., donate=False)`",
        )
    if not traced and state.seed.ndim:
        raise ConfigError(
            "a step takes one state",
            got=f"{state.seed.numel()} states, stacked",
            fix="write `ensemble(step, ctx)(states, batch)`",
        )


def _all_finite(found: Outcome) -> bool:
    """Whether every gradient is finite. Waits for the device, as torch's GradScaler does."""
    return bool(torch.stack([grad.isfinite().all() for grad in found.grads.values()]).all())


def _into(old: TrainState, new: TrainState) -> TrainState:
    """Return `new` in the storage of `old`, inside of a compiled step."""
    for name in ("params", "buffers", "opt"):
        there = leaves(getattr(old, name))
        for path, value in leaves(getattr(new, name)).items():
            if there[path] is not value:
                there[path].copy_(value)
    return attrs.evolve(new, params=old.params, buffers=old.buffers, opt=old.opt)


def _no_scaling() -> ConfigError:
    return ConfigError(
        "the loss scale of fp16 is a decision of the host, which a compiled or vmapped step cannot make",
        got="mixed_precision=fp16 under a transform",
        fix='use `mixed_precision="bf16"`',
    )
