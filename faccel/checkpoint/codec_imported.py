"""Codecs of parts of other programs' checkpoints: they become nodes of faccel's kinds.

They only encode: `load` sees a model, an optimizer, an object or random states like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from faccel.checkpoint.codec import Codec, Decoder, Encoder, Node, Restore, mismatch
from faccel.checkpoint.codec_random import random_node
from faccel.checkpoint.imported import (
    ImportedModule,
    ImportedObject,
    ImportedOptimizer,
    ImportedRandomStates,
)
from faccel.training.module_names import user_name, with_user_names
from faccel.tree import Tree


def _encode_module(value: ImportedModule, path: str, encoder: Encoder) -> Node:
    # `torch.save` keeps the versions of modules, safetensors do not.
    versions: dict[str, int] = {}
    for name, metadata in getattr(value.entries, "_metadata", {}).items():
        if "version" in metadata:
            versions[user_name(name)] = metadata["version"]
    with encoder.inside_module():
        entries = encoder.encode(with_user_names(value.entries), path)
    # A dict of tensors looks as the state of a module does: with this field it loads as either.
    return {"!": "module", "v": entries, "versions": versions, "imported": True}


def _encode_optimizer(value: ImportedOptimizer, path: str, encoder: Encoder) -> Node:
    names = value.names()
    state_dict = dict(value.state_dict)
    state: dict[object, Tree] = {}
    for key, entry in state_dict.pop("state", {}).items():
        # The keys of the state are those of `params`.
        # DCP has strings as the keys of all dicts, also of one by numbers.
        known = names.get(key)
        if known is None and isinstance(key, str) and key.isdecimal():
            known = names.get(int(key))
        state[known or key] = entry
    stored_groups = state_dict.pop("param_groups")
    groups = [_with_names(group, names) for group in stored_groups]
    content = {"state": state, "param_groups": groups, "rest": state_dict}
    return {"!": "optimizer", "v": encoder.encode(content, path)}


def _with_names(group: Mapping[str, Any], names: Mapping[object, str]) -> dict[str, Any]:
    return {**group, "params": [names[key] for key in group["params"]]}


def _encode_object(value: ImportedObject, path: str, encoder: Encoder) -> Node:
    with encoder.inside_stateful():
        content = encoder.encode(value.state, path)
    # It loads as a dict, too: a `state_dict` and a dict of a user look equal.
    return {"!": "stateful", "v": content, "imported": True}


def _encode_random_states(value: ImportedRandomStates, path: str, encoder: Encoder) -> Node:
    return random_node(value.states, value.device_type, path, encoder)


def _decode(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    raise mismatch(path, f"a {type(target).__name__} in the state", "pass the object itself")


def _codec(cls: type, encode: Any) -> Codec[Any]:
    # No node has the kind of the class: the nodes are those of modules, optimizers and objects.
    return Codec((), lambda value: isinstance(value, cls), encode, _decode)


IMPORTED: tuple[Codec[Any], ...] = (
    _codec(ImportedModule, _encode_module),
    _codec(ImportedOptimizer, _encode_optimizer),
    _codec(ImportedObject, _encode_object),
    _codec(ImportedRandomStates, _encode_random_states),
)
