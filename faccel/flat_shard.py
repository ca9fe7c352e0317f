"""A tensor of which each rank stores a contiguous range of elements, in row-major order.

DeepSpeed flattens all parameters into one buffer and gives each rank a slice of it, so a shard is
in general not a slice along one dim, as a DTensor's shards are. Megatron does so with the blocks of
a tensor that tensor parallel gives a rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch

from faccel.errors import ModelError

if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem


@attrs.frozen
class Chunk:
    """A hyperrectangle of a tensor, the unit that `torch.distributed.checkpoint` stores.

    Args:
        offsets: Index of its first element, one number per dim.
        sizes: Its size in each dim.
        position: Index of its first element in the range that was split.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    position: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index of its elements in the full tensor."""
        slices: list[slice] = []
        for offset, size in zip(self.offsets, self.sizes, strict=True):
            slices.append(slice(offset, offset + size))
        return tuple(slices)


def split_range(shape: Sequence[int], start: int, count: int) -> list[Chunk]:
    """Split a range of elements, in row-major order, into hyperrectangles.

    Effects: pure. At most `2 * len(shape) - 1` chunks, in the order of the elements.

    Args:
        shape: Shape of the tensor.
        start: Flat index of the first element.
        count: Number of elements.

    Examples:
        >>> [(chunk.offsets, chunk.sizes) for chunk in split_range((4, 3), 2, 8)]
        [((0, 2), (1, 1)), ((1, 0), (2, 3)), ((3, 0), (1, 1))]
    """
    # Greedy: each chunk is the largest block of rows that starts at `position`. The blocks first
    # grow, up to `ndim` of them, then shrink, at most `ndim - 1`: together `2 * ndim - 1`.
    chunks: list[Chunk] = []
    position = 0
    while position < count:
        index = start + position
        remaining = count - position
        dim = _outermost_dim(shape, index, remaining)
        row_size = math.prod(shape[dim + 1 :])
        offsets = _unravel(index, shape)
        # one index in each dim before `dim`, all of each dim after it
        sizes = [1] * dim + list(shape[dim:])
        num_rows = 1
        if shape:  # a 0-d tensor has one element and no dim to count rows in
            # limited by the range and by the end of `dim`, where the dim before it advances
            num_rows = min(remaining // row_size, shape[dim] - offsets[dim])
            sizes[dim] = num_rows
        chunks.append(Chunk(offsets, tuple(sizes), position))
        position += num_rows * row_size
    return chunks


@attrs.frozen
class Block:
    """A hyperrectangle of a tensor; the elements of several blocks follow one another.

    Args:
        offsets: Index of its first element, one number per dim.
        sizes: Its size in each dim.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)


def split_blocks(blocks: Sequence[Block], start: int, count: int) -> list[Chunk]:
    """Split a range of the elements of several blocks into hyperrectangles of the full tensor.

    Effects: pure.

    Args:
        blocks: The blocks, each with its elements in row-major order.
        start: Index of the first element, counted through all blocks.
        count: Number of elements.

    Examples:
        >>> halves = [Block((0, 0), (1, 3)), Block((4, 0), (1, 3))]
        >>> [(chunk.offsets, chunk.sizes) for chunk in split_blocks(halves, 1, 5)]
        [((0, 1), (1, 2)), ((4, 0), (1, 3))]
    """
    chunks: list[Chunk] = []
    block_start = 0
    for block in blocks:
        first = max(start, block_start)
        last = min(start + count, block_start + block.numel)
        for chunk in split_range(block.sizes, first - block_start, last - first):
            offsets = tuple(a + b for a, b in zip(block.offsets, chunk.offsets, strict=True))
            chunks.append(Chunk(offsets, chunk.sizes, first - start + chunk.position))
        block_start += block.numel
    return chunks


