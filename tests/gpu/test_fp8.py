"""fp8 by torchao on the device (emulated on a CPU), beside torchao in plain PyTorch."""

import importlib.util

import pytest
import torch

import faccel
from tests.gpu.plain import CLIP_NORM, STEPS, assert_same, batches, sgd
from tests.gpu.world_of_one import world_of_one
from tests.models import loss_of, model

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


def plain_training(device, recipe, *, emulate):
    """Train with torchao's conversion of all linear layers but the head; see `plain.training`."""
    import dataclasses

    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    net = model(torch.float32, tied=False).to(device)
    config = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(recipe), emulate=emulate, pad_inner_dim=True
    )
    convert_to_float8_training(
        net, config=config, module_filter_fn=lambda module, name: name != "head"
    )
    for module in net.modules():
        if type(module).__name__ == "Float8Linear":
            # As autocast does for every linear layer; torchao does it on CUDA only.
            module.register_forward_pre_hook(lambda module, args: (args[0].bfloat16(),))
    opt = sgd(net)
    losses, norms = [], []
    for batch in batches(device):
        with torch.autocast(device.type, torch.bfloat16):
            logits = net(batch[:, :-1])
        loss = loss_of(logits.float(), batch[:, 1:])
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), CLIP_NORM))
        opt.step()
        opt.zero_grad()
        losses.append(loss.detach())
    return losses, list(net.parameters()), norms


def training(ctx, recipe, *, emulate):
    fp8 = faccel.parallel.Fp8(recipe=recipe, emulate=emulate)
    net = faccel.wrap(
        model(torch.float32, tied=False), ctx, plan=faccel.Plan(units="Block", fp8=fp8)
    )
    assert "Float8Linear" in str(faccel.unwrap(net))
    opt = faccel.wrap_optimizer(sgd(net), net, ctx)
    scaler = faccel.init_scaler(ctx)
    losses, norms = [], []
    for batch in batches(ctx.device):
        loss = loss_of(net(batch[:, :-1]), batch[:, 1:])
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=CLIP_NORM)
        losses.append(loss.detach())
        norms.append(info.grad_norm)
    return losses, list(net.parameters()), norms


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("strategy", ["single", "ddp", "sharded"])
def test_training_equals_plain_torchao(device, strategy, recipe):
    emulate = device.type != "cuda"
    with world_of_one(device, strategy, mixed_precision="fp8") as ctx:
        actual = training(ctx, recipe, emulate=emulate)
    expected = plain_training(device, recipe, emulate=emulate)
    assert len(actual[0]) == STEPS
    # Atomic operations of a GPU round differently in each run, and fp8 has 3 bits of a mantissa.
    assert_same(actual, expected, 0.0 if emulate else 1e-2)


def test_the_device_multiplies_in_fp8_as_emulated(cuda):
    with faccel.init(env={}, device="cuda", mixed_precision="fp8") as ctx:
        actual = training(ctx, "tensorwise", emulate=False)
        assert_same(actual, training(ctx, "tensorwise", emulate=True), 5e-2)
