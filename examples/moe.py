"""Train a small language model whose experts are on different processes (expert parallel).

python examples/moe.py
faccel launch --cpu --nproc 2 --mesh dp_shard=2,ep=2 examples/moe.py
"""

import argparse
from itertools import islice
from pydoc_data.topics import topics  # English text that is part of every Python

import torch
import torch.nn.functional as F
from arguments import count
from torch import nn
from torch.utils.data import DataLoader, StackDataset

import faccel

GLOBAL_BATCH = 16  # sequences per update over all processes
LENGTH = 64  # characters of a sequence
WIDTH = 64
HIDDEN = 128  # features between the two layers of an expert
NUM_EXPERTS = 8
DEPTH = 2
BALANCE_WEIGHT = 0.01  # weight of the loss that keeps experts equally busy
LEARNING_RATE = 3e-3
CLIP_NORM = 1.0
SEED = 0


class Block(nn.Module):
    """A recurrent layer that mixes positions, and experts for each position."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.moe = faccel.parallel.MoE(WIDTH, HIDDEN, NUM_EXPERTS)

    def forward(self, x):
        x = x + self.mix(self.norm1(x))[0]
        return x + self.moe(self.norm2(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 256, bias=False)

    def forward(self, x):
        """Return the logits, and the sum of the balance losses of all layers."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        balance = sum(block.moe.balance_loss for block in self.blocks)
        return self.out(self.norm(x)), balance


def sequences():
    """Return pairs of characters and next characters, `int64[LENGTH]` each."""
    codes = torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()))
    end = (len(codes) - 1) // LENGTH * LENGTH
    return StackDataset(codes[:end].view(-1, LENGTH), codes[1 : end + 1].view(-1, LENGTH))


def main(ctx, steps):
    loader = DataLoader(sequences(), GLOBAL_BATCH, shuffle=True, drop_last=True)
    train = faccel.shard(loader, ctx, split_batches=True)

    # On a mesh with `ep` each process has some of the experts, and tokens travel to them and back.
    faccel.seed_everything(SEED, ctx)
    model = faccel.wrap(Model(), ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)

    batches = (batch for _, epoch in train.epochs(1 + steps // len(train)) for batch in epoch)
    for step, (x, y) in enumerate(islice(batches, steps), start=1):
        logits, balance = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        scaler = faccel.scaled_backward(loss + BALANCE_WEIGHT * balance, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=CLIP_NORM)
        if step % 10 == 0 or step == steps:
            values = {"loss": loss.detach(), "balance": balance.detach() / DEPTH}
            mean = faccel.reduce(values, ctx, op="mean")
            line = f"step {step:4d}  balance {mean['balance']:.3f}  norm {info.grad_norm:.3f}"
            faccel.print(line, ctx=ctx)
    faccel.print(f"loss {mean['loss']:.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=count, default=200)
    args = parser.parse_args()
    with faccel.init() as ctx:
        main(ctx, args.steps)
