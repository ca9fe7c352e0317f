"""Nodes of tensors that consist of other tensors: what their codecs have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from faccel.checkpoint.codec import Encoder, Node
from faccel.checkpoint.tensor_names import child_name
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


def context_text(context: object) -> str | None:
    """Return a text to compare contexts by; None if it differs between processes.

    Effects: pure.
    """
    text = repr(context)
    if " at 0x" in text:  # an address
        return None
    return text


def wrapper_node(
    value: torch.Tensor,
    cls: type,
    context: Any,
    inner: Mapping[str, Node],
    path: str,
    encoder: Encoder,
) -> Node:
    """Return the node of a wrapper.

    Effects: updates encoder, by the tensors of the context.

    Args:
        value: The wrapper, or the DTensor whose shards are wrappers.
        cls: The class of the wrapper.
        context: What `__tensor_flatten__` returned, of the full tensor.
        inner: The nodes of the inner tensors by name.
        path: The path of the value.
        encoder: The encoder.
    """
    node = {
        "!": "wrapper",
        "class": class_name(cls),
        "shape": list(value.shape),
        "stride": list(value.stride()),
        "context_text": context_text(context),
        "v": dict(inner),
    }
    # `load` reads an entry of a module into the tensor that the module has. Any other value is
    # built anew.
    if not encoder.is_inside_module:
        _check_registered(cls, path)
        node["context"] = encoder.encode(context, child_name(path, "context"))
    return node


def _check_registered(cls: type, path: str) -> None:
    if registered_class(class_name(cls)) is None:
        raise CheckpointError(
            f"`{path}` has a class that `load` cannot build",
            got=f"a tensor of class {class_name(cls)}",
            fix="register it in every program that saves or loads: "
            f"`torch.serialization.add_safe_globals([{cls.__name__}])`",
        )


def registered_class(name: str) -> type | None:
    """Return the class of a name that was registered for `torch.load`; None if there is none.

    Effects: ambient. Reads PyTorch's table.
    """
    for entry in torch.serialization.get_safe_globals():
        cls: object = entry
        if isinstance(entry, tuple):  # a function or a class, and the name that `torch.load` uses
            cls = entry[0]
        if isinstance(cls, type) and issubclass(cls, torch.Tensor) and class_name(cls) == name:
            return cls
    return None
