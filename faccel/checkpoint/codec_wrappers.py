"""Codec of tensors that consist of other tensors, such as the quantized ones of torchao.

Their classes follow the protocol of PyTorch's wrapper subclasses: `__tensor_flatten__` returns the
names of the inner tensors and a context of other values, `__tensor_unflatten__` builds the tensor.
A checkpoint cannot name a class to import. So the class is the target's, or one of those that
`torch.serialization.add_safe_globals` has registered, as for `torch.load`.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from faccel.checkpoint.codec import Codec, Decoder, Encoder, Node, Restore, mismatch, restore_all
from faccel.checkpoint.codec_sharded_wrappers import decode_into_shards, in_shapes_of_class
from faccel.checkpoint.tensor_names import child_name
from faccel.checkpoint.tensor_views import check_storable
from faccel.checkpoint.wrapper_nodes import (
    Wrapper,
    class_name,
    context_text,
    inner_tensors,
    registered_class,
    wrapper_node,
)
from faccel.tree import Tree, has_inner_tensors, is_dtensor


def is_wrapper(value: object) -> bool:
    """Return whether a value is a tensor that consists of other tensors.

    Effects: pure. False for a DTensor, whose shards are stored.
    """
    return isinstance(value, torch.Tensor) and has_inner_tensors(value)


def _context(value: Tree) -> object:
    _, context = value.__tensor_flatten__()
    return context


def _encode_wrapper(value: Tree, path: str, encoder: Encoder) -> Node:
    check_storable(path, value)
    nodes: dict[str, Node] = {}
    for name, tensor in inner_tensors(value).items():
        nodes[name] = encoder.encode(tensor, child_name(path, name))
    return wrapper_node(value, type(value), _context(value), nodes, path, encoder)


def _decode_wrapper(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    name = node["class"]
    targets: dict[str, torch.Tensor] = {}
    if is_wrapper(target) and class_name(type(target)) == name:
        cls: type | None = type(target)
        targets = inner_tensors(target)
    else:
        cls = registered_class(name)
    if cls is None or "context" not in node:
        fix = f"import it, and call `torch.serialization.add_safe_globals([{name}])`"
        raise mismatch(path, f"a tensor of the unknown class {name}", fix)
    size, stride = torch.Size(node["shape"]), tuple(node["stride"])
    # The state of a sharded parameter gets its layout.
    if is_dtensor(target) and target.shape == size:
        return decode_into_shards(node, cls, target, path, decoder)
    restores: dict[str, Restore] = {}
    for key, child in node["v"].items():
        restores[key] = decoder.decode(child, targets.get(key), child_name(path, key))
    restore_context = decoder.decode(node["context"], None, child_name(path, "context"))

    def restore() -> torch.Tensor:
        inner = in_shapes_of_class(restore_all(restores), size)
        return cast("Wrapper", cls).__tensor_unflatten__(inner, restore_context(), size, stride)

    return restore


def check_same_wrapper(node: Node, entry: Tree, path: str) -> None:
    """Raise unless a tensor of a model has the class and the context of the one that was saved.

    Raises:
        CheckpointError: It differs.
    """
    expected, got = node["class"], class_name(type(entry))
    if is_wrapper(entry) and got == expected:
        expected, got = node["context_text"], context_text(_context(entry))
    if got != expected and None not in (got, expected):
        raise mismatch(
            path,
            f"{expected} in the checkpoint, {got} in the model",
            "build the model that was saved, and quantize it before you load",
        )


WRAPPER: Codec[Any] = Codec(("wrapper",), is_wrapper, _encode_wrapper, _decode_wrapper)
