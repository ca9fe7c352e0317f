"""fp8 over gloo, which has no such type of numbers."""

import pytest
import torch
from torch import nn

import faccel
from tests.ranks import run_ranks

pytest.importorskip("torchao", reason="torchao is not installed")


def step(ctx):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    plan = faccel.Plan(units=("0",), fp8=faccel.parallel.Fp8(emulate=True))
    model = faccel.wrap(net, ctx, plan=plan)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    for _ in range(2):
        loss = model(torch.ones(4, 32)).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
    return loss.item()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_units_of_weights_in_fp8_are_gathered():
    losses = [
        run_ranks(step, 2, mesh=mesh, mixed_precision="fp8")
        for mesh in ("dp_replicate=2", "dp_shard=2")
    ]
    assert losses[0] == losses[1]