def _unravel(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the index in each dim of flat index `index`, as `numpy.unravel_index` does."""
    offsets: list[int] = []
    for dim_size in reversed(shape):
        index, offset = divmod(index, dim_size)
        offsets.append(offset)
    return tuple(reversed(offsets))


def _outermost_dim(shape: Sequence[int], index: int, remaining: int) -> int:
    """Return the first dim along which a chunk from flat index `index` can have several rows."""
    for dim in range(len(shape)):
        row_size = math.prod(shape[dim + 1 :])
        # A block begins at the start of a row and has at least one full row. The last dim always
        # qualifies, because its rows are single elements.
        if index % row_size == 0 and remaining >= row_size:
            return dim
    return 0  # a 0-d tensor


class FlatShard(torch.Tensor):
    """A tensor of which this rank stores a contiguous range of elements, in row-major order.

    It has the shape and dtype of the full tensor, and aliases `local_tensor`.
    `torch.distributed.checkpoint` can save and load it. `to_local` and `full_tensor` work as in a
    DTensor. `detach` and `empty_like` return a `FlatShard`; every other operator raises.

    Args:
        shape: Shape of the full tensor.
        local_tensor: `T[count]`, this rank's elements.
        start: Flat index of the first of them in the full tensor, or in `blocks`.
        all_reduce: `all_reduce(x)` returns the sum of every rank's `x`; collective.
        param: The parameter that it is a shard of; the same object under each of its tied names.
        blocks: The part of the full tensor that the ranks share of which this is one; None is the
            full tensor.
    """

    local_tensor: torch.Tensor
    start: int
    all_reduce: Callable[[torch.Tensor], torch.Tensor]
    param: object
    blocks: Sequence[Block]

    @staticmethod
    def __new__(
        cls: type[FlatShard],
        shape: Sequence[int],
        local_tensor: torch.Tensor,
        start: int,
        all_reduce: Callable[[torch.Tensor], torch.Tensor],
        param: object = None,
        blocks: Sequence[Block] | None = None,
    ) -> FlatShard:
        # A wrapper subclass has a shape and no storage; every operator goes to
        # `__torch_dispatch__`.
        shard = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, tuple(shape), dtype=local_tensor.dtype, device=local_tensor.device
        )
        shard.local_tensor = local_tensor
        shard.start = start
        shard.all_reduce = all_reduce
        shard.param = param
        shard.blocks = blocks or (Block((0,) * len(shape), tuple(shape)),)
        return shard

    @classmethod
    def __torch_dispatch__(
        cls,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        # The two operators that `faccel.checkpoint` calls on the tensors of a state. Neither reads
        # elements of other ranks. Any other would compute with a part of the tensor and return a
        # wrong result, so it raises.
        if args and isinstance(args[0], FlatShard):
            if func is torch.ops.aten.detach.default:
                return args[0].with_local(args[0].local_tensor)
            if func is torch.ops.aten.empty_like.default:
                return args[0].with_local(func(args[0].local_tensor, **(kwargs or {})))
        raise ModelError(
            f"`{func}` cannot compute with a `FlatShard`",
            got="a tensor of which this rank stores only a range of elements",
            fix="call `.full_tensor()` on every rank first",
        )

    def __repr__(self, **kwargs: object) -> str:
        count = self.local_tensor.numel()
        return f"FlatShard({list(self.shape)}, {self.dtype}, {count} elements from {self.start})"

    def with_local(self, local_tensor: torch.Tensor) -> FlatShard:
        """Return a tensor of the same layout with other elements, `T[count]`, which it aliases."""
        return FlatShard(
            self.shape, local_tensor, self.start, self.all_reduce, self.param, self.blocks
        )

    def to_local(self) -> torch.Tensor:
        """Return this rank's elements, `T[count]`; aliases the tensor."""
        return self.local_tensor

    def full_tensor(self) -> torch.Tensor:
        """Return the full tensor on every rank; a copy. Collective."""
        # A sum and not an all-gather, which needs as many elements from each rank. The ranges are
        # disjoint, so each element is the sum of one value and zeros, which is exact.
        full = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for chunk in self._chunks():
            full[chunk.slices].copy_(self._local_chunk(chunk))
        return self.all_reduce(full)

    def assign(self, value: torch.Tensor) -> None:
        """Copy this rank's elements of a full tensor, or of a shard of the same layout."""
        if isinstance(value, FlatShard):
            self.local_tensor.copy_(value.local_tensor)
            return
        for chunk in self._chunks():
            self._local_chunk(chunk).copy_(value[chunk.slices])

    def _local_chunk(self, chunk: Chunk) -> torch.Tensor:
        """Return the elements of a chunk, which alias the shard."""
        count = math.prod(chunk.sizes)
        return self.local_tensor[chunk.position : chunk.position + count].view(chunk.sizes)

    def _chunks(self) -> list[Chunk]:
        return split_blocks(self.blocks, self.start, self.local_tensor.numel())

    # The three methods by which torch.distributed.checkpoint (`planner_helpers.py`) asks a tensor
    # subclass for its shards. A range of elements is up to `2 * ndim - 1` chunks.

    def __create_write_items__(self, fqn: str, tensor: object) -> list[WriteItem]:
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.dtype)
        items: list[WriteItem] = []
        for chunk in self._chunks():
            index = MetadataIndex(fqn, torch.Size(chunk.offsets))
            data = TensorWriteData(_storage_metadata(chunk), properties, self.shape)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_storage_metadata(chunk) for chunk in self._chunks()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        # The index is one that `__create_write_items__` or `__create_chunk_list__` has returned.
        by_offset = {torch.Size(chunk.offsets): chunk for chunk in self._chunks()}
        assert index.offset is not None
        # A view and not a copy: a load writes into it.
        return self._local_chunk(by_offset[index.offset])


def _storage_metadata(chunk: Chunk) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
