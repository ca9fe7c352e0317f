"""`FlatShard` and `split_range`: every range of elements of every small shape."""

import itertools
import math

import pytest
import torch

from faccel.errors import ModelError
from faccel.flat_shard import FlatShard, split_range

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
