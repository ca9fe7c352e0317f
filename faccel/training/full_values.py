"""Full tensors as values of a model of several ranks: each takes its own slice, or its copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from faccel.errors import ModelError
from faccel.tree import is_dtensor, local_tensor


def local_slice(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a full tensor, in the layout of a DTensor; aliases `full`.

    Args:
        full: The full tensor.
        like: A DTensor of the same shape.
    """
    from torch.distributed.tensor import DTensor  # noqa: TID251 (nothing is communicated)

    # The layout of FSDP over tensor parallel has strided shards; torch computes it only here.
    from torch.distributed.tensor._utils import (  # noqa: TID251
        compute_local_shape_and_global_offset,
    )

    assert isinstance(like, DTensor)
    shape, offsets = compute_local_shape_and_global_offset(
        full.shape, like.device_mesh, like.placements
    )
    index = [slice(start, start + length) for start, length in zip(offsets, shape, strict=True)]
    return full[tuple(index)]


def shard_full_values(
    module: nn.Module, state: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Return a state dict with the layout of `module`: full tensors become DTensors where it has.

    Every rank passes the same full tensors, as under DDP, so nothing is communicated.
    """
    sharded: dict[str, torch.Tensor] = {}
    for name, like in module.state_dict().items():
        value = state.get(name)
        if value is None or is_dtensor(value) or not is_dtensor(like):
            continue
        # Of another shape: PyTorch's error names it.
        if value.shape == like.shape:
            sharded[name] = _as_dtensor(value, like)
    if not sharded:
        return state
    # A copy keeps `_metadata`, from which modules migrate older states.
    result = copy.copy(state)
    cast("dict[str, torch.Tensor]", result).update(sharded)
    return result


def with_tied_values(
    module: nn.Module, state: Mapping[str, torch.Tensor], tied_names: Mapping[int, Sequence[str]]
) -> Mapping[str, torch.Tensor]:
    """Return a state dict with a value for each copy of a tied parameter, on each of its ranks.

    Args:
        module: The user's module, with the modules of this rank.
        state: Values by name.
        tied_names: As from `Parallelism.tied_names`.

    Raises:
        ModelError: `state` has different values for one parameter.
    """
    added: dict[str, torch.Tensor] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        # Each rank takes the value of the same name, whatever its copy is called.
        names = [other for other in tied_names.get(id(param), ()) if other in state]
        for other in names[1:]:
            _check_equal(state, names[0], other)
        if names and state.get(name) is not state[names[0]]:
            added[name] = state[names[0]]
    if not added:
        return state
    result = copy.copy(state)
    cast("dict[str, torch.Tensor]", result).update(added)
    return result


def _check_equal(state: Mapping[str, torch.Tensor], first: str, other: str) -> None:
    values = (local_tensor(state[first]), local_tensor(state[other]))
    if values[0] is not values[1] and not torch.equal(*values):
        raise ModelError(
            "two names of one tied parameter have different values in the state",
            got=f"`{first}` and `{other}`",
            fix=f'leave one out: `del state["{other}"]`',
        )


def _as_dtensor(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor  # noqa: TID251 (nothing is communicated)

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        local_slice(full, like),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
