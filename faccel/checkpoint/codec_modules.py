"""Codecs of modules and other objects with `load_state_dict`, which are updated in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from typing import Any, Protocol

import torch
from torch import nn

from faccel.checkpoint.codec import (
    Codec,
    Decoder,
    Encoder,
    Node,
    Restore,
    Update,
    mismatch,
    restore_all,
)
from faccel.checkpoint.module_entries import (
    FIX_OF_OVERLAP,
    OVERLAP,
    ModuleEntries,
    has_overlap,
)
from faccel.checkpoint.tensor_names import (
    child_name,
    module_of,
    name_difference,
    quantization_entries,
    trainable_entries,
)
from faccel.checkpoint.tensor_views import check_storable
from faccel.checkpoint.tied_tensors import tied_names
from faccel.errors import CheckpointError, short_repr
from faccel.training.model import WrappedModel
from faccel.training.module_checks import check_contains_no_model
from faccel.training.module_names import original_names, user_name, with_user_names
from faccel.tree import Tree

# Modules. Their parameters are read where they are, without a second copy in memory.


def _is_module(value: object) -> bool:
    return isinstance(value, (WrappedModel, nn.Module))


def _state_of(model: WrappedModel | nn.Module) -> Mapping[str, Tree]:
    if isinstance(model, nn.Module):
        check_contains_no_model(model, WrappedModel)  # its parameters would be missing
    return model.state_dict()


def _encode_module(value: WrappedModel | nn.Module, path: str, encoder: Encoder) -> Node:
    state = _state_of(value)
    # `load_state_dict` of a module may migrate what an older version of its class wrote.
    versions: dict[str, int] = {}
    for name, metadata in getattr(state, "_metadata", {}).items():
        if "version" in metadata:  # the module inside a compiled one comes after it and replaces it
            versions[user_name(name)] = metadata["version"]
    state = with_user_names(state)
    entries = state
    if encoder.trained_only:
        entries = trainable_entries(value, state)
    else:
        _check_scales(value, state, path)
    for name, entry in entries.items():
        # It could be stored, but neither `load` nor PyTorch can load into it.
        if isinstance(entry, torch.Tensor):
            check_storable(child_name(path, name), entry)
        if isinstance(entry, torch.Tensor) and has_overlap(entry):
            problem = f"`{child_name(path, name)}` cannot be loaded again"
            raise CheckpointError(problem, got=OVERLAP, fix=FIX_OF_OVERLAP)
    with encoder.inside_module():
        node = {"!": "module", "v": encoder.encode(entries, path), "versions": versions}
    if len(entries) < len(state):  # only then may `load` accept a model with more parameters
        node["trained_only"] = True
    return node


def _check_scales(model: WrappedModel | nn.Module, state: Mapping[str, Tree], path: str) -> None:
    """Raise for weights of 4 bits of bitsandbytes.

    Raises:
        CheckpointError: Their layers write scales into the state, and cannot load them.
    """
    for name, owner in quantization_entries(model, state).items():
        # Of 8 bits, the scales belong to the layer, which loads them.
        if owner in state:
            raise CheckpointError(
                f"`{child_name(path, owner)}` could not be loaded again",
                got=f"scales under the name `{name}`, which the layer does not load",
                fix="save the adapters with `trained_only=True`, and quantize the same files again "
                "before you load them",
            )


def _decode_module(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    if target is None:  # the tensors, for a program that does not build the model
        return decoder.decode(node["v"], None, path)
    if node.get("imported") and isinstance(target, Mapping):  # a user's dict of tensors
        return decoder.decode(node["v"], target, path)
    if not isinstance(target, (WrappedModel, nn.Module)):
        got = f"a model in the checkpoint, {type(target).__name__} in the state"
        raise mismatch(path, got, "pass the model itself")
    # A `state_dict` has string keys, so its node is a plain dict.
    # Its tensors have the names that were saved. Older versions kept those of compiled modules.
    saved_names = original_names(node["v"])
    original_state = target.state_dict()
    state = with_user_names(original_state)
    ties = tied_names(target, state)
    required = _required_names(node, saved_names.keys(), state, target, ties, decoder)
    _check_names(required, saved_names.keys(), state.keys(), path, decoder)
    entries = ModuleEntries(node, saved_names, ties, path, decoder)
    restores = entries.restores(original_state)
    versions = _versions(node, target, path)

    def restore() -> Tree:
        loaded = _StateDict(restore_all(restores), versions)
        # Parameters are read in place before; this also calls hooks, and copies what is not a
        # parameter.
        is_complete = len(loaded) == len(state)
        update = Update(target, lambda: target.load_state_dict(loaded, strict=is_complete))
        decoder.module_updates.append(update)
        return target

    return restore


def _versions(
    node: Node, target: WrappedModel | nn.Module, path: str
) -> Mapping[str, Mapping[str, int]]:
    """Return the versions of the target's modules when they were saved, by their own names."""
    stored: dict[str, int] = {}
    for name, version in node.get("versions", {}).items():
        stored[user_name(name)] = version
    metadata = OrderedDict[str, dict[str, int]]()
    for name, module in module_of(target).named_modules(remove_duplicate=False):
        version = stored.get(user_name(name))
        if version is None:
            continue
        # A module compares it with its own, which must not raise when others are loaded already.
        current: object = getattr(module, "_version", version)
        if not isinstance(version, type(current)):
            versions = (
                f"{short_repr(version)} in the checkpoint, {short_repr(current)} in the model"
            )
            got = f"the version {versions}"
            raise mismatch(child_name(path, name), got)
        metadata[name] = {"version": version}
    return metadata


