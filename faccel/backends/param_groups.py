"""What several backends do with the parameter groups and the states of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from faccel.errors import OptimizerError
from faccel.tree import Tree, map_leaves

ParamGroups = Sequence[dict[str, Any]]
"""torch's `Optimizer.param_groups`; in a state, `"params"` holds numbers instead of parameters."""


def params_of(groups: ParamGroups) -> list[Any]:
    """Return the parameters (or, in a state, their numbers) of all groups, in order.

    Examples:
        >>> params_of([{"params": [0, 1], "lr": 0.1}, {"params": [2]}])
        [0, 1, 2]
    """
    params: list[Any] = []
    for group in groups:
        params.extend(group["params"])
    return params


def copy_options(source: ParamGroups, target: ParamGroups) -> None:
    """Copy everything but the parameters from each group to the group of the same index.

    Updates `target`.
    """
    for source_group, target_group in zip(source, target, strict=True):
        for name, value in source_group.items():
            if name != "params":
                # In place: schedulers and the user's code keep references to the groups.
                target_group[name] = value


def check_same_sizes(saved: ParamGroups, groups: ParamGroups) -> None:
    """Raise unless a saved state has groups of the same sizes.

    Raises:
        OptimizerError: The numbers of groups or of their parameters differ.
    """
    saved_sizes = [len(group["params"]) for group in saved]
    sizes = [len(group["params"]) for group in groups]
    if saved_sizes != sizes:
        raise OptimizerError(
            "the state comes from an optimizer with other parameter groups",
            got=f"groups of {saved_sizes} parameters for groups of {sizes}",
            fix="make the optimizer from the model that the state belongs to, in the same groups",
        )


def new_group_error(engine: str, fix: str) -> OptimizerError:
    """Return the error of `add_param_group` of an engine that makes its groups once.

    Args:
        engine: Its name.
        fix: What works besides groups that are made before.
    """
    return OptimizerError(
        f"`add_param_group` is unsupported under {engine}, whose groups are made once",
        got="a new group after `faccel.wrap_optimizer`",
        fix=f"put all parameters into groups before `faccel.wrap_optimizer`, or {fix}",
    )


def check_no_scheduler(opt: Optimizer) -> None:
    """Raise if a scheduler was made for `opt`: it would not change the optimizer that replaces it.

    Raises:
        OptimizerError: `opt` has a scheduler.
    """
    # LRScheduler marks the `step` of its optimizer with this attribute.
    if hasattr(opt.step, "_wrapped_by_lr_sched"):
        raise OptimizerError(
            "a scheduler was made for this optimizer before `faccel.wrap_optimizer` replaced it",
            got=f"a {type(opt).__name__}",
            fix="call `faccel.wrap_optimizer` first, and make the scheduler from what it returns",
        )


def to_cpu(state: Tree) -> Tree:
    """Return `state` with its tensors detached and on the CPU."""

    def leaf_to_cpu(leaf: Tree) -> Tree:
        if isinstance(leaf, torch.Tensor):
            # A state is sent pickled: as CPU tensors it needs no memory of the receiver's device.
            return leaf.detach().cpu()
        return leaf

    return map_leaves(leaf_to_cpu, state)
