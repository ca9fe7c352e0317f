"""Learn initial parameters from which five examples and five steps suffice for a new sine wave.

python examples/maml.py
faccel launch --cpu --nproc 2 examples/maml.py
"""

import argparse

import torch
from arguments import count
from torch import nn

import faccel
from faccel import func

TASKS = 32  # per step, over all processes
SHOTS = 5  # examples of a task
INNER_STEPS = 5
INNER_RATE = 0.02
META_RATE = 1e-2
SEED = 0


def tasks(ctx, step):
    # Sine waves of random amplitude and phase: five points to train on, twenty to evaluate.
    # Each rank has its own tasks.
    generator = faccel.random.generator(SEED, step)
    amplitude = torch.rand(TASKS, 1, 1, generator=generator) * 4.9 + 0.1
    phase = torch.rand(TASKS, 1, 1, generator=generator) * torch.pi
    x = torch.rand(TASKS, SHOTS + 20, 1, generator=generator) * 10 - 5
    y = amplitude * torch.sin(x + phase)
    local = faccel.split({"x": x, "y": y}, ctx)
    x, y = local["x"].to(ctx.device), local["y"].to(ctx.device)
    return (x[:, :SHOTS], y[:, :SHOTS]), (x[:, SHOTS:], y[:, SHOTS:])


def main(ctx, num_steps):
    faccel.seed_everything(SEED, ctx)
    net = nn.Sequential(
        nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
    ).to(ctx.device)

    def loss_fn(params, batch, generator):
        x, y = batch
        return (func.functional_call(net, params, x) - y).square().mean()

    # The meta-loss is a loss function, too: the loss after five steps on a task. Its gradient
    # passes through these steps.
    inner = func.sgd(INNER_RATE)
    meta_loss = func.maml(loss_fn, inner, num_steps=INNER_STEPS)

    optimizer = func.chain(func.clip_by_global_norm(10.0), func.adam(META_RATE))
    state = func.init_state(net, optimizer, ctx, seed=SEED)
    step = func.make_step(meta_loss, optimizer, ctx)
    for number in range(num_steps):
        metrics, state = step(state, tasks(ctx, number))
        if number % 100 == 0:
            faccel.print(
                f"step {number:4d}  loss after {INNER_STEPS} steps {metrics['loss']:.4f}", ctx=ctx
            )

    # Evaluate on new tasks, before and after the inner steps.
    support, query = tasks(ctx, num_steps)
    evaluate = func.value_and_grad(func.maml(loss_fn, inner, num_steps=INNER_STEPS), ctx)
    after, _ = evaluate(state.params, (support, query), torch.Generator())
    before, _ = func.value_and_grad(loss_fn, ctx)(state.params, query, torch.Generator())
    faccel.print(f"before {before:.4f}", ctx=ctx)
    faccel.print(f"loss {after:.4f}", ctx=ctx)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=count, default=300)
    args = parser.parse_args()
    with faccel.init() as ctx:
        main(ctx, args.steps)
