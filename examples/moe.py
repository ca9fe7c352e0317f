"""Train a small language model whose layers are mixtures of experts, which are spread over the processes.

python examples/moe.py
faccel launch --cpu --nproc 2 --mesh dp_shard=2,ep=2 examples/moe.py
"""

import argparse
from pydoc_data.topics import topics  # real English in every Python

import torch
import torch.nn.functional as F
from torch import nn

import faccel
from faccel.parallel.moe import MoE

GLOBAL_BATCH = (
    16  # sequences per update over all processes, so that any number of them trains alike
)
LENGTH = 64  # characters of a sequence
WIDTH = 64
HIDDEN = 128  # of one expert
NUM_EXPERTS = 8
DEPTH = 2
BALANCE = 0.01  # weight of the loss that keeps experts equally busy
LEARNING_RATE = 3e-3
CLIP_NORM = 1.0
SEED = 0


class Block(nn.Module):
    """A recurrent layer that mixes positions, and experts for each position."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.moe = MoE(WIDTH, HIDDEN, NUM_EXPERTS)

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
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x)), sum(block.moe.balance_loss for block in self.blocks)


def sequences():
    """Characters in, next characters out."""
    codes = torch.tensor(list("\n".join(topics[key] for key in sorted(topics)).encode()))
    return torch.utils.data.StackDataset(*(part[: len(part) // LENGTH * LENGTH].view(-1, LENGTH)
                                           for part in (codes[:-1], codes[1:])))  # fmt: skip


def main(ctx, steps):
    # The batch size is the global one, and each process reads its part of every batch.
    loader = torch.utils.data.DataLoader(sequences(), GLOBAL_BATCH, shuffle=True, drop_last=True)
    train = faccel.shard(loader, ctx, split_batches=True)

    # On a mesh with `ep` each process holds its part of the experts, and tokens travel to them and back.
    faccel.seed_everything(SEED, ctx)
    model = faccel.wrap(Model(), ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)

    step = 0
    while step < steps:
        for x, y in train.at(step // len(train)):
            logits, balance = model(x)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            scaler = faccel.scaled_backward(loss + BALANCE * balance, scaler, ctx)
            info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=CLIP_NORM)
            step += 1
            if step % 10 == 0 or step == steps:
                mean = faccel.reduce(
                    {"loss": loss.detach(), "balance": balance.detach() / DEPTH}, ctx, op="mean"
                )
                faccel.print(
                    f"step {step:4d}  balance {mean['balance']:.3f}  norm {info.grad_norm:.3f}",
                    ctx=ctx,
                )
            if step == steps:
                break
    faccel.print(f"loss {mean['loss']:.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    with faccel.init() as ctx:
        main(ctx, options.steps)
