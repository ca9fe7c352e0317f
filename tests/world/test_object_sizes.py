"""Objects are sent with the elements of their tensors, and not with the memory around them."""

import pytest
import torch
from torch import nn

import faccel
from faccel.testing import simulate

NUM_ROWS = 100_000  # of 16 bytes


def gathered(obj, ctx):
    return faccel.gather_objects(obj, ctx)[1]


def broadcast(obj, ctx):
    return faccel.broadcast_objects([obj], ctx, src=1)[0]


def scattered(obj, ctx):
    return faccel.comm.scatter_objects([obj, obj], ctx, src=1)


def row(data):
    return data[7]


def slice_with_grad(data):
    return data.requires_grad_()[3:5]


def transposed_rows(data):
    return {"x": [data[:2].T], "label": 3}


def expanded(data):
    return data[0].clone().expand(5, 4)


def param(data):
    return nn.Parameter(data[:3].clone())


@pytest.mark.parametrize("send", [gathered, broadcast, scattered])
@pytest.mark.parametrize("make", [row, slice_with_grad, transposed_rows, expanded, param])
def test_a_view_is_sent_without_the_rest_of_its_memory(send, make):
    def run(ctx):
        data = torch.arange(4.0 * NUM_ROWS).reshape(NUM_ROWS, 4)
        obj = make(data)
        out = send(obj, ctx)
        expected = make(torch.arange(4.0 * NUM_ROWS).reshape(NUM_ROWS, 4))
        tensor, expected = (x["x"][0] if isinstance(x, dict) else x for x in (out, expected))
        assert type(tensor) is type(expected)
        assert torch.equal(tensor, expected)
        assert tensor.requires_grad == expected.requires_grad
        assert tensor.untyped_storage().nbytes() <= expected.nbytes

    trace = simulate(run, 2).trace
    sent = max(event.num_bytes for event in trace)
    assert sent < 4096, sent


def test_one_tensor_in_two_places_stays_one():
    def run(ctx):
        view = torch.zeros(100, 2)[:1]
        pair = faccel.gather_objects((view, view), ctx)[1]
        assert pair[0] is pair[1]

    simulate(run, 2)
