"""`collate_in_process` returns and raises what PyTorch's `default_collate` does."""

import collections

import pytest
import torch
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from faccel.data.collate import collate_in_process

JAGGED = [torch.ones(2), torch.ones(3)]
Pair = collections.namedtuple("Pair", "x y")


class Subclass(torch.Tensor):
    pass


def tensors(*shape, dtype=torch.float32, count=3):
    return [torch.arange(i, i + 6).to(dtype)[: shape[0]].reshape(shape) for i in range(count)]


CASES = {
    "tuples": list(zip(tensors(4), tensors(2, dtype=torch.int64), strict=True)),
    "one field": [(x,) for x in tensors(6)],
    "no field": [(), ()],
    "one sample": [(torch.ones(2), torch.tensor(3))],
    "0-d": [(torch.tensor(1), torch.tensor(2.0)), (torch.tensor(3), torch.tensor(4.0))],
    "bfloat16": [(x,) for x in tensors(4, dtype=torch.bfloat16)],
    "complex": [(x,) for x in tensors(4, dtype=torch.complex64)],
    "mixed dtypes": [(torch.ones(2),), (torch.ones(2, dtype=torch.float64),)],
    "tensors": tensors(4),
    "lists": [[x, y] for x, y in zip(tensors(4), tensors(2), strict=True)],
    "named tuples": [Pair(x, y) for x, y in zip(tensors(4), tensors(2), strict=True)],
    "dicts": [{"x": x} for x in tensors(4)],
    "numbers": [(x, 1) for x in tensors(4)],
    "a tensor and a number": [(torch.tensor(1.0),), (2.0,)],
    "texts": [(x, "a") for x in tensors(4)],
    "nested": [((x, y), x) for x, y in zip(tensors(4), tensors(2), strict=True)],
    "gradients": [(x.requires_grad_(),) for x in tensors(4)],
    "subclass": [(x.as_subclass(Subclass),) for x in tensors(4)],
    "parameters": [(torch.nn.Parameter(x),) for x in tensors(4)],
    "other shapes": [(torch.ones(2),), (torch.ones(3),)],
    "other lengths": [(torch.ones(2),), (torch.ones(2), torch.ones(2))],
    "sparse": [(x.to_sparse(),) for x in tensors(4)],
    "nested tensors": [(torch.nested.nested_tensor(JAGGED, layout=torch.jagged),)] * 2,
    "None": [(x, None) for x in tensors(4)],
    "no samples": [],
}


def outcome(fn, samples):
    try:
        return fn(samples)
    except Exception as error:
        return type(error), str(error)


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.requires_grad == b.requires_grad
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        same(list(a.items()), list(b.items()))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            same(left, right)
    else:
        assert a == b


@pytest.mark.parametrize("name", CASES)
def test_it_is_default_collate(name):
    samples = CASES[name]
    same(outcome(collate_in_process, samples), outcome(default_collate, samples))


def test_a_function_that_the_user_registered_for_tensors_is_called(monkeypatch):
    monkeypatch.setitem(default_collate_fn_map, torch.Tensor, lambda batch, **_: len(batch))
    assert collate_in_process(CASES["tuples"]) == [3, 3]
