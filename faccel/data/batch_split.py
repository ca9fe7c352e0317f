"""A batch cut into micro-batches along its rows."""

from __future__ import annotations

from itertools import pairwise

import attrs
import torch

from faccel.data.batch import Batch
from faccel.errors import DataError
from faccel.tree import Tree, flatten


def _has_rows(leaf: Tree) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.ndim > 0


def split_batch(batch: Tree, num_micro_batches: int, *, is_mean: bool) -> list[Tree]:
    """Return the micro-batches of a batch, cut along dim 0 of its tensors.

    Args:
        batch: A tree of tensors `T[n, ...]`, or a `Batch` with one. Other leaves, such as 0-d
            tensors, are repeated in each micro-batch.
        num_micro_batches: How many micro-batches. A sum over fewer rows, as of the last batch of an
            epoch, has a micro-batch per row.
        is_mean: Whether the loss is a mean over rows: then the sizes must be equal.

    Raises:
        DataError: Tensors differ in length, or `num_micro_batches` does not fit it.
    """
    # The usual case: no slicing, and batches without any tensor are accepted.
    if num_micro_batches == 1:
        return [batch]
    data = batch.data if isinstance(batch, Batch) else batch
    leaves, rebuild = flatten(data)
    lengths = {len(leaf) for leaf in leaves if _has_rows(leaf)}
    if len(lengths) != 1:
        raise DataError(
            "the tensors of a batch must have one length along dim 0 to be cut into micro-batches",
            got=f"lengths {sorted(lengths)}",
            fix="use `num_micro_batches=1`",
        )
    (num_rows,) = lengths
    # The mean of the means of micro-batches is the mean over the rows only if they are equal.
    if is_mean and (num_rows < num_micro_batches or num_rows % num_micro_batches):
        raise DataError(
            "`num_micro_batches` must divide the number of rows of the batch",
            got=f"{num_rows} rows, num_micro_batches={num_micro_batches}",
            fix="choose a divisor, or pass `weight=` with a loss that is a sum",
        )
    num_micro_batches = max(1, min(num_micro_batches, num_rows))
    # Sizes differ by at most one; views, no copies.
    cuts = [num_rows * i // num_micro_batches for i in range(num_micro_batches + 1)]
    micro_batches: list[Tree] = []
    for start, end in pairwise(cuts):
        rows = [leaf[start:end] if _has_rows(leaf) else leaf for leaf in leaves]
        micro_batch = rebuild(rows)
        if isinstance(batch, Batch):
            # padding is at the end of a batch
            num_valid = min(max(batch.num_valid - start, 0), end - start)
            micro_batch = attrs.evolve(batch, data=micro_batch, num_valid=num_valid)
        micro_batches.append(micro_batch)
    return micro_batches
