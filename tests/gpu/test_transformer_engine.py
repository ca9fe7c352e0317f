"""fp8 by Transformer Engine on the device, beside its layers in plain PyTorch."""

import importlib
import importlib.util

import pytest
import torch

import faccel
from faccel.parallel import Fp8, TransformerEngineConfig
from tests.gpu.plain import CLIP_NORM, STEPS, assert_same, sgd
from tests.gpu.world_of_one import world_of_one

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="transformer_engine is not installed",
)

OPTIONS = {
    "tensorwise": Fp8(backend="te"),
    "tensorwise, e4m3": Fp8(backend="te", te=TransformerEngineConfig(format="e4m3")),
    "delayed": Fp8(
        backend="te",
        recipe="delayed",
        te=TransformerEngineConfig(margin=1, amax_history=4, amax="most_recent"),
    ),
    "mxfp8": Fp8(backend="te", recipe="mxfp8"),
}


def plain_recipe(name):
    module = importlib.import_module("transformer_engine.common.recipe")
    if name == "mxfp8":
        return module.MXFP8BlockScaling()
    if name == "delayed":
        return module.DelayedScaling(
            margin=1, amax_history_len=4, amax_compute_algo="most_recent", reduce_amax=False
        )
    formats = {"tensorwise": module.Format.HYBRID, "tensorwise, e4m3": module.Format.E4M3}
    return module.Float8CurrentScaling(fp8_format=formats[name])


def make_net(device=None):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    return net.to(device)


def batches(device):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(64, 64, generator=generator).to(device) for _ in range(STEPS)]


def plain_training(device, name):
    """Train with the library's layers in the place of the linear layers."""
    engine = importlib.import_module("transformer_engine.pytorch")
    net = make_net(device)
    for index in (0, 2):
        layer = net[index]
        net[index] = engine.Linear(layer.in_features, layer.out_features, device=device)
        net[index].load_state_dict(layer.state_dict(), strict=False)
    recipe = plain_recipe(name)
    opt = sgd(net)
    losses, norms = [], []
    for rows in batches(device):
        with torch.autocast(device.type, torch.bfloat16), engine.autocast(recipe=recipe):
            out = net(rows)
        loss = (out.float() - rows).square().mean()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP_NORM))
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
    return losses, list(net.parameters()), norms


def training(ctx, name):
    plan = faccel.Plan(units=("0", "2"), fp8=OPTIONS[name])
    net = faccel.wrap(make_net(), ctx, plan=plan)
    assert "TransformerEngineLinear" in str(faccel.unwrap(net))
    opt = faccel.wrap_optimizer(sgd(net), net, ctx)
    scaler = faccel.init_scaler(ctx)
    losses, norms = [], []
    for rows in batches(ctx.device):
        loss = (net(rows) - rows).square().mean()
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=CLIP_NORM)
        losses.append(loss.detach())
        norms.append(info.grad_norm)
    return losses, list(net.parameters()), norms


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("strategy", ["single", "ddp", "sharded"])
def test_training_equals_plain_transformer_engine(cuda, strategy, name):
    if name == "mxfp8" and torch.cuda.get_device_capability(cuda) < (10, 0):
        pytest.skip("the device does not have MXFP8")
    with world_of_one(cuda, strategy, mixed_precision="fp8") as ctx:
        actual = training(ctx, name)
    # Atomic operations of a GPU round differently in each run, and fp8 has 3 bits of a mantissa.
    assert_same(actual, plain_training(cuda, name), 1e-2)
