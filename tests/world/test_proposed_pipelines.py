"""A pipeline that `plan_for` proposes computes what the model does, or `plan_for` raises."""

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ModelError
from faccel.parallel import plan_for
from faccel.testing import fake_context, simulate
from tests.models import CharModel, model, tokens

CTX = fake_context(0, 2, mesh="pp=2")


class Chain(nn.Module):
    """Three linear layers, which `run(self, x)` calls."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


class Twice(nn.Module):
    """Returns two tensors, and takes one or two."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, y=None, scale=1.0):
        out = self.linear(x) * scale
        return (out, out + 1) if y is None else out * y


class Pairs(nn.Module):
    def __init__(self, scale):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.scale = Twice(), Twice(), scale

    def forward(self, x):
        out, shifted = self.first(x)
        return self.second(out, shifted, scale=self.scale)


GOOD = {
    "a chain": lambda: Chain(lambda self, x: self.c(self.b(self.a(x)))),
    "a tuple between two modules": lambda: Pairs(scale=1.0),
    "nn.Sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_proposed_pipeline_computes_what_the_model_does(name):
    x = torch.linspace(-1, 1, 24).reshape(6, 4)
    torch.manual_seed(1)
    expected = GOOD[name]()(x)

    def fn(ctx):
        torch.manual_seed(1)
        net = GOOD[name]()
        wrapped = faccel.wrap(net, ctx, plan=plan_for(net, ctx))
        with torch.no_grad():
            return wrapped(x)

    for output in simulate(fn, 2, mesh="pp=2"):
        assert torch.allclose(output, expected)


def test_a_proposed_pipeline_of_a_model_with_optional_arguments_computes_what_it_does():
    inputs = tokens(4)[:, :-1]

    def fn(ctx):
        net = model()
        wrapped = faccel.wrap(net, ctx, plan=plan_for(net, ctx))
        with torch.no_grad():
            return wrapped(inputs)

    for output in simulate(fn, 2, mesh="pp=2"):
        assert torch.allclose(output, model()(inputs))


BAD = {
    "another order": (
        lambda: Chain(lambda self, x: self.c(self.a(self.b(x)))),
        "`a` takes other inputs than the arguments of the model",
    ),
    "a residual": (
        lambda: Chain(lambda self, x: self.c(self.b(self.a(x)) + x)),
        "`c` takes other inputs than the output of `b`",
    ),
    "a repeated module": (
        lambda: Chain(lambda self, x: self.c(self.b(self.b(self.a(x))))),
        "forward calls `b` 2 times",
    ),
    "an unused module": (
        lambda: Chain(lambda self, x: self.c(self.a(x))),
        "forward calls `b` 0 times",
    ),
    "work before the first module": (
        lambda: Chain(lambda self, x: self.c(self.b(self.a(x / 2)))),
        "`a` takes other inputs than the arguments of the model",
    ),
    "work after the last module": (
        lambda: Chain(lambda self, x: self.c(self.b(self.a(x))).relu()),
        "forward returns something else than the output of `c`",
    ),
    "a dict": (
        lambda: Chain(lambda self, x: {"out": self.c(self.b(self.a(x)))}),
        "forward returns something else than the output of `c`",
    ),
    "a branch on values": (
        lambda: Chain(lambda self, x: self.a(x) if x.sum() > 0 else self.b(x)),
        "forward cannot be traced",
    ),
    "an option": (lambda: Pairs(scale=2.0), "`second` is called with scale=2.0"),
    "a short chain": (lambda: nn.Sequential(nn.Linear(4, 4)), "is too short for 2 stages"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_model_that_is_no_chain_raises_with_the_reason(name):
    make, reason = BAD[name]
    with torch.device("meta"):  # a trace needs no values
        net = make()
    with pytest.raises(ModelError, match="finds no pipeline for this model") as info:
        plan_for(net, CTX)
    assert reason in info.value.got


def test_a_model_on_meta_gets_the_plan_of_one_with_values():
    with torch.device("meta"):
        net = CharModel()
    assert plan_for(net, CTX) == plan_for(model(), CTX)
    assert plan_for(net, fake_context(0, 2, mesh="dp_shard=2")).pipeline is None
