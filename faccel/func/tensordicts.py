"""Conversions between TensorDicts and dicts, and a comparison that names the leaf that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict

from faccel.errors import TreeError
from faccel.tree import Tree

NamedTensors = dict[str, torch.Tensor]

foreach: Any = torch
"""Namespace of `_foreach_mul_` and its siblings, which PyTorch exports without type stubs."""


def to_tensordict(tree: Mapping[str, Tree], batch_size: Sequence[int] = ()) -> TensorDict:
    """Return nested dicts as TensorDicts that hold the same tensors."""
    entries: dict[str, Tree] = {}
    for name, value in tree.items():
        # TensorDict would convert inner dicts by itself, but with an empty batch size
        entries[name] = to_tensordict(value, batch_size) if isinstance(value, dict) else value
    return TensorDict(entries, batch_size=batch_size)


def to_dict(tree: Tree) -> dict[str, Tree]:
    """Return a TensorDict as nested dicts that hold the same tensors."""
    entries: dict[str, Tree] = {}
    for name, value in tree.items():
        entries[name] = value if isinstance(value, torch.Tensor) else to_dict(value)
    return entries


def flat_dict(tree: TensorDict) -> NamedTensors:
    """Return the tensors of a TensorDict without nested ones, by name."""
    tensors: Tree = dict(tree.items())
    return tensors


def named_leaves(tree: Tree, prefix: str = "") -> NamedTensors:
    """Return all tensors of nested TensorDicts or dicts by path, as in `['opt']['count']`."""
    leaves: NamedTensors = {}
    for name, value in tree.items():
        path = f"{prefix}[{name!r}]"
        if isinstance(value, torch.Tensor):
            leaves[path] = value
        else:
            leaves |= named_leaves(value, path)
    return leaves


def check_same_structure(params: TensorDict, other: TensorDict, name: str) -> None:
    """Raise unless `other` has the names, shapes and dtypes of the parameters.

    Args:
        params: The parameters, without nested TensorDicts.
        other: What belongs to them: gradients, a vector, optimizer state.
        name: What `other` is, for the message.

    Raises:
        TreeError: They differ; names the leaf.
    """
    expected = flat_dict(params)
    actual = flat_dict(other)
    # The usual case, in a fraction of the time of the loops below: this runs at every update.
    if _signature(expected) == _signature(actual):
        return
    for key in expected.keys() ^ actual.keys():
        # The first difference is enough: others often follow from it.
        owner = "parameters" if key in expected else name
        raise TreeError(
            f"the {name} and the parameters must have the same names",
            got=f"`{key}` only in the {owner}",
            fix=f"pass {name} and `state.params` of the same model",
        )
    for key, param in expected.items():
        tensor = actual[key]
        if tensor.shape != param.shape or tensor.dtype != param.dtype:
            raise TreeError(
                f"the {name} and the parameters must have the same shapes and dtypes",
                got=f"`{key}`: {describe(tensor)} in the {name}, "
                f"{describe(param)} in the parameters",
                fix=f"pass {name} and `state.params` of the same model, in the same dtype",
            )


def _signature(tensors: NamedTensors) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]


def describe(tensor: torch.Tensor) -> str:
    """Return dtype and shape, as in `float32[2, 3]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
