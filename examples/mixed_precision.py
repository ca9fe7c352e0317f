"""Train in fp32, bf16 and fp16, on any number of processes: one argument of `init` changes.

python examples/mixed_precision.py
torchrun --nproc-per-node 2 examples/mixed_precision.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel

EPOCHS = 6
GLOBAL_BATCH = 64  # samples per update over all processes
LEARNING_RATE = 2e-3
SCALER_OPTIONS = {"fp16": {"growth_interval": 50}}  # a short run: try to grow the scale earlier


def digits():
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.from_numpy(images).float() / 16, torch.from_numpy(labels))


def train(ctx):
    precision = ctx.config.mixed_precision
    loader = DataLoader(digits(), GLOBAL_BATCH, shuffle=True)
    loader = faccel.shard(loader, ctx, split_batches=True)
    faccel.seed_everything(0, ctx)
    model = faccel.wrap(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), model, ctx)

    # fp16 multiplies the loss so that small gradients do not underflow, and leaves out an update
    # that overflows. In fp32 and bf16 the scale is 1 and costs nothing.
    scaler = faccel.init_scaler(ctx, **SCALER_OPTIONS.get(precision, {}))
    for _, epoch_loader in loader.epochs(EPOCHS):
        for x, y in epoch_loader:
            logits = model(x)  # computed in the configured precision, returned in fp32
            scaler = faccel.scaled_backward(F.cross_entropy(logits, y), scaler, ctx)
            info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)

    model.eval()
    correct = []
    with torch.no_grad():
        for batch in faccel.batches(loader.at(0)):
            x, y = batch.data
            is_correct = model(x).argmax(-1) == y
            correct.append(faccel.gather(is_correct, ctx, num_valid=batch.num_valid))
    accuracy = torch.cat(correct).float().mean().item()
    faccel.print(
        f"{precision:4}  accuracy {accuracy:.4f}  loss scale {info.scale:g}  "
        f"updates skipped {scaler.num_skipped}",
        ctx=ctx,
    )
    return accuracy


if __name__ == "__main__":
    # Three contexts with different configurations in one process; they use one process group.
    accuracies = []
    for precision in ("no", "bf16", "fp16"):
        ctx = faccel.init(mixed_precision=precision)
        accuracies.append(train(ctx))
    faccel.print(f"accuracy {min(accuracies):.4f}", ctx=ctx)
