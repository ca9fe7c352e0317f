"""Codec of tensors that consist of other tensors, such as the quantized ones of torchao.

Their classes follow the protocol of PyTorch's wrapper subclasses: `__tensor_flatten__` returns the
names of the inner tensors and a context of other values, `__tensor_unflatten__` builds the tensor.
A checkpoint cannot name a class to import. So the class is the target's, or one of those that
`torch.serialization.add_safe_globals` has registered, as for `torch.load`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch

from faccel.checkpoint.codec import Codec, Decoder, Encoder, Node, Restore, mismatch, restore_all
from faccel.checkpoint.tensor_names import child_name
from faccel.checkpoint.tensor_views import check_storable, has_inner_tensors
from faccel.errors import CheckpointError
from faccel.tree import Tree


class Wrapper(Protocol):
    """A tensor that consists of other tensors. The methods are PyTorch's protocol."""

    def __tensor_flatten__(self) -> tuple[Sequence[str], object]: ...

    @classmethod
    def __tensor_unflatten__(
        cls,
        inner: Mapping[str, torch.Tensor],
        context: object,
        size: torch.Size,
        stride: Sequence[int],
        /,
    ) -> torch.Tensor: ...


def is_wrapper(value: object) -> bool:
    """Return whether a value is a tensor that consists of other tensors.

    Effects: pure. False for a DTensor, whose shards are stored.
    """
    return isinstance(value, torch.Tensor) and has_inner_tensors(value)


def class_name(cls: type) -> str:
    """Return the name of a class in a checkpoint.

    Effects: pure.
    """
    return f"{cls.__module__}.{cls.__qualname__}"


def inner_tensors(value: Tree) -> dict[str, torch.Tensor]:
    """Return the tensors that a wrapper consists of, which it aliases.

    Effects: pure.
    """
    names, _ = value.__tensor_flatten__()
    return {name: getattr(value, name) for name in names}


def _context_text(value: Tree) -> str | None:
    """Return a text to compare contexts by; None if it differs between processes."""
    _, context = value.__tensor_flatten__()
    text = repr(context)
    if " at 0x" in text:  # an address
        return None
    return text


def _encode_wrapper(value: Tree, path: str, encoder: Encoder) -> Node:
    check_storable(path, value)
    nodes: dict[str, Node] = {}
    for name, tensor in inner_tensors(value).items():
        nodes[name] = encoder.encode(tensor, child_name(path, name))
    cls = type(value)
    node = {
        "!": "wrapper",
        "class": class_name(cls),
        "shape": list(value.shape),
        "stride": list(value.stride()),
        "context_text": _context_text(value),
        "v": nodes,
    }
    # `load` reads an entry of a module into the tensor that the module has. Any other value is
    # built anew.
    if not encoder.is_inside_module:
        node["context"] = _encode_context(value, path, encoder)
    return node


def _encode_context(value: Tree, path: str, encoder: Encoder) -> Node:
    cls = type(value)
    if _registered_class(class_name(cls)) is None:
        raise CheckpointError(
            f"`{path}` has a class that `load` cannot build",
            got=f"a tensor of class {class_name(cls)}",
            fix="register it in every program that saves or loads: "
            f"`torch.serialization.add_safe_globals([{cls.__name__}])`",
        )
    _, context = value.__tensor_flatten__()
    return encoder.encode(context, child_name(path, "context"))


def _registered_class(name: str) -> type | None:
    """Return the class of a name that was registered for `torch.load`; None if there is none."""
    for entry in torch.serialization.get_safe_globals():
        cls: object = entry
        if isinstance(entry, tuple):  # a function or a class, and the name that `torch.load` uses
            cls = entry[0]
        if isinstance(cls, type) and issubclass(cls, torch.Tensor) and class_name(cls) == name:
            return cls
    return None


def _decode_wrapper(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    name = node["class"]
    targets: dict[str, torch.Tensor] = {}
    if is_wrapper(target) and class_name(type(target)) == name:
        cls: type | None = type(target)
        targets = inner_tensors(target)
    else:
        cls = _registered_class(name)
    if cls is None or "context" not in node:
        fix = f"import it, and call `torch.serialization.add_safe_globals([{name}])`"
        raise mismatch(path, f"a tensor of the unknown class {name}", fix)
    restores: dict[str, Restore] = {}
    for key, child in node["v"].items():
        restores[key] = decoder.decode(child, targets.get(key), child_name(path, key))
    restore_context = decoder.decode(node["context"], None, child_name(path, "context"))
    size, stride = torch.Size(node["shape"]), tuple(node["stride"])

    def restore() -> torch.Tensor:
        inner = restore_all(restores)
        return cast("Wrapper", cls).__tensor_unflatten__(inner, restore_context(), size, stride)

    return restore


def check_same_wrapper(node: Node, entry: Tree, path: str) -> None:
    """Raise unless a tensor of a model has the class and the context of the one that was saved.

    Raises:
        CheckpointError: It differs.
    """
    expected, got = node["class"], class_name(type(entry))
    if is_wrapper(entry) and got == expected:
        expected, got = node["context_text"], _context_text(entry)
    if got != expected and None not in (got, expected):
        raise mismatch(
            path,
            f"{expected} in the checkpoint, {got} in the model",
            "build the model that was saved, and quantize it before you load",
        )


WRAPPER: Codec[Any] = Codec(("wrapper",), is_wrapper, _encode_wrapper, _decode_wrapper)
