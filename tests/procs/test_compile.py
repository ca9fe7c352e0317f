"""torch.compile of a model or its units: equal losses, and no recompilation between steps."""

import functools

import pytest
import torch

import faccel
from tests.models import loss_of, model, tokens
from tests.ranks import run_ranks


def losses(ctx, compile, steps=3):
    from torch._dynamo.utils import counters

    wrapped = faccel.wrap(
        model(torch.float32, tied=False), ctx, plan=faccel.Plan(units="Block", compile=compile)
    )
    opt = faccel.wrap_optimizer(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, ctx)
    scaler = faccel.init_scaler(ctx)
    values, graphs = [], []
    for step in range(steps):
        batch = tokens(8, seed=step).chunk(ctx.data_world_size)[ctx.data_rank]
        loss = loss_of(wrapped(batch[:, :-1]), batch[:, 1:])
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        faccel.optimizer_step(opt, scaler, ctx)
        values.append(faccel.reduce(loss.detach(), ctx, op="mean").item())
        graphs.append(counters["stats"]["unique_graphs"])
    return values, graphs


@functools.cache
def eager_losses(mesh):
    return [values for values, _ in run_ranks(losses, 2, None, mesh=mesh)]


@pytest.mark.slow
@pytest.mark.parametrize("compile", ["whole", "units"])
@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
def test_compiled_training_equals_eager_training_without_recompiles(mesh, compile):
    for eager, (compiled, graphs) in zip(
        eager_losses(mesh), run_ranks(losses, 2, compile, mesh=mesh), strict=True
    ):
        assert all(abs(a - b) < 1e-4 for a, b in zip(eager, compiled, strict=True))
        assert graphs[0] > 0  # torch may silently compile nothing
        assert graphs[-1] == graphs[0]
