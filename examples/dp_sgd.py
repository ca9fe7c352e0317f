"""Train digits with differential privacy: clip the gradient of each sample, add noise to their sum.

python examples/dp_sgd.py
faccel launch --cpu --nproc 2 examples/dp_sgd.py --noise 2.0
"""

import argparse

import torch
import torch.nn.functional as F
from digits import SEED, datasets
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel import func

EPOCHS = 15
GLOBAL_BATCH = 256  # the noise is added once per batch, so large batches have less of it
NUM_MICRO_BATCHES = 2  # per-sample gradients of half a batch are in memory at a time
LEARNING_RATE = 2.0
CLIP_NORM = 0.5


def main(ctx, noise):
    train_set, test_set = datasets()
    train = faccel.shard(DataLoader(train_set, GLOBAL_BATCH, shuffle=True), ctx, split_batches=True)

    faccel.seed_everything(SEED, ctx)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    # The same loss function as for any other step. `dp_sgd` maps it over single samples with vmap.
    def loss_fn(params, batch, generator):
        x, y = batch
        return F.cross_entropy(func.functional_call(net, params, x, generator=generator), y)

    optimizer = func.sgd(LEARNING_RATE)
    state = func.init_state(net, optimizer, ctx, seed=SEED)
    step = func.dp_sgd(
        loss_fn,
        optimizer,
        ctx,
        clip_norm=CLIP_NORM,
        noise_multiplier=noise,
        num_micro_batches=NUM_MICRO_BATCHES,
    )
    for epoch, loader in train.epochs(EPOCHS):
        for x, y in loader:
            metrics, state = step(state, (x, y))
        faccel.print(f"epoch {epoch:2d}  loss {metrics['loss']:.4f}", ctx=ctx)

    x, y = test_set.tensors
    with torch.no_grad():
        hits = func.functional_call(net, state.params, x).argmax(-1) == y
    faccel.print(f"accuracy {hits.float().mean():.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--noise", type=float, default=1.0)
    args = parser.parse_args()
    with faccel.init() as ctx:
        main(ctx, args.noise)
