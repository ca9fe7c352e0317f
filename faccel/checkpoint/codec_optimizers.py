"""Codec of optimizers: states are stored by the names of parameters, independent of their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from faccel.checkpoint.codec import (
    Codec,
    Decoder,
    Encoder,
    Node,
    Restore,
    Update,
    kind_of,
    mismatch,
    restore_all,
)
from faccel.checkpoint.codec_sharded_wrappers import check_shards_of_one_class
from faccel.checkpoint.codec_values import mapping_nodes
from faccel.checkpoint.tensor_names import (
    child_name,
    name_difference,
    optimizer_parameter_names,
    user_path,
)
from faccel.tree import Tree

# The options of a parameter group, as `Optimizer.state_dict` returns them: `lr`, `params` and
# others.
Group = dict[str, Any]


def _is_optimizer(value: object) -> bool:
    return isinstance(value, Optimizer)


def _encode_optimizer(value: Optimizer, path: str, encoder: Encoder) -> Node:
    names = optimizer_parameter_names(value, encoder.parameter_names)
    check_shards_of_one_class(value, path)
    state_dict = dict(value.state_dict())
    state: dict[object, Tree] = {}
    for index, entry in state_dict.pop("state").items():
        state[names.get(index, index)] = entry  # a key that is no parameter stays
    groups: list[Group] = state_dict.pop("param_groups")
    named_groups = [group | {"params": _names(group, names)} for group in groups]
    # What a subclass adds to its `state_dict` is under "rest".
    content = {"state": state, "param_groups": named_groups, "rest": state_dict}
    return {"!": "optimizer", "v": encoder.encode(content, path)}


def _decode_optimizer(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    if not isinstance(target, Optimizer):
        got = f"an optimizer in the checkpoint, {type(target).__name__} in the state"
        raise mismatch(path, got)
    content = node["v"]
    names = optimizer_parameter_names(target, decoder.parameter_names)
    indices = {name: index for index, name in names.items()}
    groups = [_names(group, names) for group in target.state_dict()["param_groups"]]
    renamed = _current_names(content["param_groups"], names, decoder)
    stored_groups = _with_names(content["param_groups"], renamed)
    if not decoder.strict and not _fits(stored_groups, groups, decoder):
        decoder.mismatched.add(child_name(path, "param_groups"))
        return lambda: target
    _check_groups(stored_groups, groups, path, decoder)
    restore_groups = decoder.decode(content["param_groups"], None, child_name(path, "param_groups"))
    restore_extras = decoder.decode(content["rest"], None, child_name(path, "rest"))
    current_indices = indices | {
        stored_name: indices[name] for stored_name, name in renamed.items()
    }
    restore_state = _decode_state(
        content["state"], current_indices, child_name(path, "state"), decoder
    )
    kept = _misshapen_indices(names, decoder)

    def restore() -> Tree:
        stored_groups = _with_names(restore_groups(), renamed)
        if not decoder.is_pipeline:  # stages store the groups in one order
            stored_groups = _in_order(stored_groups, groups)
        packed: list[Group] = []
        for group, options in zip(groups, stored_groups, strict=True):
            packed.append(_with_indices(options, group, indices))
        current: dict[int, Tree] = target.state_dict()["state"]
        state = restore_state() | {index: current[index] for index in kept & current.keys()}
        state_dict = {"state": state, "param_groups": packed} | restore_extras()
        decoder.updates.append(Update(target, lambda: _load_exactly(target, state_dict)))
        return target

    return restore


def _current_names(
    stored_groups: Sequence[Node], names: Mapping[int, str], decoder: Decoder
) -> dict[str, str]:
    """Return the name that a parameter has now, for each that is stored under another one."""
    current: dict[str, str] = {}
    if not decoder.is_pipeline:  # each stage numbers its own parameters
        current = _names_of_numbers(stored_groups, names)
    known = set(names.values())
    for stored_name, name in decoder.current_names.items():
        if name in known:
            current[stored_name] = name
    return current


def _load_exactly(opt: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load a state without the cast of `Optimizer.load_state_dict` to the dtypes of parameters.

    The momentum in fp32 of a parameter in bf16, and a count in int64, would lose bits.
    """
    exact: list[tuple[nn.Parameter, str, torch.Tensor]] = []
    # A class that overrides it decides itself.
    if type(opt).load_state_dict is Optimizer.load_state_dict:
        state = dict(state_dict["state"])
        for index, param in _params_by_index(opt).items():
            entry = state.get(index)
            if isinstance(entry, dict):
                casts = {key: value for key, value in entry.items() if _is_cast(value, param)}
                casts.pop("step", None)  # PyTorch's exception
                exact += [(param, key, value) for key, value in casts.items()]
                state[index] = entry | dict.fromkeys(casts)
        state_dict = state_dict | {"state": state}
    opt.load_state_dict(state_dict)
    for param, key, value in exact:
        opt.state[param][key] = value.to(param.device)


