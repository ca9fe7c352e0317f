"""Runs of elements as parts of a tensor: every run of every small shape."""

import itertools
import math

import pytest
import torch

from faccel.errors import ModelError
from faccel.flat_shard import FlatShard, boxes

SHAPES = [(), (1,), (5,), (4, 3), (1, 5, 1), (2, 3, 4), (3, 1, 2), (2, 2, 2, 2)]


def runs(shape):
    count = math.prod(shape)
    return [
        (first, last - first)
        for first, last in itertools.combinations_with_replacement(range(count + 1), 2)
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_boxes_of_a_run_are_its_elements_in_order_and_few(shape):
    flat = torch.arange(math.prod(shape))
    for first, count in runs(shape):
        found = boxes(shape, first, count)
        assert len(found) <= max(1, 2 * len(shape) - 1)
        cut = [
            tuple(slice(at, at + n) for at, n in zip(box.offsets, box.sizes, strict=True))
            for box in found
        ]
        parts = [flat.reshape(shape)[where].reshape(-1) for where in cut]
        assert torch.equal(torch.cat([*parts, flat[:0]]), flat[first : first + count])
        assert [box.start for box in found] == list(itertools.accumulate([0, *map(len, parts)]))[
            : len(found)
        ]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shard_gives_and_takes_its_elements_and_nothing_else_can_be_computed(shape):
    flat = torch.arange(float(math.prod(shape)))
    for first, count in runs(shape):
        part = flat[first : first + count].clone()
        shard = FlatShard(shape, part, first, lambda x: x)
        assert (shard.shape, shard.dtype, shard.ndim) == (
            flat.reshape(shape).shape,
            torch.float32,
            len(shape),
        )
        whole = torch.where(
            (torch.arange(len(flat)) >= first) & (torch.arange(len(flat)) < first + count),
            flat,
            0.0,
        )
        assert torch.equal(shard.full_tensor(), whole.reshape(shape))
        shard.detach().assign(flat.reshape(shape) + 1)
        assert torch.equal(part, flat[first : first + count] + 1)
    with pytest.raises(ModelError, match="full_tensor"):
        _ = shard + 1
