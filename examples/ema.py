"""Train at a high, constant learning rate, and evaluate and export the average of the weights.

python examples/ema.py
faccel launch --cpu --nproc 2 --mesh dp_shard=2 examples/ema.py --output ema
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel

EPOCHS = 6
GLOBAL_BATCH = 16  # samples per update over all processes
LEARNING_RATE = 0.02  # so high that the last updates still change the accuracy
DECAY = 0.99  # an average over the last 100 updates
NUM_TEST = 360  # images for evaluation, of 1797


def datasets():
    """Return the training set and the test set; the split is the same on every process."""
    images, labels = load_digits(return_X_y=True)  # 8 x 8 pixels with values 0 to 16
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    train, test = order[:-NUM_TEST], order[-NUM_TEST:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def accuracy(model, loader, ctx):
    correct = []
    model.eval()
    with torch.no_grad():
        for batch in faccel.batches(loader):
            x, y = batch.data
            is_correct = model(x).argmax(-1) == y
            correct.append(faccel.gather(is_correct, ctx, num_valid=batch.num_valid))
    model.train()
    return torch.cat(correct).float().mean().item()


def main(ctx, output):
    train_set, test_set = datasets()
    train = faccel.shard(DataLoader(train_set, GLOBAL_BATCH, shuffle=True), ctx, split_batches=True)
    test = faccel.shard(DataLoader(test_set, 90), ctx)

    faccel.seed_everything(0, ctx)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model = faccel.wrap(net, ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)

    # Each rank stores the averages of the parameters, or of the shards, that it has.
    ema = faccel.parallel.init_ema(model, ctx, decay=DECAY, warmup=True)

    for epoch, loader in train.epochs(EPOCHS):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            scaler = faccel.scaled_backward(loss, scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            # The averages are updated in place, so use the returned record from here on.
            ema = faccel.parallel.update_ema(ema, model, ctx)

        # Inside of `ema_weights` the model has the averages, afterwards its own weights again.
        weights = accuracy(model, test, ctx)
        with faccel.parallel.ema_weights(model, ema, ctx):
            averages = accuracy(model, test, ctx)
        faccel.print(f"epoch {epoch}  weights {weights:.4f}  averages {averages:.4f}", ctx=ctx)

    if output:
        # A checkpoint has both, to continue; the export has the averages, to use.
        state = {"model": model, "opt": opt, "scaler": scaler, "ema": ema}
        faccel.save(state, f"{output}/checkpoints", ctx, step=EPOCHS)
        with faccel.parallel.ema_weights(model, ema, ctx):
            faccel.checkpoint.export_model(model, f"{output}/export", ctx)
    faccel.print(f"accuracy {averages:.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", help="folder for a checkpoint and an export")
    args = parser.parse_args()
    with faccel.init() as ctx:
        main(ctx, args.output)
