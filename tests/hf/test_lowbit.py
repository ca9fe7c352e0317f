"""Low-bit optimizers and quantized layers of torchao are saved and loaded bit for bit."""

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import CheckpointError
from faccel.testing import fake_context, simulate

pytest.importorskip("torchao", reason="torchao is not installed")
ONE = fake_context(0, 1)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def eager():
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def make(ctx, name):
    import torchao.optim

    torch.manual_seed(0)
    model = faccel.wrap(nn.Linear(128, 128), ctx)
    opt = getattr(torchao.optim, name)(model.parameters())
    return {"model": model, "opt": faccel.wrap_optimizer(opt, model, ctx)}


def step(state, ctx, seed):
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(seed))
    loss = state["model"](x).square().sum()
    scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(state["opt"], scaler, ctx)


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_a_low_bit_optimizer_resumes_with_equal_updates(tmp_path, name):
    state, other = make(ONE, name), make(ONE, name)
    step(state, ONE, 0)
    faccel.save(state, tmp_path, ONE, step=1)
    faccel.load(other, tmp_path, ONE)
    for run in (state, other):
        step(run, ONE, 1)
    expected = state["model"].state_dict()
    assert all(torch.equal(x, expected[key]) for key, x in other["model"].state_dict().items())


def test_sharded_low_bit_states_are_refused_by_the_save(tmp_path):
    def run(ctx):
        state = make(ctx, "AdamW8bit")
        step(state, ctx, 0)
        with pytest.raises(CheckpointError, match="shards are of class OptimState8bit"):
            faccel.save(state, tmp_path, ctx, step=1)

    simulate(run, 2, mesh="dp_shard=2")


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_a_quantized_layer_comes_back(tmp_path, name):
    import torchao.quantization as ao

    nets = [nn.Linear(128, 128) for _ in range(2)]
    for net in nets:
        ao.quantize_(net, getattr(ao, name)())
    expected = nets[0].weight.dequantize()
    faccel.save({"net": nets[0]}, tmp_path, ONE, step=1)
    faccel.load({"net": nets[1]}, tmp_path, ONE)
    assert torch.equal(nets[1].weight.dequantize(), expected)
