"""The same training step in plain PyTorch, faccel and Accelerate."""

import dataclasses
import itertools
import os
import sys
from pathlib import Path

import attrs
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import faccel

sys.path.insert(0, str(Path(__file__).parents[1]))  # of `tests.gpu`, which is not installed

from gpu_model import Block, gpt, token_batches

from tests.gpu.world_of_one import world_of_one

LEARNING_RATE = 1e-4
CLIP_NORM = 1.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


@attrs.frozen
class Setup:
    """What a contender trains.

    Args:
        device: Where.
        size: A row of `gpu_model.SIZES`.
        precision: `"no"`, `"bf16"` or `"fp16"`.
        plan: How faccel runs the model.
        build: Returns the model.
    """

    device: torch.device
    size: object
    precision: str = "no"
    plan: faccel.Plan = faccel.Plan()
    build: object = gpt

    def batches(self):
        """Return a function that returns the next batch, which is on the device already."""
        return itertools.cycle(token_batches(self.size, 4, self.device)).__next__


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def torch_step(setup, stack, change=lambda model: model):
    """Return a function that trains for one step in plain PyTorch.

    `change` compiles, checkpoints or shards the model. `stack` closes what stays open.
    """
    model = change(setup.build(setup.size, setup.device))
    opt = adamw(model)
    grad_scaler = torch.amp.GradScaler(setup.device.type, enabled=setup.precision == "fp16")
    next_batch = setup.batches()
    enabled = setup.precision != "no"

    def step():
        with torch.autocast(setup.device.type, DTYPES.get(setup.precision), enabled=enabled):
            loss = model(next_batch())
        grad_scaler.scale(loss).backward()
        grad_scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        grad_scaler.step(opt)
        grad_scaler.update()
        opt.zero_grad()

    return step


def context(setup, stack, strategy=None):
    """Return a context of one process; of a world of one process group with `strategy`."""
    if strategy is None:
        options = {"device": str(setup.device), "mixed_precision": setup.precision}
        return stack.enter_context(faccel.init(env={}, **options))
    return stack.enter_context(
        world_of_one(setup.device, strategy, mixed_precision=setup.precision)
    )


def faccel_step(setup, stack, strategy=None):
    """Return a function that trains for one step with faccel."""
    ctx = context(setup, stack, strategy)
    model = faccel.wrap(setup.build(setup.size), ctx, plan=setup.plan)
    opt = faccel.wrap_optimizer(adamw(model), model, ctx)
    scaler = faccel.init_scaler(ctx)
    next_batch = setup.batches()

    def step():
        nonlocal scaler
        scaler = faccel.scaled_backward(model(next_batch()), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=CLIP_NORM)

    return step


def accelerator_of(setup):
    """Return a fresh Accelerator; its state is one for the process."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    return Accelerator(cpu=setup.device.type == "cpu", mixed_precision=setup.precision)


def accelerate_step(setup, stack, change=lambda model: model):
    """Return a function that trains for one step with Accelerate."""
    if setup.device.type == "cpu" and setup.precision == "fp16":
        raise ValueError("Accelerate computes in fp32 on a CPU")
    accelerator = accelerator_of(setup)
    net = change(setup.build(setup.size))
    model, opt = accelerator.prepare(net, adamw(net))
    next_batch = setup.batches()

    def step():
        accelerator.backward(model(next_batch()))
        accelerator.clip_grad_norm_(model.parameters(), CLIP_NORM)
        opt.step()
        opt.zero_grad()

    return step


def sharded_by_torch(setup, model):
    """Shard a model over a mesh of one rank, as `Plan(units="Block")` does."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dtype = DTYPES[setup.precision]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    # The two dimensions of the mesh that faccel makes.
    mesh = init_device_mesh(setup.device.type, (1, 1), mesh_dim_names=("replicate", "shard"))
    for unit in [*model.blocks, model]:
        fully_shard(unit, mesh=mesh["shard"], mp_policy=policy)
    return model


SHARDED = faccel.Plan(
    units=Block.__name__, fsdp=faccel.parallel.FsdpConfig(low_precision_params=True)
)


def fp8_by_torchao(model, *, emulate):
    """Convert the linear layers of all blocks, as faccel does, and compile the model."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name("tensorwise")
    config = dataclasses.replace(config, emulate=emulate, pad_inner_dim=True)
    convert_to_float8_training(model.blocks, config=config)
    return model if emulate else torch.compile(model)


class Checkpointed(nn.Module):
    """A module whose activations are computed a second time in backward."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=False)


def checkpointed_by_torch(model):
    """Checkpoint the activations of each block."""
    model.blocks = nn.ModuleList(map(Checkpointed, model.blocks))
    return model
