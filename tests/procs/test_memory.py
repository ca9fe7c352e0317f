"""What a rank holds: parameters, gradients and the two states of AdamW, whole under DDP and a share under FSDP2."""

import ctypes
import gc

import pytest
import torch
from torch import nn

import faccel
from tests.ranks import run_ranks

WIDTH, DEPTH = 1024, 8  # 8.4 million parameters, 34 MB in fp32
PARAMETERS = DEPTH * (WIDTH * WIDTH + WIDTH) * 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def exactly():
    """Let large tensors be pages of their own, given back when they are freed, and forget the peak until now."""
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def train(model, ctx, x, steps=2):
    opt = faccel.wrap_optimizer(torch.optim.AdamW(model.parameters(), fused=True), model, ctx)
    scaler = faccel.init_scaler(ctx)
    for _ in range(steps):
        scaler = faccel.scaled_backward(model(x).sum(), scaler, ctx)
        faccel.optimizer_step(opt, scaler, ctx)


def peak(ctx):
    """The most that a rank holds while it trains, in sizes of the parameters, beyond what it held before."""
    x = torch.ones(2, WIDTH)
    train(
        faccel.wrap(nn.Linear(WIDTH, 4), ctx), ctx, x
    )  # what torch loads and allocates the first time
    gc.collect()
    exactly()
    before = status("VmRSS")
    with torch.device("meta" if ctx.rank and ctx.mesh.spec.dp_shard > 1 else "cpu"):
        net = Net()
    model = faccel.wrap(net, ctx)
    exactly()
    train(model, ctx, x)
    return (status("VmHWM") - before) / PARAMETERS


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_memory_of_a_rank_falls_as_arithmetic_says(world_size):
    """DDP holds 4 times the parameters. FSDP2 a share of that, and whole units while they are gathered and reduced."""
    whole = max(run_ranks(peak, world_size))
    share = run_ranks(peak, world_size, mesh=f"dp_shard={world_size}")[-1]
    assert 3.9 < whole < 4.6, whole
    assert 3.9 / world_size < share < 4 / world_size + 6 / DEPTH, share
