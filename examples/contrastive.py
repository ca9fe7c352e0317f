"""Train with a contrastive loss over the images of all processes.

python examples/contrastive.py
faccel launch --cpu --nproc 2 examples/contrastive.py
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel

EPOCHS = 5
GLOBAL_BATCH = 128  # images per update over all processes: each is compared with all others
LEARNING_RATE = 3e-3
TEMPERATURE = 0.2
NOISE = 0.2  # standard deviation of the noise in which the two views of an image differ
NUM_TEST = 360  # images for evaluation, of 1797


def datasets():
    """Return the training set and the test set; the split is the same on every process."""
    images, labels = load_digits(return_X_y=True)  # 8 x 8 pixels with values 0 to 16
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(y)))
    train, test = order[:-NUM_TEST], order[-NUM_TEST:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def contrastive_loss(a, b, labels):
    """Each row of `a` must be closer to the rows of `b` with its label than to the others."""
    logits = a @ b.T / TEMPERATURE
    is_same = labels[:, None] == labels[None]
    return -(logits.log_softmax(-1) * is_same).sum(-1).div(is_same.sum(-1)).mean()


def main(ctx):
    train_set, test_set = datasets()
    train = faccel.shard(DataLoader(train_set, GLOBAL_BATCH, shuffle=True), ctx, split_batches=True)

    faccel.seed_everything(0, ctx)
    model = faccel.wrap(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)), ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)

    for epoch, loader in train.epochs(EPOCHS):
        for batch in faccel.batches(loader):
            x, labels = batch.data
            # One forward for both views, because DDP counts forwards.
            views = torch.stack([x, x + NOISE * torch.randn_like(x)], dim=1)
            embeddings = F.normalize(model(views), dim=-1)
            # The rows of all processes, through which gradients flow back to each of them.
            rows = {"embeddings": embeddings, "labels": labels}
            rows = faccel.gather(rows, ctx, num_valid=batch.num_valid, differentiable=True)
            a, b = rows["embeddings"].unbind(1)
            loss = contrastive_loss(a, b, rows["labels"])
            scaler = faccel.scaled_backward(loss, scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        faccel.print(f"epoch {epoch} loss {loss.item():.4f}", ctx=ctx)

    # The label of the closest training image, for each test image.
    model.eval()
    with torch.no_grad():
        known = F.normalize(model(train_set.tensors[0]), dim=-1)
        closest = (F.normalize(model(test_set.tensors[0]), dim=-1) @ known.T).argmax(-1)
    accuracy = (train_set.tensors[1][closest] == test_set.tensors[1]).float().mean().item()
    faccel.print(f"accuracy {accuracy:.4f}", ctx=ctx)


if __name__ == "__main__":
    with faccel.init() as ctx:
        main(ctx)
