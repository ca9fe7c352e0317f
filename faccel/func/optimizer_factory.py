"""How an optimizer is made of one of torch's functional kernels, and of the formula of the same algorithm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from tensordict import TensorDict

import faccel.func.formulas as formulas
from faccel.errors import ConfigError, OptimizerError
from faccel.func.gradient_transformation import GradientTransformation, Updates, is_traced
from faccel.func.tensordicts import check_like, foreach, named, tensordict
from faccel.func.transforms import Schedule, at, zero_count

Slots = dict[str, torch.Tensor]


@attrs.frozen(eq=False)
class Rule:
    """One algorithm.

    Args:
        slots: `slots(param) -> {name: tensor}`: what is kept for a parameter.
        kernel: `kernel(params, grads, slots, steps, lr)` writes into lists of tensors; a slot that a parameter lacks is
            None.
        formula: `formula(param, grad, slots, count, lr) -> (param, slots)`, pure.
        has_own_shapes: Whether slots have other shapes than their parameter.
        writes_grads: Whether the kernel may write into the gradients.
        on_device: Whether the kernel wants the number of steps on the device.
    """

    slots: Callable[[torch.Tensor], Slots]
    kernel: Callable[..., None]
    formula: Callable[..., tuple[torch.Tensor, Slots]]
    has_own_shapes: bool = False
    on_device: bool = False
    writes_grads: bool = False


_NOT_NEGATIVE = (
    "eps",
    "eps1",
    "eps2",
    "weight_decay",
    "momentum",
    "lr_decay",
    "initial_accumulator_value",
    "alpha",
)
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_NOT_NEGATIVE, (0.0, float("inf"))),
    **dict.fromkeys(("beta1", "beta2"), (0.0, 1.0 - 1e-12)),
    "d": (1.0, float("inf")),
    "beta2_decay": (-float("inf"), 0.0),
    "ns_steps": (1, 99),
}


def _check_ranges(name: str, lr: float | Schedule, options: dict[str, Any]) -> None:
    if not callable(lr) and not lr >= 0:
        raise ConfigError(
            "a learning rate is not negative", got=f"lr={lr}", fix=f"write `{name}(1e-3)`"
        )
    for option, value in options.items():
        low, high = _RANGES.get(option, (None, None))
        if low is not None and high is not None and value is not None and not low <= value <= high:
            limits = " and ".join(
                [f"at least {low:g}"] * (low > -high) + [f"at most {high}"] * (high < float("inf"))
            )
            raise ConfigError(
                f"`{option}` of `{name}` must be {limits}",
                got=str(value),
                fix="leave it out for torch's",
            )


def optimizer(
    name: str, lr: float | Schedule, rule: Rule, **options: Any
) -> GradientTransformation:
    """Return the gradient transformation of an algorithm, whose state is `count` and a TensorDict for each slot."""
    _check_ranges(name, lr, options)
    known = set(rule.slots(torch.zeros(2, 2)))
    known |= set(rule.slots(torch.zeros(2))) if rule.has_own_shapes else set()

    def init(params: TensorDict) -> TensorDict:
        state: dict[str, Any] = {"count": zero_count()}
        for leaf, param in named(params).items():
            for slot, value in rule.slots(param).items():
                state.setdefault(slot, {})[leaf] = value
        return tensordict(state)

    def update(
        updates: Updates, state: TensorDict, params: TensorDict
    ) -> tuple[Updates, TensorDict]:
        rate = at(lr, state["count"]) * updates.lr_scale
        slots = {slot: each for slot, each in state.items() if slot != "count"}
        _check_slots(name, slots, known, params, rule)
        run: Any = (
            _by_formula if is_traced(params) or isinstance(rate, torch.Tensor) else _by_kernel
        )
        new_params, new_slots = run(rule, updates, slots, state["count"], params, rate)
        return updates._replace(params=new_params), tensordict(
            {"count": state["count"] + 1, **new_slots}
        )

    return GradientTransformation(name, init, update, makes_params=True)


def _check_slots(
    name: str, slots: dict[str, Any], known: set[str], params: TensorDict, rule: Rule
) -> None:
    if not slots.keys() <= known or (slots.keys() != known and not rule.has_own_shapes):
        raise OptimizerError(
            f"this is not the state of `{name}`",
            got=f"`{'`, `'.join(sorted(slots))}` where `{'`, `'.join(sorted(known))}` belong",
            fix="make state and step with the same transformation",
        )
    if rule.has_own_shapes:
        return
    for slot, each in slots.items():
        check_like(params, each, f"`{slot}` of {name}")


def _by_kernel(
    rule: Rule,
    updates: Updates,
    slots: dict[str, Any],
    count: torch.Tensor,
    params: TensorDict,
    rate: float,
) -> tuple[TensorDict, dict[str, Any]]:
    names, by_name = list(named(params)), named(updates.grads)
    grads = [by_name[name] for name in names]
    new_params, new_slots = params, slots
    if not updates.donate:
        grads = foreach._foreach_clone(grads) if rule.writes_grads else grads
        new_params, *copies = _cloned([params, *slots.values()])
        new_slots = dict(zip(slots, copies, strict=True))
    device = params[names[0]].device if rule.on_device else count.device
    done = int(count)
    steps = list(
        torch.full((len(names),), float(done), device=device).unbind()
    )  # torch keeps one a parameter
    lists: dict[str, list[Any]] = {}
    for slot, each in new_slots.items():
        held = dict(each.items())
        lists[slot] = [held.get(name) for name in names]
    with torch.no_grad():
        rule.kernel(list(new_params.values()), grads, lists, steps, rate, is_first=done == 0)
    return new_params, new_slots


def _where(rate: Any, param: torch.Tensor) -> Any:
    """Return a learning rate where a parameter is, where it is a tensor."""
    return formulas.like(rate, param) if isinstance(rate, torch.Tensor) else rate


def _cloned(trees: list[TensorDict]) -> list[TensorDict]:
    """Return copies of flat TensorDicts, all made in one call."""
    parts = [named(tree) for tree in trees]
    copies = iter(foreach._foreach_clone([tensor for part in parts for tensor in part.values()]))
    return [tensordict({name: next(copies) for name in part}) for part in parts]


def _by_formula(
    rule: Rule,
    updates: Updates,
    slots: dict[str, Any],
    count: torch.Tensor,
    params: TensorDict,
    rate: Any,
) -> tuple[TensorDict, dict[str, Any]]:
    new_params: dict[str, torch.Tensor] = {}
    new_slots: dict[str, dict[str, torch.Tensor]] = {slot: {} for slot in slots}
    for name, param in named(params).items():
        if param.is_complex():
            raise OptimizerError(
                "under a transform of torch's, optimizers are for real parameters",
                got=f"`{name}`, {param.dtype}",
                fix="train outside of `vmap` and `torch.compile`, or keep its `torch.view_as_real`",
            )
        mine = {slot: each[name] for slot, each in slots.items() if name in each.keys()}  # noqa: SIM118
        made, new = rule.formula(param, updates.grads[name], mine, count, _where(rate, param))
        new_params[name] = made.to(param.dtype)
        for slot, value in new.items():
            new_slots[slot][name] = value.to(param.dtype)
    return tensordict(new_params), {slot: tensordict(each) for slot, each in new_slots.items()}
