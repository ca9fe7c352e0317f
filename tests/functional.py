"""Helpers for the tests of `faccel.func`: models, losses and training runs.

A module, so that other processes and `torch.compile` can import them by name.
"""

import torch
import torch.nn.functional as F
from torch import nn

import faccel
from faccel import func

GLOBAL_BATCH = 8


class Net(nn.Module):
    """Three linear layers, optionally with batch norm, dropout and tied weights."""

    def __init__(self, norm=False, dropout=0.0, tied=False):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(6, 6)
        self.out = nn.Linear(6, 3)
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(self.dropout(torch.tanh(self.second(self.norm(torch.tanh(self.first(x)))))))


def net(seed=0, dtype=torch.float64, **options):
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = Net(**options).to(dtype)
    torch.set_rng_state(generator_state)
    return model


def batch_of(step, ctx, dtype=torch.float64, rows=GLOBAL_BATCH):
    """Return this rank's rows of the batch of a step."""
    generator = faccel.random.generator(1, step)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(0, 3, (rows,), generator=generator)
    num_local = rows // ctx.data_world_size
    local_rows = slice(ctx.data_rank * num_local, (ctx.data_rank + 1) * num_local)
    return x[local_rows], y[local_rows]


def loss_of(model, reduction="mean"):
    def loss_fn(params, batch, generator):
        x, y = batch
        return F.cross_entropy(
            func.functional_call(model, params, x, generator=generator), y, reduction=reduction
        )

    return loss_fn


def loss_with_buffers(model):
    def loss_fn(params, batch, generator, buffers):
        x, y = batch
        out, buffers = func.functional_call(model, params, x, generator=generator, buffers=buffers)
        return F.cross_entropy(out, y), buffers

    return loss_fn


def transformation():
    return func.chain(func.clip_by_global_norm(0.5), func.adamw(1e-2), func.ema(0.9))


def run(ctx, num_steps=5, options=None, **model_options):
    """Train a few steps; return every tensor of the state and the losses."""
    model, optimizer = net(**model_options), transformation()
    state = func.init_state(model, optimizer, ctx, seed=3)
    step = func.make_step(loss_of(model), optimizer, ctx, **(options or {}))
    losses = []
    for i in range(num_steps):
        metrics, state = step(state, batch_of(i, ctx))
        losses.append(metrics["loss"])
    return func.tensordicts.named_leaves(func.train_state.state_to_dict(state)), torch.stack(losses)


def run_uneven(ctx, num_steps=3):
    """Train on different numbers of rows per rank, counted by `weight`."""
    model, optimizer = net(), transformation()
    state = func.init_state(model, optimizer, ctx, seed=3)
    num_micro_batches = 1 if ctx.data_world_size == 4 else 2  # a single row cannot be split
    step = func.make_step(
        loss_of(model, "sum"),
        optimizer,
        ctx,
        weight=lambda batch: len(batch[1]),
        num_micro_batches=num_micro_batches,
    )
    cuts = {1: [0, 8], 2: [0, 3, 8], 4: [0, 2, 4, 5, 8]}[ctx.data_world_size]
    rows = slice(cuts[ctx.data_rank], cuts[ctx.data_rank + 1])
    for i in range(num_steps):
        x, y = batch_of(i, faccel.testing.fake_context(0, 1))
        metrics, state = step(state, (x[rows], y[rows]))
    return func.tensordicts.named_leaves(func.train_state.state_to_dict(state)), metrics["loss"]


def module_path(ctx, num_steps=5, **model_options):
    """Run the same training with `wrap` and `optimizer_step`; return the parameters."""
    torch.manual_seed(0)
    model = faccel.wrap(net(**model_options), ctx)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, ctx)
    scaler = faccel.init_scaler(ctx)
    for i in range(num_steps):
        x, y = batch_of(i, ctx)
        scaler = faccel.scaled_backward(F.cross_entropy(model(x), y), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=0.5)
    return {name: p.detach() for name, p in faccel.unwrap(model).named_parameters()}
