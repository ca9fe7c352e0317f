"""Put the depth of a model on several processes (pipeline parallel): they work on different micro-batches at a time.

python examples/pipeline.py --steps 50
faccel launch --cpu --nproc 2 --mesh pp=2 examples/pipeline.py --steps 50
faccel launch --cpu --nproc 4 --mesh pp=2,dp_shard=2 examples/pipeline.py --steps 50
"""

import argparse
from itertools import islice

import torch
from characters import CharModel, Text, loss_fn
from torch.utils.data import DataLoader

import faccel

MICRO_BATCH = 8
NUM_MICRO = 4  # micro-batches per update: the more, the less the processes wait for each other
PLAN = faccel.Plan(
    pipeline=faccel.parallel.PipelineConfig(
        chain=("embed", "blocks.*", "norm", "head"), schedule="1f1b"
    )
)


def main(ctx, steps):
    loader = faccel.shard(DataLoader(Text(), MICRO_BATCH, shuffle=True), ctx, split_batches=True)
    faccel.seed_everything(0, ctx)
    model = faccel.wrap(CharModel(), ctx, plan=PLAN)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=3e-3), model, ctx)
    scaler = faccel.init_scaler(ctx)

    for window in islice(faccel.windows(loader.at(0), ctx, size=NUM_MICRO), steps):
        losses, scaler = faccel.parallel.pipeline_step(loss_fn, model, window, scaler, ctx)
        faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
    mean = faccel.reduce(losses.mean(), ctx, op="mean")

    with torch.no_grad():  # a batch of any size; every process has the output
        guess = model(Text()[0][None, :-1].to(ctx.device)).argmax(-1)
    faccel.print(f"guesses {bytes(guess[0].tolist())!r}", ctx=ctx)
    faccel.print(f"loss {mean:.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    with faccel.init() as ctx:
        main(ctx, parser.parse_args().steps)
