"""TensorDicts and what torch's transforms see of them: nested dicts; and comparisons that name the leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict

from faccel.errors import TreeError

foreach: Any = torch
"""Where torch's functions over lists of tensors are: `foreach._foreach_mul_`; they have no public name."""


def tensordict(tree: Mapping[str, Any], batch_size: Sequence[int] = ()) -> TensorDict:
    """Return nested dicts as TensorDicts that hold the same tensors."""
    made = {
        name: tensordict(each, batch_size) if isinstance(each, dict) else each
        for name, each in tree.items()
    }
    return TensorDict(made, batch_size=batch_size)


def plain(tree: Any) -> dict[str, Any]:
    """Return a TensorDict as nested dicts that hold the same tensors."""
    return {
        name: each if isinstance(each, torch.Tensor) else plain(each) for name, each in tree.items()
    }


def named(tree: TensorDict) -> dict[str, torch.Tensor]:
    """Return the tensors of a flat TensorDict by name."""
    tensors: Any = dict(tree.items())
    return tensors


def leaves(tree: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return all tensors of nested TensorDicts or dicts by their full names."""
    found: dict[str, torch.Tensor] = {}
    for name, each in tree.items():
        path = f"{prefix}[{name!r}]"
        found |= {path: each} if isinstance(each, torch.Tensor) else leaves(each, path)
    return found


def check_like(params: Any, others: Any, name: str) -> None:
    """Refuse tensors that have other names, shapes or dtypes than the parameters; names the leaf."""
    mine, theirs = named(params), named(others)
    if list(map(_kind, mine.items())) == list(map(_kind, theirs.items())):
        return  # the usual case, in a fraction of the time
    for key in mine.keys() ^ theirs.keys():
        raise TreeError(
            f"{name} and parameters have other names",
            got=f"`{key}` only in the {'parameters' if key in mine else name}",
            fix="pass what belongs to one model",
        )
    for key, param in mine.items():
        other = theirs[key]
        if other.shape != param.shape or other.dtype != param.dtype:
            raise TreeError(
                f"{name} and parameters have other shapes or dtypes",
                got=f"`{key}`: {_like(other)} in the {name}, {_like(param)} in the parameters",
                fix="pass what belongs to one model, in its dtype",
            )


def _kind(item: tuple[str, torch.Tensor]) -> tuple[Any, ...]:
    name, tensor = item
    return name, tensor.shape, tensor.dtype


def _like(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
