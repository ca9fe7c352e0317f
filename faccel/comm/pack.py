"""Tensors of any shapes and dtypes as one row of bytes, so that one collective sends them all."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch.nn.functional import pad

from faccel.context import DistContext
from faccel.errors import ConfigError, short_repr

# Bytes: the size of complex128, the widest dtype. Rows of a multiple of it can be stacked, and each
# leaf still begins at a multiple of its item size, which `view(dtype)` requires.
_ALIGNMENT = 16


def describe(leaves: Sequence[torch.Tensor]) -> str:
    """Return shapes and dtypes, for messages.

    Effects: pure.

    Examples:
        >>> describe([torch.zeros(2, 3), torch.tensor(True)])
        'float32[2, 3], bool[]'
    """
    names: list[str] = []
    for leaf in leaves:
        dtype = str(leaf.dtype).removeprefix("torch.")
        names.append(f"{dtype}{list(leaf.shape)}")
    return ", ".join(names)


# Numbers for `digest`. A set, because some dtypes have two names (`torch.half`, `torch.float16`);
# sorted, because all processes need the same numbers.
_ALL_DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_DTYPE_NUMBERS = {dtype: i for i, dtype in enumerate(sorted(_ALL_DTYPES, key=str))}


def digest(leaves: Sequence[torch.Tensor]) -> int:
    """Return a hash of dtypes and shapes: rows of the same length may hold different tensors.

    Effects: pure.
    """
    # Python's hash of integers is the same in every process, that of strings is not.
    return hash(tuple((_DTYPE_NUMBERS[leaf.dtype], *leaf.shape) for leaf in leaves))


def pad_to(
    tensor: torch.Tensor, size: int, *, dim: int = 0, value: float = 0, first: bool = False
) -> torch.Tensor:
    """Return a copy of `tensor` whose dimension `dim` is filled up to `size`.

    Effects: pure.

    Args:
        tensor: `T[...]`, at most `size` along `dim`.
        size: Its new extent.
        dim: Which dimension; a negative one counts from the last.
        value: The value of the new elements.
        first: Whether to fill at the beginning instead of the end.

    Examples:
        >>> pad_to(torch.ones(2), 3)
        tensor([1., 1., 0.])
    """
    num_missing = size - tensor.shape[dim]
    if num_missing == 0:
        return tensor.clone()
    # `pad` takes the widths (before, after) of each dimension, beginning with the last one
    widths = [0, 0] * (tensor.ndim - 1 - dim % tensor.ndim)
    widths += [num_missing, 0] if first else [0, num_missing]
    return pad(tensor, widths, value=value)


@attrs.frozen(eq=False)
class Packed:
    """Leaves as one row of bytes, widest dtype first, so that every leaf is aligned.

    Args:
        row: `uint8[num_bytes]`, or `uint8[num_rows, num_bytes]`.
        offsets: Where each leaf begins, in bytes, in the order of the leaves.
        shapes: The shape of each leaf.
        dtypes: The dtype of each leaf.
    """

    row: torch.Tensor
    offsets: list[int]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]

    def read(self, rows: torch.Tensor, leaf: int) -> torch.Tensor:
        """Return leaf number `leaf` of each of `rows: uint8[w, num_bytes]`.

        Returns:
            `T[w, ...]`, a view if possible.
        """
        start = self.offsets[leaf]
        dtype, shape = self.dtypes[leaf], self.shapes[leaf]
        end = start + shape.numel() * dtype.itemsize
        # Rows without bytes have stride 1, and `view(dtype)` raises for that.
        if start == end:
            return rows.new_empty((rows.shape[0], *shape), dtype=dtype)
        return rows[:, start:end].view(dtype).reshape(rows.shape[0], *shape)

    def read_copies(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return copies `T[w, ...]` of all leaves of `rows: uint8[w, num_bytes]`.

        Much faster than `read` for each leaf, and no result keeps the bytes of the others alive.
        """
        by_offset = sorted(range(len(self.offsets)), key=self.offsets.__getitem__)
        sizes = [self.shapes[i].numel() * self.dtypes[i].itemsize for i in by_offset]
        sizes.append(rows.shape[1] - sum(sizes))  # the padding at the end
        # One call for all leaves: for a small leaf the calls take longer than the copies.
        # Ignored: PyTorch's stub has only the overload with `out`, which returns None.
        pieces: list[torch.Tensor] = torch.split_with_sizes_copy(rows, sizes, 1)  # type: ignore
        copies: list[torch.Tensor] = [rows] * len(by_offset)
        for piece, i in zip(pieces, by_offset, strict=False):
            shape = (rows.shape[0], *self.shapes[i])
            if piece.numel():
                copies[i] = piece.view(self.dtypes[i]).view(shape)
            else:  # `view(dtype)` raises for a dimension of size 0
                copies[i] = rows.new_empty(shape, dtype=self.dtypes[i])
        return copies


def pack(leaves: Sequence[torch.Tensor], *, num_rows: int | None = None) -> Packed:
    """Copy contiguous tensors of one device into one row of bytes.

    Effects: pure.

    Args:
        leaves: The tensors `T[...]`; with `num_rows` each is `T[num_rows, ...]`.
        num_rows: Makes `row` a `uint8[num_rows, num_bytes]`; `shapes` are then those of one row.
    """
    batch = () if num_rows is None else (num_rows,)
    shapes = [leaf.shape[len(batch) :] for leaf in leaves]
    # Item sizes are powers of 2. In descending order each leaf ends at a multiple of the next item
    # size, so no padding is needed between leaves. The sort is stable: equal on every rank.
    widest_first = sorted(range(len(leaves)), key=lambda i: -leaves[i].dtype.itemsize)
    offsets = [0] * len(leaves)
    end = 0
    pieces: list[torch.Tensor] = []
    for i in widest_first:
        offsets[i] = end
        num_elements = shapes[i].numel()
        end += num_elements * leaves[i].dtype.itemsize
        flat = leaves[i].reshape(*batch, num_elements)
        # A single element may have any stride, but `view(uint8)` needs 1. `contiguous()` would
        # return it unchanged, because strides of dimensions of size 1 do not count.
        if flat.stride(-1) != 1:
            flat = flat.clone(memory_format=torch.contiguous_format)
        pieces.append(flat.view(torch.uint8))
    if end % _ALIGNMENT:
        pieces.append(pieces[0].new_zeros(*batch, _ALIGNMENT - end % _ALIGNMENT))
    row = torch.cat(pieces, dim=-1) if pieces else torch.empty(0, dtype=torch.uint8)
    return Packed(row, offsets, shapes, [leaf.dtype for leaf in leaves])


def check_rank(name: str, rank: int, ctx: DistContext, axis: str) -> None:
    """Raise unless the argument `name` is a rank of the axis."""
    size = ctx.comm.size(axis)
    if 0 <= rank < size:
        return
    raise ConfigError(
        f"`{name}` must be a rank of the axis `{axis}`, from 0 to {size - 1}",
        got=f"{name}={short_repr(rank)}",
        fix=f"write `{name}=0`",
    )
