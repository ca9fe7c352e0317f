"""Activation checkpointing of the units of a model, in place, under their names."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from faccel.errors import ConfigError, short_repr
from faccel.parallel.compilation import apply_compile
from faccel.parallel.units import units_of
from faccel.plan import SPLIT_BACKWARD_SCHEDULES, Plan
from faccel.tree import Tree

_ContextFn = Callable[[], tuple[AbstractContextManager[object], AbstractContextManager[object]]]


def checkpoint_and_compile(module: nn.Module, plan: Plan) -> None:
    """Apply activation checkpointing and compilation as planned. Updates `module`.

    For strategies that need the units for nothing else.

    Raises:
        ConfigError: The plan needs units, and the model has none.
    """
    if plan.activation_checkpoint is None and plan.compile is None:
        return
    units = units_of(module, plan)
    check_has_units(units, plan)
    apply_checkpointing(module, units, plan)
    apply_compile(module, units, plan)


def check_has_units(units: Mapping[str, nn.Module], plan: Plan) -> None:
    """Raise where a model has no units, and activation checkpointing or compilation needs some.

    Raises:
        ConfigError: It has none.
    """
    if units:
        return
    options = plan.activation_checkpoint
    if options is not None and options.memory_budget is None:
        raise ConfigError(
            "`activation_checkpoint` needs units, and the model has none",
            got="a model without `nn.ModuleList` and `_no_split_modules`",
            fix='name them, as in `units="Block"`',
        )
    if plan.compile is not None and plan.compile.what == "units":
        raise ConfigError(
            '`compile="units"` needs units, and the model has none',
            got="a model without `nn.ModuleList` and `_no_split_modules`",
            fix='write `compile="whole"`, or name units, as in `units="Block"`',
        )


def apply_checkpointing(module: nn.Module, units: Mapping[str, nn.Module], plan: Plan) -> None:
    """Checkpoint each n-th unit: its forward runs a second time in backward. Updates the units."""
    # A memory budget is the compiler's choice of what to save; see `apply_compile`.
    options = plan.activation_checkpoint
    if options is None or options.memory_budget is not None:
        return
    # transformers' layers call this function themselves, around what may run twice: a cache of
    # keys and values must not grow in the second forward.
    checkpoint_call = functools.partial(checkpoint, use_reentrant=False)
    context_fn = None
    if options.save_ops:
        context_fn = _selective_contexts(options.save_ops)
        checkpoint_call = functools.partial(checkpoint_call, context_fn=context_fn)
    # Units 1, 2, ..: with `every=2` the second, the fourth, ...
    every_nth = list(units.values())[options.every - 1 :: options.every]
    for unit in every_nth:
        if _is_checkpointable(unit):
            _set_checkpointing(unit, checkpoint_call)
        elif plan.compile is None and not _splits_backward(plan):
            _checkpoint_by_hooks(unit, context_fn)
        else:
            _replace_forward(unit, checkpoint_call)
    # The model around such layers decides about the cache from its own flag.
    if any(_is_checkpointable(unit) for unit in every_nth):
        _enable_outside(module, units.values())


def _splits_backward(plan: Plan) -> bool:
    return plan.pipeline is not None and plan.pipeline.schedule in SPLIT_BACKWARD_SCHEDULES


def _checkpoint_by_hooks(unit: nn.Module, context_fn: _ContextFn | None) -> None:
    # It registers hooks: names, classes and `forward` of the unit stay as they are.
    from torch.distributed._composable import checkpoint as checkpoint_module

    if context_fn is None:
        checkpoint_module(unit)
    else:
        checkpoint_module(unit, context_fn=context_fn)


def _replace_forward(unit: nn.Module, checkpoint_call: Callable[..., Tree]) -> None:
    """Replace `forward` of this instance by one that is checkpointed.

    Only for compiled models and for schedules that split the backward. Dynamo (torch 2.13) traces
    through the hooks of the composable `checkpoint` and saves all activations nevertheless. And
    these hooks run forward again once only, but a split backward needs it twice. So nothing else
    works without a wrapper module, which would change the names of parameters. A function and not a
    `functools.partial`, with which Dynamo skips the frame and compiles nothing, without an error.
    """
    forward = unit.forward

    @functools.wraps(forward)
    def checkpointed_forward(*args: Tree, **kwargs: Tree) -> Tree:
        return checkpoint_call(forward, *args, **kwargs)

    unit.forward = checkpointed_forward


def _is_checkpointable(unit: nn.Module) -> bool:
    """Whether a unit checkpoints itself, as a `GradientCheckpointingLayer` of transformers."""
    return hasattr(type(unit), "gradient_checkpointing")


def _set_checkpointing(module: Any, checkpoint_call: Callable[..., Tree]) -> None:
    # The two attributes that `PreTrainedModel.gradient_checkpointing_enable` sets.
    module.gradient_checkpointing = True
    module._gradient_checkpointing_func = checkpoint_call


def _enable_outside(module: nn.Module, units: Iterable[nn.Module]) -> None:
    """Set the flag on transformers' modules around the units, which then pass no cache to them."""
    inside: set[int] = set()
    for unit in units:
        inside.update(map(id, unit.modules()))
    for submodule in module.modules():
        if id(submodule) not in inside and hasattr(submodule, "gradient_checkpointing"):
            _set_checkpointing(submodule, _call_once)


def _call_once(function: Callable[..., Tree], *args: Tree, **kwargs: Tree) -> Tree:
    return function(*args, **kwargs)


def _selective_contexts(names: Sequence[str]) -> _ContextFn:
    """Return a `context_fn` for torch's checkpoint that keeps the outputs of these operators."""
    saved_ops = set(map(_operator, names))

    def policy(_: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        if op in saved_ops:
            return CheckpointPolicy.MUST_SAVE
        # `PREFER`, so that a compiler may still save it; in eager mode it is not saved.
        return CheckpointPolicy.PREFER_RECOMPUTE

    return functools.partial(create_selective_checkpoint_contexts, policy)


def _operator(name: str) -> object:
    operator: object = torch.ops
    try:
        for attribute in name.split("."):
            operator = getattr(operator, attribute)
    except AttributeError:
        raise ConfigError(
            "`save_ops` must name operators of torch",
            got=short_repr(name),
            fix='write it like `"aten.mm.default"`',
        ) from None
    return operator
