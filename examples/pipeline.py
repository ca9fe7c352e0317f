"""Split a model into stages on several processes (pipeline parallel).

python examples/pipeline.py --steps 50
faccel launch --cpu --nproc 2 --mesh pp=2 examples/pipeline.py --steps 50
faccel launch --cpu --nproc 4 --mesh pp=2,dp_shard=2 examples/pipeline.py --steps 50
"""

import argparse
from itertools import islice

import torch
from arguments import count
from characters import CharModel, Text, loss_fn
from torch.utils.data import DataLoader

import faccel

MICRO_BATCH = 8  # sequences per micro-batch over all processes
NUM_MICRO_BATCHES = 4  # per update; with more of them the stages wait less for each other
LEARNING_RATE = 3e-3
PLAN = faccel.Plan(
    pipeline=faccel.parallel.PipelineConfig(
        chain=("embed", "blocks.*", "norm", "head"), schedule="1f1b"
    )
)


def main(ctx, steps):
    loader = faccel.shard(DataLoader(Text(), MICRO_BATCH, shuffle=True), ctx, split_batches=True)
    faccel.seed_everything(0, ctx)
    model = faccel.wrap(CharModel(), ctx, plan=PLAN)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)

    def loss_of(model, batch):
        return loss_fn(model, batch.data)

    for window in islice(faccel.windows(loader.at(0), ctx, size=NUM_MICRO_BATCHES), steps):
        losses, scaler = faccel.forward_backward(loss_of, model, window, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
    mean = faccel.reduce(losses.mean(), ctx, op="mean")

    # Outside training a batch may have any size, and every process gets the output.
    with torch.no_grad():
        tokens = Text()[0][None, :-1].to(ctx.device)
        predictions = model(tokens).argmax(-1)
    faccel.print(f"predictions {bytes(predictions[0].tolist())!r}", ctx=ctx)
    faccel.print(f"loss {mean:.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=count, default=50)
    args = parser.parse_args()
    with faccel.init() as ctx:
        main(ctx, args.steps)
