"""Parts of other programs' checkpoints as values, which `save` stores as faccel's own kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch

from faccel.checkpoint.tensor_names import child_name
from faccel.random.seeding import RngState
from faccel.training.module_names import user_name
from faccel.training.precision import ScalerState
from faccel.tree import Tree

# The keys of the state of `torch.amp.GradScaler`.
_SCALER_KEYS = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}


@attrs.frozen(eq=False)
class ImportedModule:
    """The `state_dict` of a module.

    Args:
        entries: Tensors and extra states by name.
    """

    entries: Mapping[str, Tree]


@attrs.frozen(eq=False)
class ImportedOptimizer:
    """The `state_dict` of an optimizer.

    Args:
        state_dict: As the optimizer has returned it, or with names of parameters in place of
            numbers, as under FSDP.
        model: The path of its model in the state, to which the names of parameters belong; None if
            it is unknown.
        prefix: What the names of parameters begin with, and those in the model's state do not.
    """

    state_dict: Mapping[str, Any]
    model: str | None = None
    prefix: str = ""

    def names(self) -> dict[object, str]:
        """Return the name in a checkpoint of each parameter by its key in the `state_dict`.

        A parameter without a name keeps its number. `load` gives it the name of the parameter that
        has this number in the optimizer of the state.
        """
        names: dict[object, str] = {}
        for group in self.state_dict["param_groups"]:
            # An optimizer that was made of `named_parameters` stores the names beside the numbers.
            labels = group.get("param_names") or group["params"]
            for key, label in zip(group["params"], labels, strict=True):
                names[key] = str(key)
                if isinstance(label, str) and self.model is not None:
                    label = label.removeprefix(self.prefix)
                    names[key] = child_name(self.model, user_name(label))
        return names


@attrs.frozen(eq=False)
class ImportedObject:
    """A dict, which may be the `state_dict` of a scheduler or another object.

    Args:
        state: The dict.
    """

    state: Tree


@attrs.frozen(eq=False)
class ImportedRandomStates:
    """The generators of all ranks.

    Args:
        states: Those of each rank.
        device_type: The type of the device that `RngState.device` belongs to; None without one.
    """

    states: Sequence[RngState]
    device_type: str | None = None


def scaler_of(state: Mapping[str, Any]) -> ScalerState:
    """Return the loss scale of a `state_dict` of `torch.amp.GradScaler`.

    Effects: pure.

    Examples:
        >>> scaler_of(torch.amp.GradScaler("cpu", init_scale=8.0).state_dict()).scale
        8.0
        >>> scaler_of({}).enabled  # of a GradScaler that is not enabled
        False
    """
    # A GradScaler that is not enabled has an empty `state_dict`.
    if not state:
        return ScalerState()
    return ScalerState(
        enabled=True,
        scale=float(state["scale"]),
        growth_factor=float(state["growth_factor"]),
        backoff_factor=float(state["backoff_factor"]),
        growth_interval=int(state["growth_interval"]),
        num_good_steps=int(state["_growth_tracker"]),
    )


def is_optimizer_state(tree: Tree) -> bool:
    """Return whether a value is the `state_dict` of an optimizer.

    DCP stores no empty dict: `state` is missing for SGD without momentum.

    Effects: pure.

    Examples:
        >>> opt = torch.optim.SGD([torch.ones(1)], lr=0.1)
        >>> is_optimizer_state(opt.state_dict()), is_optimizer_state({"lr": 0.1})
        (True, False)
    """
    if not isinstance(tree, Mapping) or not isinstance(tree.get("state", {}), Mapping):
        return False
    groups = tree.get("param_groups")
    if not isinstance(groups, list):
        return False
    return all(map(_is_param_group, groups))


def _is_param_group(value: Tree) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("params"), list | tuple):
        return False
    # The names of an optimizer that was made of `named_parameters`.
    labels = value.get("param_names") or value["params"]
    return isinstance(labels, list | tuple) and len(labels) == len(value["params"])


def imported_values(tree: Tree) -> Tree:
    """Return a nested state with the values of this module in place of `state_dict`s.

    Effects: pure. They are recognized by their content: a module has tensors only, an optimizer
    `param_groups` and `state`, a GradScaler its five fields.

    Examples:
        >>> tree = {"net": {"weight": torch.ones(1)}, "opt": {"state": {}, "param_groups": []}}
        >>> {key: type(value).__name__ for key, value in imported_values(tree).items()}
        {'net': 'ImportedModule', 'opt': 'ImportedOptimizer'}
    """
    # Two passes: the names of an optimizer belong to a model, which may come after it.
    values = _values(tree)
    if isinstance(values, ImportedObject):  # the state itself is no object
        values = dict(values.state)
    models = dict(_modules(values, ""))

    def with_model(opt: ImportedOptimizer) -> ImportedOptimizer:
        return attrs.evolve(opt, model=_model_of(opt, models))

    return map_optimizers(with_model, values)


def _values(tree: Tree) -> Tree:
    if isinstance(tree, (list, tuple)):
        # Lightning stores a list of states of optimizers.
        return [_values(item) for item in tree] if _has_mapping(tree) else tree
    if not isinstance(tree, Mapping):
        return tree
    if is_optimizer_state(tree):
        return ImportedOptimizer(tree)
    # The exact keys: a user's dict may have a `scale`, too.
    if set(tree) == _SCALER_KEYS:
        return scaler_of(tree)
    if _is_module_state(tree):
        return ImportedModule(tree)
    values = {key: _values(value) for key, value in tree.items()}
    if any(map(_is_imported, values.values())):
        return values
    return ImportedObject(tree)


def _is_imported(value: Tree) -> bool:
    """Return whether a model, an optimizer or a loss scale is in a value."""
    if isinstance(value, (dict, list)):  # `_values` has replaced it because of its items
        children = value
        if isinstance(value, dict):
            children = value.values()
        return any(map(_is_imported, children))
    return isinstance(value, (ImportedModule, ImportedOptimizer, ScalerState))


def _has_mapping(items: Iterable[Tree]) -> bool:
    return any(isinstance(item, Mapping) for item in items)


def _is_module_state(tree: Mapping[Any, Tree]) -> bool:
    # A module may have an extra state, which is no tensor.
    tensors = [key for key, value in tree.items() if isinstance(value, torch.Tensor)]
    extras = [key for key in tree if str(key).endswith("_extra_state")]
    is_complete = len({*tensors, *extras}) == len(tree)
    return bool(tensors) and is_complete and all(isinstance(key, str) for key in tree)


def _modules(values: Tree, path: str) -> Iterable[tuple[str, ImportedModule]]:
    """Yield the path of each module."""
    if isinstance(values, ImportedModule):
        yield path, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _modules(value, child_name(path, key))


def map_optimizers(fn: Callable[[ImportedOptimizer], Tree], values: Tree) -> Tree:
    """Return the values of `imported_values` with another one for each optimizer, at any depth.

    Effects: pure, as far as `fn` is.

    Examples:
        >>> opt = ImportedOptimizer({"state": {}, "param_groups": []})
        >>> map_optimizers(lambda opt: "Adam", {"opts": [opt], "epoch": 3})
        {'opts': ['Adam'], 'epoch': 3}
    """
    if isinstance(values, ImportedOptimizer):
        return fn(values)
    if isinstance(values, dict):
        return {key: map_optimizers(fn, value) for key, value in values.items()}
    if isinstance(values, list):
        return [map_optimizers(fn, item) for item in values]
    return values


def _model_of(opt: ImportedOptimizer, models: Mapping[str, ImportedModule]) -> str | None:
    """Return the path of the only model that has all named parameters of an optimizer."""
    labels: set[str] = set()
    # Numbers fit any model.
    for group in opt.state_dict["param_groups"]:
        names = group.get("param_names") or group["params"]
        labels |= {user_name(label) for label in names if isinstance(label, str)}
    paths: list[str] = []
    for path, model in models.items():
        if labels <= {user_name(name) for name in model.entries}:
            paths.append(path)
    # Two models with equal names are no evidence: numbers are exact, and a guess is not.
    if len(paths) == 1:
        return paths[0]
    return None
