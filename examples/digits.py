"""Train a small network on handwritten digits: the same script on any number of processes.

python examples/digits.py
torchrun --nproc-per-node 2 examples/digits.py
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel

EPOCHS = 12
GLOBAL_BATCH = 64  # samples per update, over all processes
LEARNING_RATE = 6e-3
CLIP_NORM = 1.0
NUM_TEST = 360  # images for evaluation, of 1797
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


def main(ctx):
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

    for epoch, loader in train.epochs(EPOCHS):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            scaler = faccel.scaled_backward(loss, scaler, ctx)
            info, scaler = faccel.optimizer_step(
                opt, scaler, ctx, clip_norm=CLIP_NORM, scheduler=schedule
            )
        mean = faccel.reduce(loss.detach(), ctx, op="mean")
        faccel.print(
            f"epoch {epoch:2d}  loss {mean:.4f}  gradient norm {info.grad_norm:.3f}", ctx=ctx
        )

    # Each process evaluates its part. `gather` drops padded rows, so each image counts once.
    model.eval()
    correct = []
    with torch.no_grad():
        for batch in faccel.batches(test):
            x, y = batch.data
            is_correct = model(x).argmax(-1) == y
            correct.append(faccel.gather(is_correct, ctx, num_valid=batch.num_valid))
    correct = torch.cat(correct)
    assert len(correct) == len(test_set)
    faccel.print(f"accuracy {correct.float().mean():.4f}", ctx=ctx)


if __name__ == "__main__":
    with faccel.init() as ctx:
        main(ctx)
