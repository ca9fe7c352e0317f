"""Activation checkpointing and compilation of the units of a model, under their own names and in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from faccel.errors import ConfigError
from faccel.parallel.units import units_of
from faccel.plan import ActivationCheckpointing, Plan


def checkpoint_and_compile(module: nn.Module, plan: Plan) -> None:
    """Checkpoint and compile what the plan says, for a strategy that has no other use for units. Updates `module`."""
    if plan.activation_checkpoint is not None or plan.compile is not None:
        units = units_of(module, plan)
        check_has_units(units, plan.activation_checkpoint)
        apply_checkpointing(module, units, plan.activation_checkpoint)
        apply_compile(module, units, plan)


def check_has_units(
    units: Mapping[str, nn.Module], options: ActivationCheckpointing | None
) -> None:
    """Refuse activation checkpointing of a model without units."""
    if options is not None and options.memory_budget is None and not units:
        fix = 'name them, as in `units="Block"`'
        raise ConfigError(
            "activation checkpointing needs units", got="a model without any", fix=fix
        )


def apply_checkpointing(
    module: nn.Module, units: Mapping[str, nn.Module], options: ActivationCheckpointing | None
) -> None:
    """Make the forward of each n-th unit of `module` run again in backward. Updates the modules."""
    if options is None or options.memory_budget is not None:
        return
    more = _selective(options.save_ops) if options.save_ops else {}
    chosen = [
        unit for number, unit in enumerate(units.values(), start=1) if number % options.every == 0
    ]
    for unit in chosen:
        _recompute(unit, functools.partial(checkpoint, use_reentrant=False, **more))
    if any(map(_knows_checkpointing, chosen)):
        _tell_the_others(module, units)


def _recompute(unit: Any, again: Callable[..., Any]) -> None:
    """Run the forward of `unit` through `again`, on this instance alone: neither names nor classes change."""
    if _knows_checkpointing(
        unit
    ):  # it leaves out what must not happen twice: the update of a cache
        unit.gradient_checkpointing, unit._gradient_checkpointing_func = True, again
    else:
        unit.forward = functools.partial(again, unit.forward)


def _knows_checkpointing(unit: nn.Module) -> bool:
    """Whether the class of a unit can be checkpointed by a function that it is given, as transformers' layers can."""
    return hasattr(type(unit), "gradient_checkpointing")


def _tell_the_others(module: nn.Module, units: Mapping[str, nn.Module]) -> None:
    """Let the modules around the units, which hand caches to them, know that some of these run twice."""
    inside = {id(each) for unit in units.values() for each in unit.modules()}
    for each in module.modules():
        if id(each) not in inside and hasattr(each, "gradient_checkpointing"):
            each.gradient_checkpointing = True  # type: ignore[assignment]
            each._gradient_checkpointing_func = _once  # type: ignore[assignment]


def _once(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return run(*args, **kwargs)


def _selective(names: tuple[str, ...]) -> dict[str, Any]:
    kept = {_operator(name) for name in names}

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)}


def _operator(name: str) -> Any:
    found: Any = torch.ops
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        fix = 'write it like `"aten.mm.default"`'
        raise ConfigError("`save_ops` names operators of torch", got=repr(name), fix=fix) from None
    return found


def apply_compile(module: nn.Module, units: Mapping[str, nn.Module], plan: Plan) -> None:
    """Compile the units, or the whole, in place. Updates the modules; compilation happens at the first call."""
    if plan.compile is None:
        return
    if (
        plan.activation_checkpoint is not None
        and plan.activation_checkpoint.memory_budget is not None
    ):
        import torch._functorch.config as functorch

        functorch.activation_memory_budget = (
            plan.activation_checkpoint.memory_budget
        )  # read when the graph is cut
    for each in units.values() if plan.compile == "units" else (module,):
        each.compile()
