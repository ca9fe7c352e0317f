"""Adapters next to frozen weights that torchao has quantized."""

import pytest
import torch
from torch import nn

import faccel
from faccel.testing import simulate

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")
BATCH = 8


class Adapted(nn.Module):
    """A frozen layer of int8, and an adapter of rank 4."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(64, 64).requires_grad_(False)
        self.down, self.up = nn.Linear(64, 4, bias=False), nn.Linear(4, 64, bias=False)
        config = quantization.Int8WeightOnlyConfig(version=2)
        quantization.quantize_(self, config, lambda module, name: name == "base")

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def batch(step):
    return torch.randn(BATCH, 64, generator=torch.Generator().manual_seed(step))


def train_one_process():
    net = Adapted(seed=0)
    opt = torch.optim.SGD([net.down.weight, net.up.weight], lr=0.1)
    for step in range(3):
        net(batch(step)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return net(batch(9)).detach()


def train(ctx):
    model = faccel.wrap(Adapted(seed=ctx.rank), ctx)
    opt = torch.optim.SGD([model.module.down.weight, model.module.up.weight], lr=0.1)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler = faccel.init_scaler(ctx)
    for step in range(3):
        x = batch(step).chunk(ctx.data_world_size)[ctx.data_rank]
        scaler = faccel.scaled_backward(model(x).square().mean(), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    return model(batch(9)).detach()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_adapter_trains_as_on_one_process(world_size):
    expected = train_one_process()
    for output in simulate(train, world_size):
        assert torch.allclose(output, expected, rtol=0, atol=1e-6)


def test_a_frozen_quantized_model_has_the_values_of_rank_0():
    def outputs(ctx):
        model = faccel.wrap(Adapted(seed=ctx.rank).requires_grad_(False), ctx)
        return model(batch(0))

    expected = Adapted(seed=0)(batch(0))
    assert all(torch.equal(output, expected) for output in simulate(outputs, 2))


def test_weights_of_int8_that_differ_between_replicas_are_found():
    def fn(ctx):
        model = faccel.wrap(Adapted(seed=0), ctx)
        if ctx.rank:
            model.module.base.weight.qdata.add_(1)
        opt = torch.optim.SGD([model.module.up.weight], lr=0.1)
        opt = faccel.wrap_optimizer(opt, model, ctx)
        scaler = faccel.init_scaler(ctx)
        scaler = faccel.scaled_backward(model(batch(0)).sum(), scaler, ctx)
        with pytest.raises(faccel.errors.ModelError, match=r"replicas differ.*`base.weight.qdata`"):
            faccel.optimizer_step(opt, scaler, ctx)

    simulate(fn, 2)


@pytest.mark.parametrize("mesh", ["dp_shard=2", "tp=2"])
def test_weights_of_int8_are_not_sharded(mesh):
    plan = faccel.Plan(tensor={"down": "colwise", "up": "rowwise"} if mesh == "tp=2" else {})

    def fn(ctx):
        with pytest.raises(faccel.errors.ModelError, match=r"`base.weight` is quantized"):
            faccel.wrap(Adapted(seed=0), ctx, plan=plan)

    simulate(fn, 2, mesh=mesh)
