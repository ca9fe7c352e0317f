"""Models of transformers as they are, under every strategy: what they learn is what one process learns."""

import pytest
import torch

import faccel
from faccel.testing import simulate
from tests.hf.models import assert_trained_alike, build, train

# torch's own advice: what tensor parallel returns is a view, on which autograd refuses in-place operations
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module", "ignore:While redistributing")

DATA = ["dp_replicate=2", "dp_shard=2", "dp_replicate=2,dp_shard=2"]


def size_of(mesh):
    return faccel.MeshSpec.of(mesh).size


def run(ctx, name, options=None):
    net = build(name)
    plan = faccel.plan_for(net, ctx) if options is None else faccel.Plan(**options)
    return train(ctx, net, name, plan)


@pytest.mark.parametrize("mesh", DATA)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_model_of_transformers_trains_as_on_one_process(name, mesh):
    (one,) = simulate(run, 1, name)
    for ours in simulate(run, size_of(mesh), name, mesh=mesh):
        assert_trained_alike(ours, one)
        assert type(ours.out) is type(one.out)
        assert ours.out.logits.dtype == torch.float64
