"""Tensors of any shapes and dtypes as one row of bytes, so that one collective carries them all."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from faccel.context import DistContext
from faccel.errors import ConfigError

_ALIGNMENT = 16  # bytes; the widest dtype is complex128


def describe(leaves: Sequence[torch.Tensor]) -> str:
    """Return shapes and dtypes, for people."""
    return ", ".join(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" for x in leaves)


_DTYPES = {
    dtype: i
    for i, dtype in enumerate(
        sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)
    )
}


def digest(leaves: list[torch.Tensor]) -> int:
    """Return a number that says what a row holds: ranks whose rows are as long may still disagree about it."""
    return hash(
        tuple((_DTYPES[x.dtype], *x.shape) for x in leaves)
    )  # of ints alone: the same in every process


@attrs.frozen(eq=False)
class Packed:
    """Leaves as one row of bytes, widest dtype first, so that every leaf is aligned."""

    row: torch.Tensor  # uint8[num_bytes], or one row per rank
    offsets: list[int]  # of each leaf, in the order of the leaves
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]

    def read(self, rows: torch.Tensor, leaf: int) -> torch.Tensor:
        """Return leaf number `leaf` of each of `rows: uint8[w, num_bytes]` as `T[w, ...]`, a view where possible."""
        start = self.offsets[leaf]
        dtype, shape = self.dtypes[leaf], self.shapes[leaf]
        end = start + shape.numel() * dtype.itemsize
        if start == end:
            return rows.new_empty((rows.shape[0], *shape), dtype=dtype)
        return rows[:, start:end].view(dtype).reshape(rows.shape[0], *shape)


def pack(leaves: list[torch.Tensor], *, num_rows: int | None = None) -> Packed:
    """Pack contiguous tensors of one device; copies them.

    With `num_rows` each is `T[num_rows, ...]` and `row` is `uint8[num_rows, num_bytes]`; shapes are those of a row.
    """
    batch = () if num_rows is None else (num_rows,)
    shapes = [x.shape[len(batch) :] for x in leaves]
    order = sorted(range(len(leaves)), key=lambda i: -leaves[i].dtype.itemsize)
    offsets, end, parts = [0] * len(leaves), 0, list[torch.Tensor]()
    for i in order:
        offsets[i] = end
        num_elements = shapes[i].numel()
        end += num_elements * leaves[i].dtype.itemsize
        flat = leaves[i].reshape(*batch, num_elements)
        if flat.stride(-1) != 1:  # one element may have any stride, and `view` wants 1
            flat = flat.clone(memory_format=torch.contiguous_format)
        parts.append(flat.view(torch.uint8))
    if end % _ALIGNMENT:
        parts.append(parts[0].new_zeros(*batch, _ALIGNMENT - end % _ALIGNMENT))
    row = torch.cat(parts, dim=-1) if parts else torch.empty(0, dtype=torch.uint8)
    return Packed(row, offsets, shapes, [x.dtype for x in leaves])


def check_rank(src: int, ctx: DistContext, axis: str) -> None:
    """Refuse a `src` that is not a rank of the axis."""
    size = ctx.comm.size(axis)
    if not 0 <= src < size:
        raise ConfigError(
            f"`src` must be a rank of the axis `{axis}`", got=str(src), fix=f"use 0 to {size - 1}"
        )
