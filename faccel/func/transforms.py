"""Transformations that look at gradients or parameters, and say whether an update happens at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from torch.nn.utils import get_total_norm

from faccel.errors import ConfigError, OptimizerError
from faccel.func.gradient_transformation import (
    GradientTransformation,
    Updates,
    both,
    empty,
    is_traced,
    known,
)
from faccel.func.tensordicts import foreach, named, tensordict

Schedule = Callable[[Any], Any]
"""`schedule(count) -> factor`, of the number of updates that are done: an int, or a float64[] under a transform."""


def zero_count() -> torch.Tensor:
    """Return a count of updates to start with, on the CPU, where reading it makes nobody wait."""
    return torch.zeros((), dtype=torch.int64)


def at(schedule: Schedule | float, count: torch.Tensor) -> Any:
    """Return the value of a schedule, a number where the host knows the count."""
    if not callable(schedule):
        return schedule
    return schedule(count.double() if is_traced() else int(count))


def _multiplied(grads: TensorDict, factor: torch.Tensor, *, in_place: bool) -> TensorDict:
    if in_place:
        foreach._foreach_mul_(list(grads.values()), factor)
        return grads
    return tensordict({name: grad * factor.to(grad.device) for name, grad in grads.items()})


def global_norm(grads: TensorDict) -> torch.Tensor:
    """Return the 2-norm of all gradients together, `T[]`.

    Effects: pure.

    Examples:
        >>> from faccel.func import global_norm
        >>> global_norm(TensorDict({"a": torch.tensor(3.0), "b": torch.tensor(4.0)}))
        tensor(5.)
    """
    each = list(named(grads).values())
    if is_traced(grads):  # torch's takes no batched tensors, and no gradient passes through it
        return torch.stack([torch.linalg.vector_norm(grad) for grad in each]).norm()
    return get_total_norm(each)


def clip_by_global_norm(max_norm: float) -> GradientTransformation:
    """Scale all gradients so that their norm together is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does.

    The norm from before is told as `metrics["grad_norm"]`; `float("inf")` measures it and clips nothing.

    Effects: pure.

    Examples:
        >>> from faccel.func import clip_by_global_norm
        >>> clip = clip_by_global_norm(1.0)
        >>> grads = TensorDict({"w": torch.tensor([3.0, 4.0])})
        >>> updates, _ = clip.update(grads, clip.init(grads), grads)
        >>> updates.grads["w"], updates.metrics["grad_norm"]
        (tensor([0.6000, 0.8000]), tensor(5.))
    """
    _check_positive("max_norm", max_norm)

    def update(
        updates: Updates, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        norm = global_norm(updates.grads)
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        grads = _multiplied(updates.grads, factor, in_place=updates.donate)
        return updates._replace(grads=grads, metrics={**updates.metrics, "grad_norm": norm}), state

    return GradientTransformation("clip_by_global_norm", empty, update, wants="before")


def clip_by_value(max_value: float) -> GradientTransformation:
    """Clamp every element of every gradient to `[-max_value, max_value]`.

    Effects: pure.

    Examples:
        >>> from faccel.func import clip_by_value
        >>> clip, grads = clip_by_value(1.0), TensorDict({"w": torch.tensor([3.0, -0.5])})
        >>> clip.update(grads, clip.init(grads), grads)[0].grads["w"]
        tensor([ 1.0000, -0.5000])
    """
    _check_positive("max_value", max_value)

    def update(
        updates: Updates, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        grads = {name: grad.clamp(-max_value, max_value) for name, grad in updates.grads.items()}
        return updates._replace(grads=tensordict(grads)), state

    return GradientTransformation("clip_by_value", empty, update, wants="before")


def scale_by_schedule(schedule: Schedule) -> GradientTransformation:
    """Multiply the learning rate of the optimizer behind it by `schedule(count)`, as torch's `LambdaLR` does.

    Effects: pure.

    Args:
        schedule: A function of the number of updates that are done, 0 at the first. One that was left out does not
            count.

    Examples:
        >>> from faccel.func import adamw, chain, cosine, scale_by_schedule
        >>> optimizer = chain(scale_by_schedule(cosine(1000, warmup=100)), adamw(1e-3))
    """
    if not callable(schedule):
        raise ConfigError(
            "a schedule is a function of the number of updates",
            got=repr(schedule),
            fix="write `scale_by_schedule(cosine(1000))`, or `lambda count: 0.5`",
        )

    def init(params: TensorDict) -> TensorDict:
        return tensordict({"count": zero_count()})

    def update(
        updates: Updates, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        _check_keys("scale_by_schedule", state, "count")
        scale = updates.lr_scale * at(schedule, state["count"])
        return updates._replace(lr_scale=scale), tensordict({"count": state["count"] + 1})

    return GradientTransformation(
        "scale_by_schedule", init, update, wants="before", acts_on_rest=True
    )


def accumulate(num_steps: int) -> GradientTransformation:
    """Let the rest of the chain happen at every `num_steps`-th step only, with the mean of the gradients until then.

    Effects: pure. For micro-batches of one batch `num_micro_batches=` of `make_step` is cheaper: it keeps no sum in the state.

    Examples:
        >>> from faccel.func import accumulate, adamw, chain, clip_by_global_norm
        >>> optimizer = chain(accumulate(4), clip_by_global_norm(1.0), adamw(1e-3))
    """
    if num_steps < 1:
        raise ConfigError(
            "gradients of at least one step are accumulated",
            got=str(num_steps),
            fix="use 1 or more",
        )

    def init(params: TensorDict) -> TensorDict:
        return tensordict(
            {
                "count": zero_count(),
                "sum": {name: torch.zeros_like(param) for name, param in named(params).items()},
            }
        )

    def update(
        updates: Updates, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        _check_keys("accumulate", state, "count", "sum")
        held = state["sum"]
        if updates.donate:
            foreach._foreach_add_(
                list(held.values()), [updates.grads[name] for name in held.keys()]
            )  # noqa: SIM118
            total = dict(held.items())
        else:
            total = {name: held[name] + grad for name, grad in updates.grads.items()}
        due = known(state["count"] == num_steps - 1)
        mean = (
            {name: each / num_steps for name, each in total.items()} if due is not False else total
        )
        if isinstance(due, torch.Tensor):
            total = {name: torch.where(due, 0.0, each) for name, each in total.items()}
        elif due:
            total = {
                name: each.zero_() if updates.donate else torch.zeros_like(each)
                for name, each in total.items()
            }
        new = tensordict({"count": (state["count"] + 1) % num_steps, "sum": total})
        return updates._replace(grads=tensordict(mean), apply=both(updates.apply, due)), new

    return GradientTransformation("accumulate", init, update, wants="before", acts_on_rest=True)


def skip_nonfinite() -> GradientTransformation:
    """Leave an update out in which a gradient is not finite: parameters and the states behind it stay as they are.

    The host waits for the device, as torch's GradScaler does; inside of `torch.compile` nobody waits, and the update is
    computed and not chosen. `metrics["skipped"]` says what happened. All ranks have the same gradients, so that they
    agree.

    Effects: pure.

    Examples:
        >>> from faccel.func import chain, sgd, skip_nonfinite
        >>> optimizer, params = chain(skip_nonfinite(), sgd(0.1)), TensorDict({"w": torch.ones(2)})
        >>> grads = TensorDict({"w": torch.tensor([1.0, float("nan")])})
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> updates.params, int(state["skip_nonfinite"]["num_skipped"])
        (None, 1)
    """

    def init(params: TensorDict) -> TensorDict:
        device = next(
            iter(named(params).values())
        ).device  # where the gradients will be: nobody reads it at every step
        return tensordict({"num_skipped": torch.zeros((), dtype=torch.int64, device=device)})

    def update(
        updates: Updates, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        _check_keys("skip_nonfinite", state, "num_skipped")
        finite = torch.stack([grad.isfinite().all() for grad in updates.grads.values()]).all()
        new = tensordict({"num_skipped": state["num_skipped"] + ~finite})
        metrics = {**updates.metrics, "skipped": ~finite}
        return updates._replace(apply=both(updates.apply, known(finite)), metrics=metrics), new

    return GradientTransformation("skip_nonfinite", init, update, wants="before", acts_on_rest=True)


def ema(decay: float) -> GradientTransformation:
    """Keep an exponential moving average of the parameters, behind the optimizer of a chain; see `ema_params`.

    The arithmetic is that of `torch.optim.swa_utils.get_ema_multi_avg_fn`, beginning with the first parameters.

    Effects: pure.

    Examples:
        >>> from faccel.func import adamw, chain, ema
        >>> optimizer = chain(adamw(1e-3), ema(0.999))
    """
    if not 0 <= decay <= 1:
        raise ConfigError(
            "a decay is a number from 0 to 1", got=str(decay), fix="write `ema(0.999)`"
        )

    def init(params: TensorDict) -> TensorDict:
        return tensordict({"average": {name: param.clone() for name, param in params.items()}})

    def update(
        updates: Updates, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        _check_keys("ema", state, "average")
        if updates.params is None:  # its optimizer left the update out
            return updates, state
        held: Any = state["average"]
        new = {name: updates.params[name] for name in held.keys()}  # noqa: SIM118
        if updates.donate:
            foreach._foreach_lerp_(list(held.values()), list(new.values()), 1 - decay)
            return updates, state
        return updates, tensordict(
            {"average": {n: old.lerp(new[n], 1 - decay) for n, old in held.items()}}
        )

    return GradientTransformation("ema", init, update, wants="after")


def ema_params(opt: TensorDict) -> TensorDict:
    """Return the averaged parameters that `ema` keeps somewhere in the state of an optimizer.

    Effects: pure. They alias the state.

    Raises:
        OptimizerError: There is no `ema` in it.

    Examples:
        >>> from faccel.func import chain, ema, ema_params, sgd
        >>> ema_params(chain(sgd(0.1), ema(0.9)).init(TensorDict({"w": torch.ones(())})))["w"]
        tensor(1.)
    """
    found = _averages(opt)
    if not found:
        raise OptimizerError(
            "no averages are kept in this state",
            got="no `ema`",
            fix="write `chain(adamw(1e-3), ema(0.999))`",
        )
    return tensordict(found)


def _averages(opt: TensorDict) -> dict[str, torch.Tensor]:
    """Return those of all parts of a `partition`."""
    parts = {str(name): each for name, each in opt.items() if isinstance(each, TensorDict)}
    if list(opt.keys()) == ["average"]:
        return named(parts["average"])
    return {name: value for each in parts.values() for name, value in _averages(each).items()}


def _check_keys(name: str, state: TensorDict, *keys: str) -> None:
    found = {str(key) for key in state.keys()}  # noqa: SIM118 (a TensorDict walks its rows)
    if found != set(keys):
        raise OptimizerError(
            f"this is not the state of `{name}`",
            got=f"`{'`, `'.join(sorted(found))}` where `{'`, `'.join(keys)}` belong",
            fix="make state and step with the same transformation",
        )


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ConfigError(
            f"`{name}` must be positive", got=str(value), fix="leave it out to clip nothing"
        )
