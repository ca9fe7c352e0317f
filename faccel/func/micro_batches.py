"""Batches cut into micro-batches, and what they gave put together."""

from __future__ import annotations

from itertools import pairwise

import attrs
import torch

from faccel.data.source import Batch
from faccel.errors import DataError
from faccel.tree import Tree, flatten


def stacked(outputs: list[Tree]) -> Tree:
    """Return one tree for those of several micro-batches: tensors stacked along a new dim 0, all else in lists."""
    leaves, rebuild = flatten(outputs[0])
    others = [flatten(each)[0] for each in outputs]
    return rebuild(
        [
            torch.stack([each[i] for each in others])
            if isinstance(leaf, torch.Tensor)
            else [each[i] for each in others]
            for i, leaf in enumerate(leaves)
        ]
    )


def micro_batches(batch: Tree, num_micro_batches: int, *, is_mean: bool) -> list[Tree]:
    """Return a batch cut along dim 0 of its tensors; into equal parts where the loss is a mean."""
    if num_micro_batches == 1:
        return [batch]
    data = batch.data if isinstance(batch, Batch) else batch
    leaves, rebuild = flatten(data)
    rows = {len(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim}
    if len(rows) != 1:
        raise DataError(
            "a batch is cut along dim 0 of its tensors, which must have one length",
            got=f"rows {sorted(rows)}",
            fix="use `num_micro_batches=1`",
        )
    (num_rows,) = rows
    if num_rows < num_micro_batches or (is_mean and num_rows % num_micro_batches):
        raise DataError(
            "a batch is cut into micro-batches of equal length, or their mean would not be that of its rows",
            got=f"{num_rows} rows, num_micro_batches={num_micro_batches}",
            fix="choose a divisor, or pass `weight=` with a loss that is a sum",
        )
    cuts = [num_rows * i // num_micro_batches for i in range(num_micro_batches + 1)]
    found: list[Tree] = []
    for start, end in pairwise(cuts):
        part = rebuild(
            [x[start:end] if isinstance(x, torch.Tensor) and x.ndim else x for x in leaves]
        )
        if isinstance(batch, Batch):
            part = attrs.evolve(
                batch, data=part, num_valid=min(max(batch.num_valid - start, 0), end - start)
            )
        found.append(part)
    return found
