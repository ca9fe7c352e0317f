"""Split the matrices of a model over the processes (tensor parallel).

python examples/tensor_parallel.py --steps 50
faccel launch --cpu --nproc 2 --mesh tp=2 examples/tensor_parallel.py --steps 50
faccel launch --cpu --nproc 4 --mesh dp_shard=2,tp=2 examples/tensor_parallel.py --steps 50
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
PLAN = faccel.Plan(
    units="Block",
    tensor={  # a "colwise" layer splits its outputs, the next "rowwise" layer its inputs
        "blocks.*.attention.q": "colwise",
        "blocks.*.attention.k": "colwise",
        "blocks.*.attention.v": "colwise",
        "blocks.*.attention.o": "rowwise",
        "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise",
    },
)


def main(ctx, steps):
    # The ranks of one tensor-parallel group read the same rows.
    loader = faccel.shard(DataLoader(Text(), GLOBAL_BATCH, shuffle=True), ctx, split_batches=True)
    faccel.seed_everything(0, ctx)
    model = faccel.wrap(CharModel(), ctx, plan=PLAN)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)

    losses = []
    for tokens in islice(loader.at(0), steps):
        loss = loss_fn(model, tokens)
        losses.append(loss.detach())
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
    means = faccel.reduce(torch.stack(losses), ctx, op="mean")
    faccel.print(f"first loss {means[0]:.4f}", ctx=ctx)
    faccel.print(f"loss {means[-1]:.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=count, default=50)
    args = parser.parse_args()
    with faccel.init() as ctx:
        main(ctx, args.steps)
