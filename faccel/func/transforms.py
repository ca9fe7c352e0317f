"""Transformations of gradients, control of updates, and averages of parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import TensorDict
from torch.nn.utils import get_total_norm

from faccel.checks import in_range, positive, positive_or_tensor
from faccel.errors import ConfigError, OptimizerError, short_repr
from faccel.func.gradient_transformation import (
    GradientTransformation,
    Role,
    Updates,
    empty_state,
    is_traced,
    logical_and,
    state_error,
    to_bool,
)
from faccel.func.schedules import Schedule
from faccel.func.tensordicts import NamedTensors, flat_dict, foreach, to_tensordict
from faccel.tree import Tree


def initial_count() -> torch.Tensor:
    """Return a count of 0 updates, int64[] on the CPU, where reading it waits for no device."""
    return torch.zeros((), dtype=torch.int64)


def schedule_value(schedule: Schedule | float, count: torch.Tensor) -> Tree:
    """Return the value of a schedule: a float, or float64[] under a transform."""
    if not callable(schedule):
        return schedule
    # float64, as a Python float: rates of traced and eager steps agree.
    if is_traced():
        return schedule(count.double())
    return schedule(int(count))


def global_norm(grads: TensorDict) -> torch.Tensor:
    """Return the 2-norm of all gradients as one vector, `T[]`.

    Effects: pure.

    Examples:
        >>> from faccel.func import global_norm
        >>> global_norm(TensorDict({"a": torch.tensor(3.0), "b": torch.tensor(4.0)}))
        tensor(5.)
    """
    tensors = list(flat_dict(grads).values())
    if is_traced(grads):
        # get_total_norm does not accept batched tensors, and its foreach norm has no derivative
        return torch.stack([torch.linalg.vector_norm(grad) for grad in tensors]).norm()
    return get_total_norm(tensors)


def clip_by_global_norm(max_norm: float | torch.Tensor) -> GradientTransformation:
    """Scale all gradients so that their global norm is at most `max_norm`.

    The arithmetic is the one of `torch.nn.utils.clip_grad_norm_`. The norm before clipping is
    stored in `metrics["grad_norm"]`.

    Effects: pure.

    Args:
        max_norm: Positive, a number or a 0-d tensor; `float("inf")` measures the norm and clips
            nothing.

    Raises:
        ConfigError: `max_norm` is not positive.

    Examples:
        >>> from faccel.func import clip_by_global_norm
        >>> clip = clip_by_global_norm(1.0)
        >>> grads = TensorDict({"w": torch.tensor([3.0, 4.0])})
        >>> updates, _ = clip.update(grads, clip.init(grads), grads)
        >>> updates.grads["w"], updates.metrics["grad_norm"]
        (tensor([0.6000, 0.8000]), tensor(5.))
    """
    positive_or_tensor("max_norm", max_norm)

    def update(
        updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]:
        norm = global_norm(updates.grads)
        # 1e-6 as in clip_grad_norm_: no division by a norm of 0
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        if updates.donate:
            grads = updates.grads
            foreach._foreach_mul_(list(grads.values()), factor)
        else:
            scaled = {name: g * factor.to(g.device) for name, g in updates.grads.items()}
            grads = to_tensordict(scaled)
        metrics = {**updates.metrics, "grad_norm": norm}
        return updates._replace(grads=grads, metrics=metrics), state

    return GradientTransformation("clip_by_global_norm", empty_state, update, Role.GRADIENTS)


def clip_by_value(max_value: float) -> GradientTransformation:
    """Clamp every element of every gradient to `[-max_value, max_value]`.

    Effects: pure.

    Args:
        max_value: Positive.

    Raises:
        ConfigError: `max_value` is not positive.

    Examples:
        >>> from faccel.func import clip_by_value
        >>> clip, grads = clip_by_value(1.0), TensorDict({"w": torch.tensor([3.0, -0.5])})
        >>> clip.update(grads, clip.init(grads), grads)[0].grads["w"]
        tensor([ 1.0000, -0.5000])
    """
    positive("max_value", max_value)

    def update(
        updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]:
        clipped = {name: g.clamp(-max_value, max_value) for name, g in updates.grads.items()}
        return updates._replace(grads=to_tensordict(clipped)), state

    return GradientTransformation("clip_by_value", empty_state, update, Role.GRADIENTS)


def scale_by_schedule(schedule: Schedule) -> GradientTransformation:
    """Multiply the learning rate of the optimizer after it by `schedule(count)`.

    The arithmetic is the one of `torch.optim.lr_scheduler.LambdaLR`.

    Effects: pure.

    Args:
        schedule: A function of the number of completed updates, 0 at the first one. Updates that
            were skipped do not count.

    Raises:
        ConfigError: `schedule` is not a function.

    Examples:
        >>> from faccel.func import apply_updates, chain, linear, scale_by_schedule, sgd
        >>> optimizer = chain(scale_by_schedule(linear(0.5, 0.0, 10)), sgd(1.0))
        >>> params, grads = TensorDict({"w": torch.ones(())}), TensorDict({"w": torch.ones(())})
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> apply_updates(params, updates)["w"]
        tensor(0.5000)
    """
    if not callable(schedule):
        raise ConfigError(
            "`schedule` must be a function of the number of updates",
            got=short_repr(schedule),
            fix="write `scale_by_schedule(cosine(1000))`, or `lambda count: 0.5`",
        )

    def init(params: TensorDict, /) -> TensorDict:
        return to_tensordict({"count": initial_count()})

    def update(
        updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]:
        _check_entries("scale_by_schedule", state, "count")
        count = state["count"]
        lr_scale = updates.lr_scale * schedule_value(schedule, count)
        return updates._replace(lr_scale=lr_scale), to_tensordict({"count": count + 1})

    return GradientTransformation("scale_by_schedule", init, update, Role.CONTROL)


def accumulate(num_steps: int) -> GradientTransformation:
    """Apply the rest of a chain at every `num_steps`-th step only, with the mean gradient.

    For micro-batches of one batch, `num_micro_batches=` of `make_step` is cheaper: it stores no
    sum in the state.

    Effects: pure.

    Args:
        num_steps: Steps of one update, at least 1.

    Raises:
        ConfigError: `num_steps` is not positive.

    Examples:
        >>> from faccel.func import accumulate, chain, sgd
        >>> optimizer = chain(accumulate(4), sgd(0.1))
        >>> params = TensorDict({"w": torch.ones(2)})
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> updates.params, int(state["accumulate"]["count"])
        (None, 1)
    """
    positive("num_steps", num_steps)

    def init(params: TensorDict, /) -> TensorDict:
        # One more copy of the gradients in the state.
        zeros = {name: torch.zeros_like(param) for name, param in flat_dict(params).items()}
        return to_tensordict({"count": initial_count(), "sum": zeros})

    def update(
        updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]:
        _check_entries("accumulate", state, "count", "sum")
        sums = _add(flat_dict(state["sum"]), flat_dict(updates.grads), in_place=updates.donate)
        is_last = to_bool(state["count"] == num_steps - 1)
        grads = sums
        # Under a transform `is_last` is a tensor: the mean is needed in case it is true.
        if is_last is not False:
            grads = {name: total / num_steps for name, total in sums.items()}
        # The mean above is computed from the sums before they are reset.
        sums = _reset_if(sums, condition=is_last, in_place=updates.donate)
        # The number of gradients in the sum, not of updates.
        count = (state["count"] + 1) % num_steps
        apply = logical_and(updates.apply, is_last)
        new_state = to_tensordict({"count": count, "sum": sums})
        return updates._replace(grads=to_tensordict(grads), apply=apply), new_state

    return GradientTransformation("accumulate", init, update, Role.CONTROL)


def _add(sums: NamedTensors, grads: NamedTensors, *, in_place: bool) -> NamedTensors:
    if in_place:
        foreach._foreach_add_(list(sums.values()), [grads[name] for name in sums])
        return sums
    return {name: sums[name] + grad for name, grad in grads.items()}


def _reset_if(
    sums: NamedTensors, *, condition: bool | torch.Tensor, in_place: bool
) -> NamedTensors:
    """Return zeros if `condition`, else `sums`."""
    if isinstance(condition, torch.Tensor):
        return {name: torch.where(condition, 0.0, total) for name, total in sums.items()}
    if not condition:
        return sums
    if in_place:
        foreach._foreach_zero_(list(sums.values()))
        return sums
    return {name: torch.zeros_like(total) for name, total in sums.items()}


def skip_nonfinite() -> GradientTransformation:
    """Skip an update if a gradient is not finite: parameters and later states stay unchanged.

    Eagerly this waits for the device, as PyTorch's GradScaler does. Under a transform it does not
    wait: the update is computed, and the old values are selected. All ranks have the same
    gradients, so that they agree. `metrics["skipped"]`, bool[], reports whether it was skipped.

    Effects: pure.

    Examples:
        >>> from faccel.func import chain, sgd, skip_nonfinite
        >>> optimizer, params = chain(skip_nonfinite(), sgd(0.1)), TensorDict({"w": torch.ones(2)})
        >>> grads = TensorDict({"w": torch.tensor([1.0, float("nan")])})
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
        >>> updates.params, int(state["skip_nonfinite"]["num_skipped"])
        (None, 1)
    """

    def init(params: TensorDict, /) -> TensorDict:
        # On the device of the gradients, not on the CPU as other counts: `isfinite` is computed
        # there, and no step reads the number of skipped updates.
        device = next(iter(flat_dict(params).values())).device
        return to_tensordict({"num_skipped": torch.zeros((), dtype=torch.int64, device=device)})

    def update(
        updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]:
        _check_entries("skip_nonfinite", state, "num_skipped")
        is_finite = torch.stack([grad.isfinite().all() for grad in updates.grads.values()]).all()
        # Computed on the device: the host is not asked.
        new_state = to_tensordict({"num_skipped": state["num_skipped"] + ~is_finite})
        metrics = {**updates.metrics, "skipped": ~is_finite}
        apply = logical_and(updates.apply, to_bool(is_finite))
        return updates._replace(apply=apply, metrics=metrics), new_state

    return GradientTransformation("skip_nonfinite", init, update, Role.CONTROL)


def ema(decay: float) -> GradientTransformation:
    """Store an exponential moving average of the parameters, after the optimizer of a chain.

    `average = decay * average + (1 - decay) * params`, in the arithmetic of
    `torch.optim.swa_utils.get_ema_multi_avg_fn`, starting from the initial parameters.
    `ema_params` returns the averages.

    Effects: pure.

    Args:
        decay: From 0 to 1, such as 0.999.

    Raises:
        ConfigError: `decay` is out of range.

    Examples:
        >>> from faccel.func import chain, ema, ema_params, sgd
        >>> optimizer, params = chain(sgd(1.0), ema(0.9)), TensorDict({"w": torch.ones(())})
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> updates.params["w"], ema_params(state)["w"]
        (tensor(0.), tensor(0.9000))
    """
    in_range("decay", decay, 0, 1)

    def init(params: TensorDict, /) -> TensorDict:
        return to_tensordict({"average": {name: p.clone() for name, p in params.items()}})

    def update(
        updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]:
        _check_entries("ema", state, "average")
        if updates.params is None:  # the update was skipped
            return updates, state
        averages = flat_dict(state["average"])
        new_params = flat_dict(updates.params)
        # lerp: average + (1 - decay) * (params - average).
        if updates.donate:
            ends = [new_params[name] for name in averages]
            foreach._foreach_lerp_(list(averages.values()), ends, 1 - decay)
            return updates, state
        # Parameters of the state only: inside of `masked` there are fewer.
        moved: NamedTensors = {}
        for name, average in averages.items():
            moved[name] = average.lerp(new_params[name], 1 - decay)
        return updates, to_tensordict({"average": moved})

    return GradientTransformation("ema", init, update, Role.PARAMS)


def ema_params(opt: TensorDict) -> TensorDict:
    """Return the averaged parameters that `ema` stores in the state of an optimizer.

    Effects: pure. The result aliases the state.

    Args:
        opt: `state.opt` of a chain with `ema`, also inside of `partition` or `masked`.

    Raises:
        OptimizerError: The state has no averages.

    Examples:
        >>> from faccel.func import chain, ema, ema_params, sgd
        >>> ema_params(chain(sgd(0.1), ema(0.9)).init(TensorDict({"w": torch.ones(())})))["w"]
        tensor(1.)
    """
    averages = _find_averages(opt)
    if not averages:
        raise OptimizerError(
            "this optimizer state has no averaged parameters",
            got="no `ema`",
            fix="write `chain(adamw(1e-3), ema(0.999))`",
        )
    return to_tensordict(averages)


def _find_averages(opt: TensorDict) -> NamedTensors:
    """Return the averages of all groups of a `partition`, at any depth."""
    states: dict[str, TensorDict] = {}
    for name, value in opt.items():
        if isinstance(value, TensorDict):
            states[str(name)] = value
    # `average` is the only entry of the state of `ema`, and a chain may have a member of any name
    if list(opt.keys()) == ["average"]:
        return flat_dict(states["average"])
    # Names are unique: a parameter has one label.
    averages: NamedTensors = {}
    for state in states.values():
        averages |= _find_averages(state)
    return averages


def _check_entries(name: str, state: Mapping[str, object] | TensorDict, *expected: str) -> None:
    keys = [str(key) for key in state.keys()]  # noqa: SIM118 (a TensorDict iterates over its rows)
    if set(keys) != set(expected):
        raise state_error(name, keys, expected)
