"""`default_collate` of samples that are tuples of tensors, in two thirds of its time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import (  # pyright: ignore[reportMissingImports]
    collate_tensor_fn,
    default_collate_fn_map,
)

from faccel.tree import Tree


def collate_in_process(samples: Sequence[Tree]) -> Tree:
    """Return `default_collate(samples)`, outside of worker processes.

    Effects: pure.

    `default_collate` looks for the type of each value in a table, which takes as long as the copy
    for a small batch.

    Args:
        samples: The items of a dataset.

    Examples:
        >>> x, y = torch.eye(2), torch.arange(2)
        >>> collate_in_process([(x[0], y[0]), (x[1], y[1])])
        [tensor([[1., 0.],
                [0., 1.]]), tensor([0, 1])]
    """
    columns = _tensor_columns(samples)
    if columns is None:
        return default_collate(list(samples))
    return [torch.stack(column) for column in columns]


def _tensor_columns(samples: Sequence[Tree]) -> list[tuple[torch.Tensor, ...]] | None:
    """Return the tensors of each field; None for samples of any other kind.

    Exact types: a named tuple or a subclass of tensors is collated in another way.
    """
    # Users may register a function for tensors in the table.
    if default_collate_fn_map[torch.Tensor] is not collate_tensor_fn:
        return None
    if {*map(type, samples)} != {tuple} or len({*map(len, samples)}) != 1:
        return None
    columns = list(zip(*samples, strict=True))
    for column in columns:
        if {*map(type, column)} != {torch.Tensor}:
            return None
        # Sparse and nested tensors are errors of `default_collate`.
        if any(tensor.layout is not torch.strided or tensor.is_nested for tensor in column):
            return None
    return columns