def _is_cast(value: object, param: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype != param.dtype


def _params_by_index(opt: Optimizer) -> dict[int, nn.Parameter]:
    """Return each parameter by its index in `opt.state_dict()`."""
    params: list[nn.Parameter] = []
    for group in opt.param_groups:
        params += group["params"]
    by_id: dict[int, int] = {}
    for index, param in enumerate(params):
        by_id.setdefault(id(param), index)  # `state_dict` has a repeated parameter once
    return {index: params[index] for index in by_id.values()}


def _names(group: Group, names: Mapping[int, str]) -> list[str]:
    return [names[index] for index in group["params"]]


def _names_of_numbers(stored_groups: Sequence[Node], names: Mapping[int, str]) -> dict[str, str]:
    """Return the name of each parameter that is stored by its number, which is its index.

    An optimizer that was saved without its model is stored so. Until version 0.1.0 also one that
    was saved after an evaluation of a sharded model.
    """
    known = set(names.values())
    by_number: dict[str, str] = {}
    for group in stored_groups:
        for stored_name in group["params"]:
            is_number = stored_name.isdecimal() and int(stored_name) in names
            if is_number and stored_name not in known:
                by_number[stored_name] = names[int(stored_name)]
    return by_number


def _with_names(groups: Sequence[Group], names: Mapping[str, str]) -> list[Group]:
    """Return the groups with the names that parameters have now.

    Older versions kept the names of modules that `torch.compile` had returned.
    """
    renamed: list[Group] = []
    for group in groups:
        params = [names.get(name, user_path(name)) for name in group["params"]]
        renamed.append(group | {"params": params})
    return renamed


def _check_groups(
    stored_groups: Sequence[Node], groups: list[list[str]], path: str, decoder: Decoder
) -> None:
    """Check that the parameters are grouped as they were saved, in any order."""
    stored: list[list[str]] = [group["params"] for group in stored_groups]
    if _fits(stored_groups, groups, decoder):
        if decoder.is_pipeline:  # parameters of other stages, or of none
            others = set[str]().union(*stored).difference(*groups)
            decoder.unexpected |= {child_name(path, name) for name in others}
        return
    difference = name_difference(set[str]().union(*stored), set[str]().union(*groups))
    raise mismatch(
        path,
        difference or "other groups of parameters",
        "make the optimizer from the model that is loaded too, with the same parameter groups",
    )


def _fits(stored_groups: Sequence[Node], groups: list[list[str]], decoder: Decoder) -> bool:
    stored: list[list[str]] = [group["params"] for group in stored_groups]
    if decoder.is_pipeline:
        return _are_subsets(groups, stored)  # of the parameters of this rank's stages
    return sorted(map(sorted, stored)) == sorted(map(sorted, groups))


def _are_subsets(groups: list[list[str]], stored: list[list[str]]) -> bool:
    if len(groups) != len(stored):
        return False
    return all(set(a) <= set(b) for a, b in zip(groups, stored, strict=True))


def _decode_state(node: Node, indices: Mapping[str, int], path: str, decoder: Decoder) -> Restore:
    # The names that parameters have now come first, before the numbers of an older checkpoint.
    names: dict[int, str] = {}
    for name, index in indices.items():
        names.setdefault(index, name)
    restores: dict[object, Restore] = {}
    for key, entry in mapping_nodes(node, decoder).items():
        index = _index_of(key, indices)
        if index is None and decoder.is_pipeline:
            continue  # the parameter of another stage
        if index is not None and _is_misshapen(names[index], decoder):
            continue  # `load` also leaves the parameter as it is
        target: dict[str, torch.Tensor | None] | None = None
        if isinstance(entry, dict) and "!" not in entry:
            # a tensor with the shape of the parameter, such as a momentum, gets the layout of the
            # parameter
            current_name = str(key)
            if index is not None:
                current_name = names[index]
            param = decoder.parameters.get(current_name)
            _check_shape(entry, key, param, child_name(path, key), decoder)
            target = dict.fromkeys(entry, param)
        restore_entry = decoder.decode(entry, target, child_name(path, key))
        if index is None:
            restores[key] = restore_entry
        else:
            restores[index] = restore_entry
    return lambda: restore_all(restores)


def _check_shape(
    entry: Node, name: object, param: torch.Tensor | None, path: str, decoder: Decoder
) -> None:
    """Raise if the momentum of a parameter that is stored by its number has another shape.

    Then the optimizer has its parameters in another order than the one that was saved.
    """
    if param is None or not str(name).isdecimal():
        return
    for key in ("exp_avg", "momentum_buffer"):
        if kind_of(entry.get(key)) != "tensor":
            continue
        stored = decoder.stored(child_name(path, key))
        if stored.shape != param.shape:
            got = (
                f"a momentum of shape {list(stored.shape)}, for a parameter of {list(param.shape)}"
            )
            fix = "pass the parameters to the optimizer in the order of the run that was saved"
            raise mismatch(path, got, fix)


def _misshapen_indices(names: Mapping[int, str], decoder: Decoder) -> set[int]:
    """Return the indices of the parameters of another shape, which keep their states."""
    return {index for index, name in names.items() if _is_misshapen(name, decoder)}


def _is_misshapen(name: str, decoder: Decoder) -> bool:
    """Return whether a parameter has another shape than the one that was saved."""
    param = decoder.parameters.get(name)
    if decoder.strict or param is None or not decoder.has_stored(name):
        return False
    shape = decoder.stored(name).shape
    if param.is_complex():  # stored as pairs of real numbers
        shape = shape[:-1]
    return shape != param.shape


def _index_of(key: object, indices: Mapping[str, int]) -> int | None:
    if not isinstance(key, str):
        return None
    return indices.get(user_path(key))


def _in_order(stored_groups: Sequence[Group], groups: list[list[str]]) -> list[Group]:
    """Return for each group of the state the stored group with the same parameters."""
    remaining = list(stored_groups)
    ordered: list[Group] = []
    for names in groups:
        # by their parameters, because groups have no names
        match = next(group for group in remaining if sorted(group["params"]) == sorted(names))
        remaining.remove(match)
        ordered.append(match)
    return ordered


def _with_indices(options: Group, names: list[str], indices: Mapping[str, int]) -> Group:
    """Return the options of a group, with its parameters in the order of the loading optimizer."""
    group = options | {"params": [indices[name] for name in names]}
    if options.get("param_names"):
        user_names = dict(zip(options["params"], options["param_names"], strict=True))
        group["param_names"] = [user_names[name] for name in names]
    return group


OPTIMIZER = Codec(
    ("optimizer",),
    _is_optimizer,
    _encode_optimizer,
    _decode_optimizer,
    is_strict=True,
    is_in_place=True,
)
