"""torch.compile on the device: equal losses, and no graph after the first step."""

import os

import pytest
import torch

import faccel
from tests.gpu.plain import CLIP_NORM, assert_same, batches, plain_training, sgd
from tests.gpu.test_precision import TOLERANCES
from tests.gpu.world_of_one import world_of_one
from tests.models import loss_of, model

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler, about itself


def compiled_training(ctx, plan):
    from torch._dynamo.utils import counters

    net = faccel.wrap(model(torch.float32, tied=False, depth=1), ctx, plan=plan)
    opt = faccel.wrap_optimizer(sgd(net), net, ctx)
    scaler = faccel.init_scaler(ctx)
    losses, norms, graphs = [], [], []
    for batch in batches(ctx.device):
        loss = loss_of(net(batch[:, :-1]), batch[:, 1:])
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=CLIP_NORM)
        norms.append(info.grad_norm)
        losses.append(loss.detach())
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, list(net.parameters()), norms, graphs


@pytest.mark.parametrize(
    ("strategy", "compiled", "precision"),
    [("single", "whole", "bf16"), ("sharded", "units", "fp16")],
)
def test_a_compiled_model_trains_as_plain_torch(device, strategy, compiled, precision):
    if os.environ.get("FACCEL_GPU_TESTS") == "quick":
        pytest.skip("the compiler takes most of a minute on a CPU")
    torch._dynamo.reset()
    plan = faccel.Plan(units="Block", compile=compiled)
    with world_of_one(device, strategy, mixed_precision=precision) as ctx:
        *trained, graphs = compiled_training(ctx, plan)
    # Fused kernels keep intermediate values in fp32, so the results differ by rounding.
    expected = plain_training(device, precision, depth=1)
    assert_same(trained, expected, 2 * TOLERANCES[precision])
    assert graphs[0] == graphs[-1]
