"""Memory of parameters, gradients and AdamW states: replicated by DDP, sharded by FSDP2."""

import ctypes
import gc

import pytest
import torch
from torch import nn

import faccel
from tests.memory import DeepNet, status
from tests.ranks import run_ranks

WIDTH, DEPTH = 1024, 8  # 8.4 million parameters, 34 MB in fp32
PARAMETERS = DEPTH * (WIDTH * WIDTH + WIDTH) * 4


def reset_peak():
    """Reset the peak of the process, and let glibc return the pages of freed tensors at once."""
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
    """Return the additional memory of training at its peak, in sizes of the parameters."""
    x = torch.ones(2, WIDTH)
    # a first step, so that PyTorch's one-time allocations do not count
    train(faccel.wrap(nn.Linear(WIDTH, 4), ctx), ctx, x)
    gc.collect()
    reset_peak()
    before = status("VmRSS")
    with torch.device("meta" if ctx.rank and ctx.mesh.spec.dp_shard > 1 else "cpu"):
        net = DeepNet(WIDTH, DEPTH)
    model = faccel.wrap(net, ctx)
    reset_peak()
    train(model, ctx, x)
    return (status("VmHWM") - before) / PARAMETERS


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_fsdp_divides_the_memory_of_a_rank_by_the_world_size(world_size):
    """DDP stores 4 times the parameters.

    FSDP2 stores `4 / world_size`, and full units while it gathers and reduces them.
    """
    replicated = max(run_ranks(peak, world_size))
    sharded = run_ranks(peak, world_size, mesh=f"dp_shard={world_size}")[-1]
    assert 3.9 < replicated < 4.6, replicated
    assert 3.9 / world_size < sharded < 4 / world_size + 6 / DEPTH, sharded
