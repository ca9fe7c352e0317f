"""Codecs of modules and other objects with `load_state_dict`, which are updated in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Set
from typing import Any, Protocol

import torch
from torch import nn

from faccel.checkpoint.codec import (
    Codec,
    Decoder,
    Encoder,
    Node,
    Restore,
    StoredTensor,
    mismatch,
    restore_all,
)
from faccel.checkpoint.tensor_names import child_name, trainable_entries
from faccel.training.model import WrappedModel
from faccel.tree import Tree

# Modules. Their parameters are read where they are, without a second copy in memory.


def _is_module(value: object) -> bool:
    return isinstance(value, (WrappedModel, nn.Module))


def _user_module(model: WrappedModel | nn.Module) -> nn.Module:
    return model.module if isinstance(model, WrappedModel) else model


def _encode_module(value: WrappedModel | nn.Module, path: str, encoder: Encoder) -> Node:
    state = value.state_dict()
    # `load_state_dict` of a module may migrate what an older version of its class wrote.
    versions: dict[str, int] = {}
    for name, metadata in getattr(state, "_metadata", {}).items():
        if "version" in metadata:
            versions[name] = metadata["version"]
    entries = dict(state)
    if encoder.trained_only:
        entries = trainable_entries(_user_module(value), state)
    node = {"!": "module", "v": encoder.encode(entries, path), "versions": versions}
    if len(entries) < len(state):  # only then may `load` accept a model with more parameters
        node["trained_only"] = True
    return node


def _decode_module(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    if not isinstance(target, (WrappedModel, nn.Module)):
        got = f"a model in the checkpoint, {type(target).__name__} in the state"
        raise mismatch(path, got, "pass the model itself")
    # A `state_dict` has string keys, so its node is a plain dict.
    nodes: Mapping[str, Node] = node["v"]
    state = dict(target.state_dict())
    _check_names(node, state, target, path, decoder)
    restores: dict[str, Restore] = {}
    for name, entry in state.items():
        if name in nodes:
            restores[name] = _decode_entry(nodes[name], entry, child_name(path, name), decoder)
    metadata = OrderedDict[str, dict[str, int]]()
    for name, version in node.get("versions", {}).items():
        metadata[name] = {"version": version}

    def restore() -> Tree:
        loaded = _StateDict(restore_all(restores), metadata)
        # Parameters are already read in place; this also calls hooks, and copies what is not a
        # parameter.
        target.load_state_dict(loaded, strict=len(loaded) == len(state))
        return target

    return restore


class _StateDict(OrderedDict[str, Any]):
    """A `state_dict` with the attribute in which PyTorch keeps the versions of modules."""

    def __init__(
        self, entries: Mapping[str, Tree], metadata: Mapping[str, Mapping[str, int]] | None = None
    ) -> None:
        super().__init__(entries)
        self._metadata = metadata or {}


def _check_names(
    node: Node,
    state: Mapping[str, Tree],
    target: WrappedModel | nn.Module,
    path: str,
    decoder: Decoder,
) -> None:
    required = dict(state)
    if node.get("trained_only"):  # frozen parameters keep their values
        required = trainable_entries(_user_module(target), state)
    is_complete = required.keys() <= node["v"].keys()
    # In a pipeline, the checkpoint has the modules of all stages and the rank has those of its
    # stages.
    is_known = decoder.is_pipeline or node["v"].keys() <= state.keys()
    if not (is_complete and is_known):
        got = name_difference(node["v"].keys(), required.keys())
        raise mismatch(path, got, "build the model that was saved")


def _decode_entry(node: Node, entry: Tree, path: str, decoder: Decoder) -> Restore:
    """Plan to read an entry of a module's state into the memory that it has."""
    is_stored_tensor = isinstance(node, dict) and node.get("!") in ("tensor", "complex")
    if not isinstance(entry, torch.Tensor) or not is_stored_tensor:
        return decoder.decode(node, entry, path)
    is_complex = node["!"] == "complex"
    _check_tensor(entry, decoder.stored(path), path, is_complex=is_complex)
    if is_complex:  # read as pairs of real numbers, which `load_state_dict` copies
        return decoder.decode(node, entry, path)
    decoder.destinations[path] = entry  # no second copy of the parameter
    return lambda: entry


def _check_tensor(
    entry: torch.Tensor, stored: StoredTensor, path: str, *, is_complex: bool
) -> None:
    expected = StoredTensor(entry.shape, entry.dtype)
    if is_complex and entry.dtype.is_complex:
        expected = StoredTensor(torch.Size([*entry.shape, 2]), entry.dtype.to_real())
    if expected != stored or is_complex != entry.dtype.is_complex:
        raise mismatch(
            path,
            f"{stored.dtype} {list(stored.shape)} in the checkpoint, "
            f"{entry.dtype} {list(entry.shape)} in the model",
            "build the model that was saved, in its dtype",
        )
    # Reading into overlapping elements would leave the last value in all of them.
    for size, stride in zip(entry.shape, entry.stride(), strict=True):
        if size > 1 and stride == 0:
            got = "an expanded tensor, whose elements overlap in memory"
            raise mismatch(path, got, "register a `.clone()` of it")


def name_difference(stored: Set[str], expected: Set[str]) -> str:
    """Describe how the names in the checkpoint differ from those in the state.

    Effects: pure.

    Examples:
        >>> name_difference({"a", "b"}, {"b", "c"})
        '`a` only in the checkpoint, `c` only in the state'
    """
    differences: list[str] = []
    if stored - expected:
        differences.append(f"{first_names(stored - expected)} only in the checkpoint")
    if expected - stored:
        differences.append(f"{first_names(expected - stored)} only in the state")
    return ", ".join(differences)


def first_names(names: Set[str], limit: int = 3) -> str:
    """Return the first names in alphabetical order, and how many more there are.

    Effects: pure.
    """
    listed = sorted(names)
    text = ", ".join(f"`{name}`" for name in listed[:limit])
    if len(listed) > limit:
        text += f" and {len(listed) - limit} more"
    return text


MODULE = Codec(
    ("module",), _is_module, _encode_module, _decode_module, is_strict=True, is_in_place=True
)


# Objects with `state_dict` and `load_state_dict`: schedulers, meters, the user's own.


class Stateful(Protocol):
    """An object that returns its state and loads it."""

    def state_dict(self) -> Mapping[str, Tree]: ...
    def load_state_dict(self, state_dict: Mapping[str, Tree], /) -> object: ...


def is_stateful(value: object) -> bool:
    """Return whether `value` has `state_dict` and `load_state_dict`.

    Effects: pure.
    """
    has_state_dict = callable(getattr(value, "state_dict", None))
    return has_state_dict and callable(getattr(value, "load_state_dict", None))


def _encode_stateful(value: Stateful, path: str, encoder: Encoder) -> Node:
    with encoder.inside_stateful():
        return {"!": "stateful", "v": encoder.encode(value.state_dict(), path)}


def _decode_stateful(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    if not is_stateful(target):
        got = f"an object with `state_dict` in the checkpoint, {type(target).__name__} in the state"
        raise mismatch(path, got, "pass an object with `load_state_dict`")
    restore_state = decoder.decode(node["v"], None, path)

    def restore() -> Tree:
        target.load_state_dict(restore_state())
        return target

    return restore


STATEFUL = Codec(
    ("stateful",), is_stateful, _encode_stateful, _decode_stateful, is_strict=True, is_in_place=True
)
