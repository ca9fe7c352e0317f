"""Train a small network on handwritten digits: the same script on any number of processes.

python examples/digits.py
torchrun --nproc-per-node 2 examples/digits.py
faccel launch --nproc 2 examples/digits.py --track tensorboard,csv --run-dir runs/digits
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel import tracking

EPOCHS = 12
GLOBAL_BATCH = 64  # samples per update, over all processes
LEARNING_RATE = 6e-3
CLIP_NORM = 1.0
NUM_TEST = 360  # images for evaluation, of 1797
LOG_EVERY = 4  # updates: a host that logs waits for its device
SEED = 0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, 64)
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        return self.out(F.relu(self.hidden(x.flatten(1))))


def datasets():
    """Return the training set and the test set; the split is the same on every process."""
    images, labels = load_digits(return_X_y=True)  # 8 x 8 pixels with values 0 to 16
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels)
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(y)))
    train, test = order[:-NUM_TEST], order[-NUM_TEST:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--track", default="", help="trackers, as in `tensorboard,csv`")
    parser.add_argument("--run-dir", help="folder for trackers, `faccel report` and `faccel watch`")
    return parser.parse_args()


def main(ctx, track=()):
    train_set, test_set = datasets()

    # The batch size is the global one: each process reads its part of every batch. Without the
    # short last batch, any number of processes that divides 64 trains on the same samples.
    loader = DataLoader(train_set, GLOBAL_BATCH, shuffle=True, drop_last=True)
    train = faccel.shard(loader, ctx, split_batches=True)
    test = faccel.shard(DataLoader(test_set, 256), ctx)

    # All processes have the same weights, and gradients are averaged.
    # Build the optimizer after `wrap`.
    faccel.seed_everything(SEED, ctx)
    model = faccel.wrap(Net(), ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), model, ctx)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=EPOCHS * len(train))
    scaler = faccel.init_scaler(ctx)

    # The trackers record curves, the meter where the time goes.
    trackers, meter = tracking.Trackers(), tracking.init_meter(ctx)
    if track:
        config = {"epochs": EPOCHS, "global_batch": GLOBAL_BATCH, "learning_rate": LEARNING_RATE}
        trackers = tracking.init_trackers("digits", ctx, trackers=track, config=config)
        meter = tracking.init_meter(ctx, run="digits")

    for epoch, loader in train.epochs(EPOCHS):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            scaler = faccel.scaled_backward(loss, scaler, ctx)
            info, scaler = faccel.optimizer_step(
                opt, scaler, ctx, clip_norm=CLIP_NORM, scheduler=schedule
            )
            meter = tracking.tick(meter, samples=len(x))
            if meter.num_steps % LOG_EVERY == 0:
                values = {"loss": loss, "grad_norm": info.grad_norm}
                tracking.log(values, trackers, step=meter.num_steps)
        if track:
            tracking.rates(meter, ctx)
        mean = faccel.reduce(loss.detach(), ctx, op="mean")
        faccel.print(
            f"epoch {epoch:2d}  loss {mean:.4f}  gradient norm {info.grad_norm:.3f}", ctx=ctx
        )

    # Each process evaluates its part. `gather` drops padded rows, so each image counts once.
    model.eval()
    correct = []
    with torch.no_grad(), tracking.phase("evaluation", ctx):
        for batch in faccel.batches(test):
            x, y = batch.data
            is_correct = model(x).argmax(-1) == y
            correct.append(faccel.gather(is_correct, ctx, num_valid=batch.num_valid))
    correct = torch.cat(correct)
    assert len(correct) == len(test_set)
    accuracy = correct.float().mean()
    tracking.log({"accuracy": accuracy}, trackers, step=meter.num_steps)
    tracking.finish(trackers)
    faccel.print(f"accuracy {accuracy:.4f}", ctx=ctx)


if __name__ == "__main__":
    args = parse_args()
    with faccel.init(run_dir=args.run_dir) as ctx:
        main(ctx, tuple(filter(None, args.track.split(","))))
