"""A process group of the device's library (NCCL) with one rank: collectives, DDP, FSDP2."""

import pytest
import torch
import torch.distributed as dist

import faccel
from faccel.device_table import KINDS
from tests.gpu.plain import assert_same, plain_training, training
from tests.gpu.test_precision import TOLERANCES
from tests.gpu.world_of_one import world_of_one

PLANS = {
    "ddp": ("ddp", None),
    "ddp, bf16 hook": ("ddp", faccel.Plan(ddp=faccel.parallel.DdpConfig(comm_hook="bf16"))),
    "zero-1": ("ddp", faccel.Plan(ddp=faccel.parallel.DdpConfig(shard_optimizer=True))),
    "fsdp": ("sharded", faccel.Plan(units="Block")),
    "fsdp, prefetch": (
        "sharded",
        faccel.Plan(units="Block", fsdp=faccel.parallel.FsdpConfig(prefetch=1)),
    ),
    "fsdp, checkpointed": ("sharded", faccel.Plan(units="Block", activation_checkpoint="full")),
    "fsdp, offloaded": ("sharded", faccel.Plan(units="Block", offload=True)),
}


@pytest.mark.parametrize("debug", [False, True])
def test_collectives_run_on_the_device(device, debug):
    with world_of_one(device, "ddp", debug=debug) as ctx:
        library = KINDS[device.type].library
        assert dist.Backend.default_device_backend_map[device.type] == library
        assert debug or f"{device.type}:{library}" in dist.get_backend_config()
        values = {"x": torch.arange(4.0, device=device), "n": torch.tensor(3, device=device)}
        for op in ("sum", "mean", "max"):
            reduced = faccel.reduce(values, ctx, op=op)
            assert reduced["x"].device == ctx.device and reduced["x"].tolist() == [0, 1, 2, 3]
        assert faccel.gather(values["x"], ctx).tolist() == [0, 1, 2, 3]
        assert faccel.broadcast(values, ctx)["n"].item() == 3
        assert faccel.comm.all_to_all(values["x"][None], ctx).device == ctx.device
        assert faccel.gather_objects(["text"], ctx) == [["text"]]
        faccel.barrier(ctx)
        assert faccel.agree(ctx, stop=True).stop
    assert not dist.is_initialized()


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", PLANS)
def test_engines_train_as_plain_torch(device, name, precision):
    strategy, plan = PLANS[name]
    with world_of_one(device, strategy, mixed_precision=precision) as ctx:
        actual = training(ctx, plan)
        tolerance = TOLERANCES[precision]
        if "hook" in name:  # gradients are reduced in bf16
            tolerance = 5e-2
        assert_same(actual, plain_training(device, precision), tolerance)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_an_overflow_is_skipped(device, name):
    strategy, plan = PLANS[name]
    with world_of_one(device, strategy, mixed_precision="fp16") as ctx:
        _, _, _, scaler, infos = training(ctx, plan, overflow_at=1, scale=1024.0)
        assert [info.skipped for info in infos] == [step == 1 for step in range(6)]
        assert scaler.scale == 512.0


def test_parameters_are_gathered_in_bf16(device):
    fsdp = faccel.parallel.FsdpConfig(low_precision_params=True)
    with world_of_one(device, "sharded", mixed_precision="bf16") as ctx:
        actual = training(ctx, faccel.Plan(units="Block", fsdp=fsdp))
        assert_same(actual, plain_training(device, "bf16"), 5e-2)
