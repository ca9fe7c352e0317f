"""Codecs of modules and other objects with `load_state_dict`, which are updated in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Set
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
    Update,
    kind_of,
    mismatch,
    restore_all,
)
from faccel.checkpoint.codec_tensors import TENSOR, decode_spec
from faccel.checkpoint.codec_wrappers import (
    WRAPPER,
    check_same_wrapper,
    inner_tensors,
    is_wrapper,
)
from faccel.checkpoint.tensor_names import (
    child_name,
    module_of,
    quantization_entries,
    trainable_entries,
)
from faccel.checkpoint.tensor_views import (
    check_storable,
    memory_key,
    stored_view,
)
from faccel.errors import CheckpointError, short_repr, short_text
from faccel.training.model import WrappedModel
from faccel.training.module_checks import check_contains_no_model
from faccel.training.module_names import original_names, user_name, with_user_names
from faccel.tree import Tree, has_inner_tensors, is_sharded

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
        if isinstance(entry, torch.Tensor) and _has_overlap(entry):
            problem = f"`{child_name(path, name)}` cannot be loaded again"
            raise CheckpointError(problem, got=_OVERLAP, fix=_FIX_OF_OVERLAP)
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
    _check_names(node, saved_names.keys(), state, target, path, decoder)
    restores: dict[str, Restore] = {}
    for original_name, entry in original_state.items():
        name = user_name(original_name)
        if name in saved_names and not _is_unfit(node, saved_names[name], entry, path, decoder):
            saved_name = saved_names[name]
            restores[original_name] = _decode_entry(
                node["v"][saved_name], entry, child_name(path, saved_name), decoder
            )
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


def _is_unfit(node: Node, name: str, entry: Tree, path: str, decoder: Decoder) -> bool:
    """Return whether an entry does not fit and may be left out; add it to the report."""
    entry_path, entry_node = child_name(path, name), node["v"][name]
    is_tensor = isinstance(entry, torch.Tensor) and kind_of(entry_node) in TENSOR.kinds
    if decoder.strict or not is_tensor:
        return False
    spec = decode_spec(entry_node, entry_path, decoder)
    # A cast of complex numbers to real ones, or of real numbers to ints, would lose a part of each.
    if spec.shape == entry.shape and torch.can_cast(spec.dtype, entry.dtype):
        return False
    decoder.mismatched.add(entry_path)
    return True


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


def _check_names(
    node: Node,
    saved: Set[str],
    state: Mapping[str, Tree],
    target: WrappedModel | nn.Module,
    path: str,
    decoder: Decoder,
) -> None:
    required = dict(state)
    if node.get("trained_only"):  # frozen parameters keep their values
        required = trainable_entries(target, state)
    if node.get("imported") and not required.keys() <= saved:
        for name in _tied_to(saved, required):
            del required[name]
    if not decoder.strict:
        decoder.missing |= {child_name(path, name) for name in required.keys() - saved}
        decoder.unexpected |= {child_name(path, name) for name in saved - state.keys()}
        return
    is_complete = required.keys() <= saved
    # In a pipeline, the checkpoint has the modules of all stages and the rank has those of its
    # stages. `load` raises for what no rank has.
    if decoder.is_pipeline:
        decoder.unexpected |= {child_name(path, name) for name in saved - state.keys()}
    is_known = decoder.is_pipeline or saved <= state.keys()
    if not (is_complete and is_known):
        got = name_difference(saved, required.keys())
        raise mismatch(path, got, "build the model that was saved")


def _tied_to(saved: Set[str], state: Mapping[str, Tree]) -> list[str]:
    """Return the names that were not saved, of tensors that were saved under another name.

    Files of safetensors have a tied tensor once.
    """
    keys: dict[str, Hashable] = {}
    for name, entry in state.items():
        if isinstance(entry, torch.Tensor) and not has_inner_tensors(entry):
            keys[name] = memory_key(name, entry)
    saved_keys = {key for name, key in keys.items() if name in saved}
    return [name for name, key in keys.items() if name not in saved and key in saved_keys]


def _decode_entry(node: Node, entry: Tree, path: str, decoder: Decoder) -> Restore:
    """Plan to read an entry of a module's state into the memory that it has."""
    if not isinstance(entry, torch.Tensor):  # an extra state
        return decoder.decode(node, entry, path)
    kind = kind_of(node)
    if kind in WRAPPER.kinds or is_wrapper(entry):
        return _decode_wrapper_entry(node, entry, path, decoder)
    if kind not in TENSOR.kinds:
        raise mismatch(path, "no tensor in the checkpoint, a tensor in the model")
    spec = decode_spec(node, path, decoder)
    if not decoder.strict and spec.dtype != entry.dtype and spec.shape == entry.shape:
        return decoder.decode(node, entry, path)  # `load_state_dict` casts
    _check_tensor(entry, spec, path)
    entry = entry.detach()
    if entry.is_conj() or entry.is_neg():  # a lazy result has no memory
        return decoder.decode(node, entry, path)
    decoder.read_into_module(path, stored_view(entry))  # no second copy of the parameter
    return lambda: entry


def _decode_wrapper_entry(node: Node, entry: torch.Tensor, path: str, decoder: Decoder) -> Restore:
    """Plan to read the tensors that an entry consists of."""
    if kind_of(node) not in WRAPPER.kinds:
        got = f"an ordinary tensor in the checkpoint, a {type(entry).__name__} in the model"
        raise mismatch(path, got, "load it before you quantize the model")
    check_same_wrapper(node, entry, path)
    inner = inner_tensors(entry)
    if inner.keys() != node["v"].keys():
        raise mismatch(path, name_difference(node["v"].keys(), inner.keys()))
    for name, tensor in inner.items():
        _decode_entry(node["v"][name], tensor, child_name(path, name), decoder)
    return lambda: entry


def _check_tensor(entry: torch.Tensor, stored: StoredTensor, path: str) -> None:
    if StoredTensor(entry.shape, entry.dtype) != stored:
        raise mismatch(
            path,
            f"{stored.dtype} {list(stored.shape)} in the checkpoint, "
            f"{entry.dtype} {list(entry.shape)} in the model",
            "build the model that was saved, in its dtype",
        )
    if _has_overlap(entry):
        raise mismatch(path, _OVERLAP, _FIX_OF_OVERLAP)


_OVERLAP = "an expanded tensor, whose elements overlap in memory"
_FIX_OF_OVERLAP = "register a `.clone()` of it"


def _has_overlap(entry: torch.Tensor) -> bool:
    """Return whether reading into a tensor would leave the last value in several elements."""
    if is_sharded(entry):
        return False
    return any(
        size > 1 and stride == 0 for size, stride in zip(entry.shape, entry.stride(), strict=True)
    )


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
    text = ", ".join(f"`{short_text(name)}`" for name in listed[:limit])
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