class _StateDict(OrderedDict[str, Any]):
    """A `state_dict` with the attribute in which PyTorch keeps the versions of modules."""

    def __init__(
        self, entries: Mapping[str, Tree], metadata: Mapping[str, Mapping[str, int]] | None = None
    ) -> None:
        super().__init__(entries)
        self._metadata = metadata or {}


def _required_names(
    node: Node,
    saved: Set[str],
    state: Mapping[str, Tree],
    target: WrappedModel | nn.Module,
    ties: Mapping[str, Sequence[str]],
    decoder: Decoder,
) -> Set[str]:
    """Return the names of the model that the checkpoint must have."""
    required = set(state)
    if node.get("trained_only"):  # frozen parameters keep their values
        required = set(trainable_entries(target, state))
    # Files of safetensors have a tied tensor once. It is loaded under all names.
    if node.get("imported") or not decoder.strict:
        for name in required - saved:
            if not saved.isdisjoint(ties.get(name, ())):
                required.remove(name)
    return required


def _check_names(
    required: Set[str], saved: Set[str], known: Set[str], path: str, decoder: Decoder
) -> None:
    if not decoder.strict:
        decoder.missing |= {child_name(path, name) for name in required - saved}
        decoder.unexpected |= {child_name(path, name) for name in saved - known}
        return
    # In a pipeline, the checkpoint has the modules of all stages and the rank has those of its
    # stages. `load` raises for what no rank has.
    if decoder.is_pipeline:
        decoder.unexpected |= {child_name(path, name) for name in saved - known}
    is_known = decoder.is_pipeline or saved <= known
    if not (required <= saved and is_known):
        raise mismatch(path, name_difference(saved, required), "build the model that was saved")


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
    # The values of another program's object, or a user's dict: there they look equal.
    if node.get("imported") and not is_stateful(target):
        return decoder.decode(node["v"], target, path)
    if not is_stateful(target):
        got = f"an object with `state_dict` in the checkpoint, {type(target).__name__} in the state"
        raise mismatch(path, got, "pass an object with `load_state_dict`")
    restore_state = decoder.decode(node["v"], None, path)

    def restore() -> Tree:
        state = restore_state()
        decoder.updates.append(Update(target, lambda: target.load_state_dict(state)))
        return target

    return restore


STATEFUL = Codec(
    ("stateful",), is_stateful, _encode_stateful, _decode_stateful, is_strict=True, is_in_place=True
)
