"""Codecs of numbers, strings and containers."""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from faccel.checkpoint.codec import (
    Codec,
    Decoder,
    Encoder,
    Node,
    Restore,
    kind_of,
    mismatch,
    restore_all,
)
from faccel.checkpoint.codec_modules import is_stateful
from faccel.checkpoint.tensor_names import child_name, item_name
from faccel.checkpoint.tensor_views import DTYPES
from faccel.errors import CheckpointError, nearest, short_text
from faccel.tree import Tree

_PLAIN = (type(None), bool, int, str)
_MAPPINGS: dict[str, Callable[[dict[object, Tree]], Tree]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": Counter,
}
_SEQUENCES: dict[str, Callable[[list[Tree]], Tree]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Size": torch.Size,
}

# Plain values are JSON values. A subclass of int or str, such as an enum, would come back as
# another type, so it has no codec.


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN


def _encode_plain(value: Node, path: str, encoder: Encoder) -> Node:
    return value


def _decode_plain(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    return lambda: node


PLAIN = Codec(("plain",), _is_plain, _encode_plain, _decode_plain)


# JSON has no infinities and no NaN.


def _is_float(value: object) -> bool:
    return type(value) is float


def _encode_float(value: float, path: str, encoder: Encoder) -> Node:
    if math.isfinite(value):  # `json` writes the shortest text that reads back as the same float
        return value
    return {"!": "float", "v": str(value)}


def _decode_float(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    return lambda: float(node["v"])


FLOAT = Codec(("float",), _is_float, _encode_float, _decode_float)


def _is_bytes(value: object) -> bool:
    return isinstance(value, bytes)


def _encode_bytes(value: bytes, path: str, encoder: Encoder) -> Node:
    return {"!": "bytes", "v": base64.b64encode(value).decode()}


def _decode_bytes(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    return lambda: base64.b64decode(node["v"])


BYTES = Codec(("bytes",), _is_bytes, _encode_bytes, _decode_bytes)


# Hexadecimal floats are exact and include infinities and NaN.


def _is_complex(value: object) -> bool:
    return isinstance(value, complex)


def _encode_complex(value: complex, path: str, encoder: Encoder) -> Node:
    return {"!": "complex number", "v": [value.real.hex(), value.imag.hex()]}


def _decode_complex(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    real, imag = node["v"]
    return lambda: complex(float.fromhex(real), float.fromhex(imag))


COMPLEX = Codec(("complex number",), _is_complex, _encode_complex, _decode_complex)


def _is_dtype(value: object) -> bool:
    return isinstance(value, torch.dtype)


def _encode_dtype(value: torch.dtype, path: str, encoder: Encoder) -> Node:
    return {"!": "dtype", "v": str(value).removeprefix("torch.")}


def _decode_dtype(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    dtype = DTYPES.get(node["v"])
    if dtype is None:
        raise mismatch(path, f"the unknown dtype `{short_text(node['v'])}`", "update torch")
    return lambda: dtype


DTYPE = Codec(("dtype",), _is_dtype, _encode_dtype, _decode_dtype)


def _is_device(value: object) -> bool:
    return isinstance(value, torch.device)


def _encode_device(value: torch.device, path: str, encoder: Encoder) -> Node:
    return {"!": "device", "v": str(value)}


def _decode_device(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    try:
        device = torch.device(node["v"])
    except RuntimeError:
        raise mismatch(
            path, f"the unknown device `{short_text(node['v'])}`", "update torch"
        ) from None
    return lambda: device


DEVICE = Codec(("device",), _is_device, _encode_device, _decode_device)


# A list is a JSON list; the other sequences state their class.


def _is_sequence(value: object) -> bool:
    return type(value) in _SEQUENCES.values()  # a subclass would come back as another class


def _encode_sequence(value: Sequence[Tree], path: str, encoder: Encoder) -> Node:
    nodes = [encoder.encode(item, item_name(path, index)) for index, item in enumerate(value)]
    if isinstance(value, list):
        return nodes
    return {"!": type(value).__name__, "v": nodes}


def _decode_sequence(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    nodes: list[Node] = node["v"] if isinstance(node, dict) else node
    targets: Sequence[Tree] = ()
    if type(target) in _SEQUENCES.values():
        targets = list(target)  # of a set, the items have no order, but one class
    elif decoder.has_in_place(target):
        raise _other_container("a list or a tuple", target, path)
    if len(targets) != len(nodes):
        if any(decoder.has_in_place(item) for item in targets):
            got = f"{len(nodes)} items in the checkpoint, {len(targets)} in the state"
            raise mismatch(path, got)
        # The items of a list of values have one structure, and the list may have grown since: a
        # history of losses.
        example = targets[0] if targets else None
        targets = [example] * len(nodes)
    restores: list[Restore] = []
    for index, (item, item_target) in enumerate(zip(nodes, targets, strict=True)):
        restores.append(decoder.decode(item, item_target, item_name(path, index)))
    build = _SEQUENCES[kind_of(node)]
    return lambda: build([restore() for restore in restores])


SEQUENCE = Codec(tuple(_SEQUENCES), _is_sequence, _encode_sequence, _decode_sequence)


def _other_container(stored: str, target: Tree, path: str) -> CheckpointError:
    """Return the error for models and the like in a container of another kind than was saved."""
    return mismatch(path, f"{stored} in the checkpoint, a {type(target).__name__} in the state")


# A dict with string keys is a JSON object; any other mapping states its class and lists its keys.


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def _encode_mapping(value: Mapping[object, Tree], path: str, encoder: Encoder) -> Node:
    kind = type(value).__name__
    if kind not in _MAPPINGS:  # a subclass, such as a defaultdict, comes back as a dict
        kind = "dict"
    keys: list[Node] = []
    nodes: list[Node] = []
    for key, child in value.items():
        keys.append(_encode_key(key, path, encoder))
        nodes.append(encoder.encode(child, child_name(path, key)))
    if kind == "dict" and _are_json_keys(value):
        return dict(zip(value, nodes, strict=True))
    return {"!": kind, "k": keys, "v": nodes}


def _are_json_keys(keys: Iterable[object]) -> bool:
    # A key `"!"` would make the dict a node of another kind.
    return all(type(key) is str and not key.startswith("!") for key in keys)


def _encode_key(key: object, path: str, encoder: Encoder) -> Node:
    if isinstance(key, np.generic):  # equal to, and hashed as, the Python number
        key = key.item()
    items: Sequence[object] = (key,)
    if type(key) is tuple:
        items = key
    if not all(isinstance(item, (*_PLAIN, float, bytes, torch.dtype)) for item in items):
        raise CheckpointError(
            f"`{path}` has a key that cannot be stored",
            got=f"a key of type {type(key).__name__}",
            fix="use numbers, strings or tuples of them as keys",
        )
    return encoder.encode(key, path)


def _decode_mapping(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    nodes = mapping_nodes(node, decoder)
    targets: Mapping[object, Tree] = {}
    if isinstance(target, Mapping) and not is_stateful(target):
        targets = target
    elif decoder.has_in_place(target):
        raise _other_container("a dict", target, path)
    missing = _missing_keys(targets, nodes, path, decoder)
    # The keys of the state select what is loaded. Below the top level a dict without keys selects
    # everything: the state of a run begins with `{}` for its metrics. So does a value without keys.
    selects_nothing = isinstance(target, Mapping) and not path
    selected: Iterable[object] = targets
    if not targets and not selects_nothing:
        selected = nodes
    restores: dict[object, Restore] = {}
    for key in selected:
        if key in missing:
            restores[key] = lambda value=targets[key]: value
        else:
            restores[key] = decoder.decode(nodes[key], targets.get(key), child_name(path, key))
    build = _MAPPINGS[kind_of(node)]
    return lambda: build(restore_all(restores))


def _missing_keys(
    targets: Mapping[object, Tree], nodes: Mapping[object, Node], path: str, decoder: Decoder
) -> set[object]:
    """Return the keys of the state that are not in the checkpoint; raise if there must be none."""
    missing = targets.keys() - nodes.keys()
    if missing and decoder.strict:
        key = next(key for key in targets if key in missing)
        fix = f"leave it out, or {nearest(str(key), map(str, nodes))}"
        raise mismatch(child_name(path, key), "not in the checkpoint", fix)
    decoder.missing |= {child_name(path, key) for key in missing}
    return missing


def mapping_nodes(node: Node, decoder: Decoder) -> dict[object, Node]:
    """Return the nodes of the values of a mapping by their keys."""
    if "!" not in node:
        return node
    # Keys are plain values or tuples of them, which need no tensors: they are restored at once.
    keys = [decoder.decode(key, None)() for key in node["k"]]
    return dict(zip(keys, node["v"], strict=True))


MAPPING = Codec(tuple(_MAPPINGS), _is_mapping, _encode_mapping, _decode_mapping)
