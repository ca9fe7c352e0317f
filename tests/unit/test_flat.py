"""`FlatShard` and `split_range`: every range of elements of every small shape."""

import itertools
import math

import pytest
import torch

from faccel.errors import ModelError
from faccel.flat_shard import Block, FlatShard, split_range

SHAPES = [(), (1,), (5,), (4, 3), (1, 5, 1), (2, 3, 4), (3, 1, 2), (2, 2, 2, 2)]


def ranges(shape):
    """Return `(start, count)` of every range of elements, including empty ones."""
    bounds = itertools.combinations_with_replacement(range(math.prod(shape) + 1), 2)
    return [(start, stop - start) for start, stop in bounds]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_chunks_of_a_range_contain_its_elements_in_order(shape):
    flat = torch.arange(math.prod(shape))
    for start, count in ranges(shape):
        chunks = split_range(shape, start, count)
        assert len(chunks) <= max(1, 2 * len(shape) - 1)
        elements = []
        for chunk in chunks:
            bounds = zip(chunk.offsets, chunk.sizes, strict=True)
            index = tuple(slice(offset, offset + size) for offset, size in bounds)
            elements.append(flat.reshape(shape)[index].reshape(-1))
        assert torch.equal(torch.cat([*elements, flat[:0]]), flat[start : start + count])
        positions = list(itertools.accumulate([0, *map(len, elements)]))
        assert [chunk.position for chunk in chunks] == positions[: len(chunks)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shard_reads_and_writes_its_range_of_elements(shape):
    flat = torch.arange(float(math.prod(shape)))
    for start, count in ranges(shape):
        local_tensor = flat[start : start + count].clone()
        shard = FlatShard(shape, local_tensor, start, lambda x: x)
        assert (shard.shape, shard.dtype, shard.ndim) == (shape, torch.float32, len(shape))
        assert shard.to_local() is local_tensor
        index = torch.arange(len(flat))
        expected = torch.where((index >= start) & (index < start + count), flat, 0.0)
        assert torch.equal(shard.full_tensor(), expected.reshape(shape))
        shard.detach().assign(flat.reshape(shape) + 1)
        assert torch.equal(local_tensor, flat[start : start + count] + 1)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_range_of_blocks_reads_and_writes_its_elements_of_the_full_tensor(rank, dim):
    """Two matrices of `[2, 4]` in one of `[4, 4]`, each cut over 2 ranks along `dim`."""
    full = torch.arange(16.0).reshape(4, 4)
    sizes = (2, 2) if dim else (1, 4)
    blocks, local = [], []
    for first_row in (0, 2):
        offsets = (first_row, 2 * rank) if dim else (first_row + rank, 0)
        blocks.append(Block(offsets, sizes))
        local.append(full.narrow(0, offsets[0], sizes[0]).narrow(1, offsets[1], sizes[1]))
    flat = torch.cat([block.reshape(-1) for block in local])
    for start, count in ranges((len(flat),)):
        elements = flat[start : start + count]
        shard = FlatShard((4, 4), elements.clone(), start, lambda x: x, None, blocks)
        expected = torch.where(torch.isin(full, elements), full, 0.0)
        assert torch.equal(shard.full_tensor(), expected)
        shard.detach().assign(full + 1)
        assert torch.equal(shard.to_local(), elements + 1)
        items = shard.__create_write_items__("x", shard)
        stored = [shard.__get_tensor_shard__(item.index).reshape(-1) for item in items]
        assert torch.equal(torch.cat([*stored, flat[:0]]), elements + 1)


def test_empty_like_returns_a_shard_of_the_same_range_and_another_dtype():
    shard = FlatShard((4, 3), torch.zeros(5), 2, lambda x: x)
    empty = torch.empty_like(shard, dtype=torch.float64)
    assert isinstance(empty, FlatShard)
    assert (empty.shape, empty.start, empty.dtype) == ((4, 3), 2, torch.float64)
    assert (empty.to_local().shape, empty.to_local().dtype) == ((5,), torch.float64)


def test_every_other_operator_raises():
    shard = FlatShard((4, 3), torch.zeros(5), 2, lambda x: x)
    with pytest.raises(ModelError, match="full_tensor"):
        _ = shard + 1
