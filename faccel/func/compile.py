"""A step as one compiled graph."""

from __future__ import annotations

from typing import Any

import torch

from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful
from faccel.func.rng_streams import InGraph, drawing_from, seeded
from faccel.func.train_state import TrainState, check_state
from faccel.func.train_step import Metrics, Step
from faccel.tree import Tree


@effectful(COLLECTIVE)
def compiled(step: Step, ctx: DistContext, **options: Any) -> Step:
    """Return `torch.compile(step, fullgraph=True)` that may draw random numbers, too.

    A graph of torch's can only draw from the generator of the process; this seeds it from the state for each step, and
    puts it back. The numbers are others than those of the eager step, and as repeatable.

    Effects: collective. What is returned is, as `step` is.

    Args:
        step: From `make_step`, `ensemble`, `sam` and their like.
        ctx: The world.
        **options: Of `torch.compile`: `mode`, `backend`, ...

    Returns:
        `step(state, batch) -> (metrics, state)`, compiled at its first call for each shape of a batch.

    Examples:
        >>> from faccel.func import compiled, init_state, make_step, sgd
        >>> from faccel.testing import fake_context
        >>> ctx, model = fake_context(0, 1), torch.nn.Linear(2, 1, bias=False)
        >>> def loss_fn(params, batch, generator):
        ...     return (batch @ params["weight"].T).square().mean()
        >>> step = compiled(make_step(loss_fn, sgd(0.1), ctx), ctx, backend="eager")
        >>> metrics, state = step(init_state(model, sgd(0.1), ctx, seed=0), torch.ones(4, 2))
        >>> int(state.step)
        1
    """
    graph: Any = torch.compile(step, fullgraph=True, **options)
    own, in_graph = torch.Generator(ctx.device), InGraph()

    def run(state: TrainState, batch: Tree) -> tuple[Metrics, TrainState]:
        check_state(state)
        with drawing_from(seeded(own, state.seed, state.step, ctx)):
            return graph(state, batch, in_graph)

    return run
