"""The same training in fp32, bf16 and fp16, on any number of processes: one word changes.

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
GLOBAL_BATCH = 64
LEARNING_RATE = 2e-3


def digits():
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.from_numpy(images).float() / 16, torch.from_numpy(labels))


def train(ctx):
    data = digits()
    loader = faccel.shard(DataLoader(data, GLOBAL_BATCH, shuffle=True), ctx, split_batches=True)
    faccel.seed_everything(0, ctx)
    model = faccel.wrap(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), model, ctx)

    # fp16 multiplies the loss so that small gradients survive, and skips an update that overflows; the scale is a
    # value that goes round the loop. For fp32 and bf16 it is 1 and costs nothing.
    scaler = faccel.init_scaler(
        ctx, **({"growth_interval": 50} if ctx.config.mixed_precision == "fp16" else {})
    )
    for _epoch, part in loader.epochs(EPOCHS):
        for x, y in part:
            logits = model(x)  # computed in the precision asked for, returned in fp32
            scaler = faccel.scaled_backward(F.cross_entropy(logits, y), scaler, ctx)
            info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)

    model.eval()
    with torch.no_grad():
        hits = [
            faccel.gather(model(b.data[0]).argmax(-1) == b.data[1], ctx, num_valid=b.num_valid)
            for b in faccel.batches(loader.at(0))
        ]
    accuracy = torch.cat(hits).float().mean().item()
    faccel.print(
        f"{ctx.config.mixed_precision:4}  accuracy {accuracy:.4f}  loss scale {info.scale:g}  "
        f"updates skipped {scaler.num_skipped}",
        ctx=ctx,
    )
    return accuracy


if __name__ == "__main__":
    # Three contexts in one process, each with a configuration of its own; they share the process group.
    accuracies = []
    for precision in ("no", "bf16", "fp16"):
        ctx = faccel.init(mixed_precision=precision)
        accuracies.append(train(ctx))
    faccel.print(f"accuracy {min(accuracies):.4f}", ctx=ctx)
