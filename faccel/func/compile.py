"""A training step as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful
from faccel.func.rng_streams import GraphGenerator, as_default_generator, reseed
from faccel.func.train_state import TrainState, check_state
from faccel.func.train_step import Metrics, Step
from faccel.tree import Tree


@effectful(COLLECTIVE)
def compiled(step: Step, ctx: DistContext, **options: Any) -> Step:
    """Return `torch.compile(step, fullgraph=True)` for a step that may draw random numbers.

    A compiled graph can only draw from the default generator. The returned step seeds it from the
    state before each call and restores it afterwards. The numbers differ from those of the eager
    step, and they are as repeatable.

    Effects: collective. The returned step has the effects of `step`.

    Args:
        step: From `make_step`, `ensemble`, `sam`, `dp_sgd`.
        ctx: The context.
        **options: Options of `torch.compile`: `mode`, `backend`, ... `dynamic` is False unless
            given: there is one graph for each batch shape. With `dynamic=None` the second shape
            is compiled for any size, which PyTorch cannot do for random layers under `vmap`.

    Returns:
        `step(state, batch) -> (metrics, state)`, compiled at its first call for each batch shape.

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
    require_context(ctx, "faccel.func.compiled(step, ctx)")
    options.setdefault("dynamic", False)
    graph: Callable[..., tuple[Metrics, TrainState]] = torch.compile(
        step, fullgraph=True, **options
    )
    # Made once: making a generator takes longer than seeding it.
    step_generator = torch.Generator(ctx.device)
    graph_generator = GraphGenerator()

    def run(
        state: TrainState, batch: Tree, generator: torch.Generator | None = None
    ) -> tuple[Metrics, TrainState]:
        check_state(state)
        if generator is None:
            generator = reseed(step_generator, state.seed, state.step, ctx)
        # A graph has no access to a `torch.Generator` object, only to the default one.
        with as_default_generator(generator):
            # Passed so that layers and losses that draw are accepted while tracing.
            return graph(state, batch, graph_generator)

    return run
