"""`split`: slices of lists, tuples, tensors and dicts."""

import itertools

import pytest
import torch

import faccel
from faccel.errors import DataError
from faccel.testing import fake_context


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("make", [list, tuple, torch.tensor])
def test_slices_are_contiguous_in_order_and_even(make, pad):
    for n, w in itertools.product(range(12), range(1, 6)):
        items = make(list(range(n)))
        slices = [faccel.split(items, fake_context(r, w), pad=pad) for r in range(w)]
        lengths = [len(p) for p in slices]
        assert max(lengths) - min(lengths) <= (0 if pad else 1)
        if n:
            assert all(type(p) is type(items) for p in slices)
        seen = [int(x) for r, p in enumerate(slices) for x in list(p)[: n // w + (r < n % w)]]
        assert seen == list(range(n))
        assert len(items) == n


def test_dicts_are_split_by_value_and_not_changed():
    xs = {"a": [1, 2, 3], "b": torch.arange(3)}
    out = faccel.split(xs, fake_context(1, 2))
    assert (out["a"], out["b"].tolist()) == ([3], [2])
    assert xs["a"] == [1, 2, 3]
    with pytest.raises(DataError, match="same length"):
        faccel.split({"a": [1], "b": [1, 2]}, fake_context(0, 2))
    with pytest.raises(DataError, match="set"):
        faccel.split({1, 2}, fake_context(0, 2))
