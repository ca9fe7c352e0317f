"""Shard the parameters of a model over the processes (FSDP2), with activation checkpointing.

python examples/fsdp.py --steps 50
faccel launch --cpu --nproc 2 --mesh dp_shard=2 examples/fsdp.py --steps 50
faccel launch --cpu --nproc 4 --mesh dp_replicate=2,dp_shard=2 examples/fsdp.py --steps 50
"""

import argparse
from itertools import islice

import torch
from arguments import count
from characters import CharModel, Text, loss_fn
from torch.utils.data import DataLoader

import faccel

GLOBAL_BATCH = 32  # sequences per update over all processes
LEARNING_RATE = 3e-3
PLAN = faccel.Plan(units="Block", activation_checkpoint=2)  # every second block


def build(ctx):
    """Return the model; on a mesh with shards only rank 0 allocates memory for its values."""
    if ctx.is_main or ctx.mesh.spec.dp_shard == 1:
        return CharModel()
    with torch.device("meta"):  # `wrap` sends each rank its shards of rank 0's values
        return CharModel()


def main(ctx, steps):
    loader = faccel.shard(DataLoader(Text(), GLOBAL_BATCH, shuffle=True), ctx, split_batches=True)

    faccel.seed_everything(0, ctx)
    model = faccel.wrap(build(ctx), ctx, plan=PLAN)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)

    for step, tokens in enumerate(islice(loader.at(0), steps), start=1):
        loss = loss_fn(model, tokens)
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
        mean = faccel.reduce(loss.detach(), ctx, op="mean")
        if step % 10 == 0:
            line = f"step {step:3d}  loss {mean:.4f}  gradient norm {info.grad_norm:.3f}"
            faccel.print(line, ctx=ctx)
    faccel.print(f"loss {mean:.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=count, default=50)
    args = parser.parse_args()
    with faccel.init() as ctx:
        main(ctx, args.steps)
