"""Cut the matrices of a model over the processes (tensor parallel), alone or inside of replicas and shards.

python examples/tensor_parallel.py --steps 50
faccel launch --cpu --nproc 2 --mesh tp=2 examples/tensor_parallel.py --steps 50
faccel launch --cpu --nproc 4 --mesh dp_shard=2,tp=2 examples/tensor_parallel.py --steps 50
"""

import argparse
from itertools import islice

import torch
from characters import CharModel, Text, loss_fn
from torch.utils.data import DataLoader

import faccel

GLOBAL_BATCH = 32
PLAN = faccel.Plan(
    units="Block",
    tensor={
        "blocks.*.attention.q": "colwise",
        "blocks.*.attention.k": "colwise",
        "blocks.*.attention.v": "colwise",
        "blocks.*.attention.o": "rowwise",
        "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise",
    },
)


def main(ctx, steps):
    # Processes that share matrices read the same rows.
    loader = faccel.shard(DataLoader(Text(), GLOBAL_BATCH, shuffle=True), ctx, split_batches=True)
    faccel.seed_everything(0, ctx)
    model = faccel.wrap(CharModel(), ctx, plan=PLAN)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), model, ctx)
    scaler = faccel.init_scaler(ctx)

    losses = []
    for tokens in islice(loader.at(0), steps):
        loss = loss_fn(model, tokens)
        losses.append(loss.detach())
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
    means = faccel.reduce(torch.stack(losses), ctx, op="mean")
    faccel.print(f"from {means[0]:.4f}\nloss {means[-1]:.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    with faccel.init() as ctx:
        main(ctx, parser.parse_args().steps)
