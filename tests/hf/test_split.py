"""`split` of a dataset of Hugging Face: the rows that a list would have."""

import pytest

import faccel
from faccel.testing import fake_context

datasets = pytest.importorskip("datasets", reason="datasets is not installed")


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_rows", [1, 6, 7])
def test_a_dataset_is_split_as_a_list(num_rows, world_size, pad):
    rows = list(range(num_rows))
    dataset = datasets.Dataset.from_dict({"x": rows})
    for rank in range(world_size):
        ctx = fake_context(rank, world_size)
        part = faccel.split(dataset, ctx, pad=pad)
        assert isinstance(part, datasets.Dataset)
        assert list(part["x"]) == faccel.split(rows, ctx, pad=pad)
