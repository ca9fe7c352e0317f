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
NOISE = 4  # numbers that the generator turns into one point
WIDTH = 64
LEARNING_RATE = 1e-3
BETAS = (0.5, 0.99)


def mlp(num_inputs, num_outputs):
    return nn.Sequential(
        nn.Linear(num_inputs, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(WIDTH, WIDTH),
        nn.LeakyReLU(0.2),
        nn.Linear(WIDTH, num_outputs),
    )


def ring(num_points):
    angle = torch.rand(num_points, generator=faccel.random.generator(0)) * 2 * math.pi
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def adam(model, ctx):
    opt = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=BETAS)
    return faccel.wrap_optimizer(opt, model, ctx)


def main(ctx):
    loader = DataLoader(TensorDataset(ring(8192)), GLOBAL_BATCH, shuffle=True)
    points = faccel.shard(loader, ctx, split_batches=True)
    faccel.seed_everything(0, ctx)
    discriminator = faccel.wrap(mlp(2, 1), ctx)
    generator = faccel.wrap(mlp(NOISE, 2), ctx)
    discriminator_opt, generator_opt = adam(discriminator, ctx), adam(generator, ctx)
    scaler = faccel.init_scaler(ctx)
    faccel.seed_everything(1, ctx, per_data_rank=True)  # each process draws different noise

    step = 0
    for _, epoch_loader in points.epochs(1 + STEPS // len(points)):
        for (real,) in epoch_loader:
            # The discriminator learns to separate real points from generated ones.
            generated = generator(torch.randn(len(real), NOISE, device=ctx.device))
            logits = discriminator(torch.cat([real, generated.detach()]))
            labels = torch.zeros_like(logits)
            labels[: len(real)] = 1
            loss = F.binary_cross_entropy_with_logits(logits, labels)
            scaler = faccel.scaled_backward(loss, scaler, ctx)
            _, scaler = faccel.optimizer_step(discriminator_opt, scaler, ctx)

            # The generator learns to be taken for real. The gradients of the discriminator are
            # not used here, so they are neither reduced nor kept.
            with faccel.grad_sync(discriminator, on=False):
                loss = F.softplus(-discriminator(generated)).mean()
                scaler = faccel.scaled_backward(loss, scaler, ctx)
            _, scaler = faccel.optimizer_step(generator_opt, scaler, ctx)
            faccel.unwrap(discriminator).zero_grad()
            step += 1

    generator.eval()
    with torch.no_grad():
        radius = generator(torch.randn(1024, NOISE, device=ctx.device)).norm(dim=1)
    distance = faccel.reduce((radius - 1).abs().mean(), ctx, op="mean")
    faccel.print(f"steps {step}  updates skipped {scaler.num_skipped}", ctx=ctx)
    faccel.print(f"distance {distance:.4f}", ctx=ctx)


if __name__ == "__main__":
    with faccel.init() as ctx:
        main(ctx)
