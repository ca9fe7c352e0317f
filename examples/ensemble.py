"""Train eight models at once, as one batched computation, and let them vote.

python examples/ensemble.py
faccel launch --cpu --nproc 2 examples/ensemble.py
"""

import argparse

import torch
import torch.nn.functional as F
from digits import SEED, datasets
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel import func

MODELS = 8
EPOCHS = 15
GLOBAL_BATCH = 64
LEARNING_RATE = 3e-3


def make(seed):
    # each model has its own seed; the state of the default generator is restored
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)
        )


def main(ctx, use_compile):
    train_set, test_set = datasets()
    train = faccel.shard(DataLoader(train_set, GLOBAL_BATCH, shuffle=True), ctx, split_batches=True)
    net = make(0)

    def loss_fn(params, batch, generator):
        x, y = batch
        return F.cross_entropy(func.functional_call(net, params, x, generator=generator), y)

    # Eight states, stacked: every tensor has a first dim of eight.
    optimizer = func.adamw(LEARNING_RATE)
    states = func.stack(
        [func.init_state(make(SEED + i), optimizer, ctx, seed=SEED + i) for i in range(MODELS)]
    )

    # The step of one model, mapped over all. Each model draws its own dropout masks. `--compile`
    # makes it several times faster.
    step = func.ensemble(func.make_step(loss_fn, optimizer, ctx), ctx)
    if use_compile:
        step = func.compiled(step, ctx)
    for _, loader in train.epochs(EPOCHS):
        for batch in loader:
            metrics, states = step(states, tuple(batch))
    losses = " ".join(f"{loss:.3f}" for loss in metrics["loss"])
    faccel.print(f"losses {losses}", ctx=ctx)

    # The accuracy of each model, then of the mean of their predictions.
    net.eval()
    x, y = test_set.tensors
    with torch.no_grad():
        logits = torch.stack(
            [func.functional_call(net, state.params, x) for state in func.unstack(states)]
        )
    alone = (logits.argmax(-1) == y).float().mean(1)
    faccel.print(f"alone {alone.min():.4f} to {alone.max():.4f}", ctx=ctx)
    together = logits.log_softmax(-1).mean(0).argmax(-1)
    faccel.print(f"accuracy {(together == y).float().mean():.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    with faccel.init() as ctx:
        main(ctx, args.compile)
