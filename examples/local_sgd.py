"""Train where the network is slow: ranks average their parameters at every K-th update (local SGD).

python examples/local_sgd.py --steps 200
faccel launch --cpu --nproc 2 examples/local_sgd.py --steps 200 --every 8
"""

import argparse
from pydoc_data.topics import topics  # English text that is part of every Python

import torch
import torch.nn.functional as F
from arguments import count
from torch import nn

import faccel

GLOBAL_BATCH = 32  # sequences per update over all processes
LENGTH = 64  # characters of a sequence
WIDTH = 64
LEARNING_RATE = 0.5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, 256)

    def forward(self, x):
        return self.out(self.rnn(self.embed(x))[0])


def sequences(text, ctx, step):
    """Return this rank's rows of the batch of a step: `int64[rows, LENGTH + 1]`."""
    generator = faccel.random.generator(0, step)  # the same positions on every rank
    starts = torch.randint(len(text) - LENGTH, (GLOBAL_BATCH,), generator=generator)
    rank_starts = starts.chunk(ctx.data_world_size)[ctx.data_rank]
    return torch.stack([text[start : start + LENGTH + 1] for start in rank_starts.tolist()])


def main(ctx, steps, every):
    codes = list("".join(topics[name] for name in sorted(topics)).encode())
    text = torch.tensor(codes, device=ctx.device)
    faccel.seed_everything(0, ctx)
    model = faccel.wrap(Model(), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=LEARNING_RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)

    num_bytes = 0
    for step in range(1, steps + 1):
        rows = sequences(text, ctx, step)

        # Each rank updates with its own gradients: nothing is reduced.
        with faccel.grad_sync(model, on=False):
            loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
            scaler = faccel.scaled_backward(loss, scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)

        # At every K-th step all replicas become their mean.
        info = faccel.parallel.local_sgd(model, ctx, step=step, every=every)
        num_bytes += info.num_bytes
        if step % 50 == 0:
            mean = faccel.reduce(loss.detach(), ctx, op="mean")
            faccel.print(f"step {step:4d}  loss {mean:.4f}  sent {num_bytes / 1e6:.1f} MB", ctx=ctx)

    # Average once more, so that evaluation and checkpoints use one model.
    faccel.parallel.local_sgd(model, ctx, step=steps, every=1)
    mean = faccel.reduce(loss.detach(), ctx, op="mean")
    faccel.print(f"loss {mean:.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=count, default=200)
    parser.add_argument("--every", type=count, default=8, help="updates between two averages")
    args = parser.parse_args()
    with faccel.init() as ctx:
        main(ctx, args.steps, args.every)
