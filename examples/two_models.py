"""A GAN: two models, two optimizers, one loss scale. It learns to draw points on a ring.

python examples/two_models.py
FACCEL_MIXED_PRECISION=fp16 torchrun --nproc-per-node 2 examples/two_models.py
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel

STEPS = 1200
GLOBAL_BATCH = 256  # points per update over all processes
NOISE = 4  # numbers that the generator makes a point from
WIDTH = 64
LEARNING_RATE = 1e-3


def mlp(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(WIDTH, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(WIDTH, outputs),
    )


def ring(n):
    angle = torch.rand(n, generator=faccel.random.generator(0)) * 2 * math.pi
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def main(ctx):
    points = faccel.shard(
        DataLoader(TensorDataset(ring(8192)), GLOBAL_BATCH, shuffle=True), ctx, split_batches=True
    )
    faccel.seed_everything(0, ctx)
    critic, artist = (faccel.wrap(net, ctx) for net in (mlp(2, 1), mlp(NOISE, 2)))
    betas = (0.5, 0.99)
    critic_opt = torch.optim.Adam(critic.parameters(), lr=LEARNING_RATE, betas=betas)
    artist_opt = torch.optim.Adam(artist.parameters(), lr=LEARNING_RATE, betas=betas)
    critic_opt = faccel.wrap_optimizer(critic_opt, critic, ctx)
    artist_opt = faccel.wrap_optimizer(artist_opt, artist, ctx)
    scaler = faccel.init_scaler(ctx)
    faccel.seed_everything(
        1, ctx, per_data_rank=True
    )  # from here on each process draws noise of its own

    step = 0
    for _epoch, loader in points.epochs(1 + STEPS // len(points)):
        for (real,) in loader:
            # The critic learns to tell real points from drawn ones.
            drawn = artist(torch.randn(len(real), NOISE, device=ctx.device))
            verdicts = critic(torch.cat([real, drawn.detach()]))
            truth = torch.cat(
                [torch.ones_like(verdicts[: len(real)]), torch.zeros_like(verdicts[len(real) :])]
            )
            scaler = faccel.scaled_backward(
                F.binary_cross_entropy_with_logits(verdicts, truth), scaler, ctx
            )
            _, scaler = faccel.optimizer_step(critic_opt, scaler, ctx)

            # The artist learns to please it. The critic's own gradients are not wanted: neither reduced nor kept.
            with faccel.grad_sync(critic, on=False):
                pleased = critic(drawn)
                scaler = faccel.scaled_backward(F.softplus(-pleased).mean(), scaler, ctx)
            _, scaler = faccel.optimizer_step(artist_opt, scaler, ctx)
            faccel.unwrap(critic).zero_grad()
            step += 1

    artist.eval()
    with torch.no_grad():
        radius = artist(torch.randn(1024, NOISE, device=ctx.device)).norm(dim=1)
    miss = faccel.reduce((radius - 1).abs().mean(), ctx, op="mean")
    faccel.print(f"steps {step}  updates skipped {scaler.num_skipped}", ctx=ctx)
    faccel.print(f"distance {miss:.4f}", ctx=ctx)


if __name__ == "__main__":
    with faccel.init() as ctx:
        main(ctx)
