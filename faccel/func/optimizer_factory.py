"""How an optimizer is made of a PyTorch kernel and of the formula of the same algorithm.

Two implementations of one algorithm are needed where they are not bit-equal:

- A kernel of `torch.optim` rounds as the class of that name does (`lerp_`, `addcdiv_`, `alpha=`),
  runs over lists of tensors (`foreach`, `fused`), and writes into its arguments, so that a
  donated state needs no second copy. It reads the number of steps and the learning rate as Python
  numbers, which a tensor under `vmap`, `grad` or `torch.compile` does not have.
- A formula can be traced. Its operations round at other places.

An algorithm whose formula is bit-equal to the kernel has no kernel here (Muon).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import attrs
import torch
from tensordict import TensorDict

from faccel.errors import ConfigError, OptimizerError
from faccel.func.formulas import Formula, Rate, Slots, scalar_like
from faccel.func.gradient_transformation import (
    GradientTransformation,
    Role,
    Updates,
    is_traced,
    state_error,
)
from faccel.func.schedules import Schedule
from faccel.func.tensordicts import (
    NamedTensors,
    check_same_structure,
    flat_dict,
    to_tensordict,
)
from faccel.func.transforms import initial_count, schedule_value
from faccel.torch_names import clone_all
from faccel.tree import Tree

SlotDicts = dict[str, TensorDict]
"""For each slot, as `exp_avg`, a TensorDict with the names of the parameters."""


class KernelArguments(NamedTuple):
    """Arguments of a kernel, with one entry per parameter in each list.

    Args:
        params: Parameters, written in place.
        grads: Gradients.
        slots: By name a list of tensors, written in place; None for a parameter without this slot.
        steps: Number of completed updates, float32[]; PyTorch's kernels store one per parameter.
        lr: Learning rate.
        is_first: Whether this is the first update.
    """

    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    slots: Mapping[str, Tree]
    steps: list[torch.Tensor]
    lr: float
    is_first: bool


@attrs.frozen(eq=False)
class Algorithm:
    """One optimization algorithm.

    Args:
        init_slots: `init_slots(param) -> {name: tensor}`: what is stored for a parameter.
        formula: `formula(param, grad, slots, count, lr) -> (param, slots)`, pure.
        kernel: Writes the update into its arguments; None if the formula is bit-equal to
            PyTorch's kernel.
        has_own_shapes: Whether slots have other shapes than their parameter.
        steps_on_device: Whether the kernel needs the number of steps on the device.
        writes_grads: Whether the kernel may write into the gradients.
    """

    init_slots: Callable[[torch.Tensor], Slots]
    formula: Formula
    kernel: Callable[[KernelArguments], None] | None = None
    has_own_shapes: bool = False
    steps_on_device: bool = False
    writes_grads: bool = False

    def slot_names(self) -> set[str]:
        """Return the names of the slots of all parameters."""
        # Asked of small tensors once, instead of listing the names a second time.
        names = set(self.init_slots(torch.zeros(2, 2)))
        if self.has_own_shapes:
            names |= set(self.init_slots(torch.zeros(2)))
        return names


class _Range(NamedTuple):
    text: str
    low: float
    high: float


_NON_NEGATIVE = _Range("at least 0", 0.0, math.inf)
_BELOW_ONE = _Range("at least 0 and below 1", 0.0, math.nextafter(1.0, 0.0))
# the ranges that the classes of `torch.optim` accept
_RANGES = {
    "alpha": _NON_NEGATIVE,
    "beta1": _BELOW_ONE,
    "beta2": _BELOW_ONE,
    "beta2_decay": _Range("at most 0", -math.inf, 0.0),
    "d": _Range("at least 1", 1.0, math.inf),
    "eps": _NON_NEGATIVE,
    "eps1": _NON_NEGATIVE,
    "eps2": _NON_NEGATIVE,
    "initial_accumulator_value": _NON_NEGATIVE,
    "lr_decay": _NON_NEGATIVE,
    "momentum": _NON_NEGATIVE,
    "ns_steps": _Range("from 1 to 99", 1, 99),
    "weight_decay": _NON_NEGATIVE,
}


def _check_ranges(name: str, lr: float | Schedule, options: Mapping[str, Tree]) -> None:
    if not callable(lr) and not lr >= 0:
        raise ConfigError("`lr` must be at least 0", got=f"lr={lr}", fix=f"write `{name}(1e-3)`")
    for option, value in options.items():
        # Booleans and names have no range; None is PyTorch's default.
        if option not in _RANGES or value is None:
            continue
        text, low, high = _RANGES[option]
        if not low <= value <= high:
            raise ConfigError(
                f"`{option}` of `{name}` must be {text}",
                got=f"{option}={value}",
                fix="leave it out for the default of PyTorch",
            )


def make_optimizer(
    name: str, lr: float | Schedule, algorithm: Algorithm, options: Mapping[str, Tree]
) -> GradientTransformation:
    """Return the gradient transformation of an algorithm.

    Its state is `count`, int64[], and for each slot a TensorDict with the names of the parameters.

    Args:
        name: Name of the optimizer, for messages and as the name of its state in a chain.
        lr: Learning rate, or a schedule of it.
        algorithm: The algorithm.
        options: Numbers that are checked against their ranges.
    """
    _check_ranges(name, lr, options)
    slot_names = algorithm.slot_names()

    def init(params: TensorDict, /) -> TensorDict:
        slots: dict[str, NamedTensors] = {}
        for param_name, param in flat_dict(params).items():
            for slot, tensor in algorithm.init_slots(param).items():
                slots.setdefault(slot, {})[param_name] = tensor
        return to_tensordict({"count": initial_count(), **slots})

    def update(
        updates: Updates, state: TensorDict, params: TensorDict, /
    ) -> tuple[Updates, TensorDict]:
        # One count for all parameters; PyTorch stores one per parameter.
        count: torch.Tensor = state["count"]
        rate: Rate = schedule_value(lr, count) * updates.lr_scale
        slots: dict[str, Tree] = dict(state.items())
        slots.pop("count", None)
        _check_slots(name, slots, slot_names, params, algorithm)
        # A tensor as rate comes from a user's schedule: kernels accept numbers only.
        traced = is_traced(params)
        if algorithm.kernel is None or traced or isinstance(rate, torch.Tensor):
            new_params, new_slots = _run_formula(algorithm, updates, slots, count, params, rate)
            # A donated state must stay in its storage, whichever implementation ran.
            if updates.donate and not traced:
                _overwrite(params, new_params)
                for slot, tensors in new_slots.items():
                    _overwrite(slots[slot], tensors)
                new_params, new_slots = params, slots
        else:
            new_params, new_slots = _run_kernel(algorithm, updates, slots, count, params, rate)
        new_state = to_tensordict({"count": count + 1, **new_slots})
        return updates._replace(params=new_params), new_state

    return GradientTransformation(name, init, update, Role.OPTIMIZER)


def _check_slots(
    name: str, slots: SlotDicts, slot_names: set[str], params: TensorDict, algorithm: Algorithm
) -> None:
    if algorithm.has_own_shapes:
        # which slots there are depends on the shapes of the parameters
        if not slots.keys() <= slot_names:
            raise state_error(name, list(slots), list(slot_names))
        return
    if slots.keys() != slot_names:
        raise state_error(name, list(slots), list(slot_names))
    for slot, tensors in slots.items():
        check_same_structure(params, tensors, f"`{slot}` of {name}")


def _run_kernel(
    algorithm: Algorithm,
    updates: Updates,
    slots: SlotDicts,
    count: torch.Tensor,
    params: TensorDict,
    rate: float,
) -> tuple[TensorDict, SlotDicts]:
    """Return the new parameters and slots, computed by a kernel on copies of the old ones.

    With `updates.donate` the kernel writes into the old ones.
    """
    assert algorithm.kernel is not None
    names = list(flat_dict(params))
    # Gradients may be in another order than the parameters.
    grads_by_name = flat_dict(updates.grads)
    grads = [grads_by_name[name] for name in names]
    if not updates.donate:
        # Gradients are the caller's: nothing may be written to them.
        if algorithm.writes_grads:
            grads = clone_all(grads)
        params, *slot_copies = _clone([params, *slots.values()])
        slots = dict(zip(slots, slot_copies, strict=True))
    # The count is on the CPU, so this does not wait for a device.
    num_steps = int(count)
    device = params[names[0]].device if algorithm.steps_on_device else count.device
    # one allocation for all of them
    steps = list(torch.full((len(names),), float(num_steps), device=device).unbind())
    slot_lists: dict[str, Tree] = {}
    for slot, tensors in slots.items():
        by_name: Tree = dict(tensors.items())
        # Adafactor: a vector has no rows and columns, so its entry is None.
        slot_lists[slot] = [by_name.get(name) for name in names]
    # In-place writes to leaves are an error with gradients enabled.
    with torch.no_grad():
        algorithm.kernel(
            KernelArguments(
                list(flat_dict(params).values()), grads, slot_lists, steps, rate, num_steps == 0
            )
        )
    return params, slots


def _clone(trees: list[TensorDict]) -> list[TensorDict]:
    """Return copies of flat TensorDicts, all made in one call."""
    flat_trees = [flat_dict(tree) for tree in trees]
    tensors: list[torch.Tensor] = []
    for tree in flat_trees:
        tensors.extend(tree.values())
    copies = iter(clone_all(tensors))
    return [to_tensordict({name: next(copies) for name in tree}) for tree in flat_trees]


def _overwrite(tree: TensorDict, values: TensorDict) -> None:
    """Copy `values` into the tensors of `tree`."""
    new_tensors = flat_dict(values)
    for name, tensor in flat_dict(tree).items():
        tensor.copy_(new_tensors[name])


def _run_formula(
    algorithm: Algorithm,
    updates: Updates,
    slots: SlotDicts,
    count: torch.Tensor,
    params: TensorDict,
    rate: Rate,
) -> tuple[TensorDict, SlotDicts]:
    """Return the new parameters and slots, computed by the formula, parameter by parameter."""
    new_params: NamedTensors = {}
    # Every slot is in the result, also one that no parameter has.
    new_slots: dict[str, NamedTensors] = {slot: {} for slot in slots}
    slots_by_name = {slot: flat_dict(tensors) for slot, tensors in slots.items()}
    for name, param in flat_dict(params).items():
        # PyTorch's kernels compute with the real view of a complex parameter
        if param.is_complex():
            raise OptimizerError(
                f"`{name}` is complex, and optimizers update real parameters only under transforms",
                got=f"`{name}`, {param.dtype}",
                fix="train outside of `vmap` and `torch.compile`, or store `torch.view_as_real`",
            )
        param_slots: Slots = {}
        for slot, tensors in slots_by_name.items():
            if name in tensors:
                param_slots[slot] = tensors[name]
        # A rate is a float64 tensor on the CPU: a parameter must not be promoted by it.
        param_rate = scalar_like(rate, param) if isinstance(rate, torch.Tensor) else rate
        new_param, values = algorithm.formula(
            param, updates.grads[name], param_slots, count, param_rate
        )
        # 0-d float64 tensors may have promoted the result
        new_params[name] = new_param.to(param.dtype)
        for slot, value in values.items():
            new_slots[slot][name] = value.to(param.dtype)
    slot_dicts = {slot: to_tensordict(tensors) for slot, tensors in new_slots.items()}
    return to_tensordict(new_params), slot_dicts
