"""Several models in one step: states stacked along a new dim 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError, ModelError
from faccel.func.gradient_transformation import is_traced
from faccel.func.rng_streams import Stream, seeded
from faccel.func.tensordicts import leaves
from faccel.func.train_state import TrainState, check_state, leaves_of, state_of
from faccel.func.train_step import Metrics, Step
from faccel.tree import Tree, map_leaves


def stack(states: Sequence[TrainState]) -> TrainState:
    """Return one state that holds several, each tensor `T[k, ...]`.

    Effects: pure. Always fresh.

    Raises:
        ModelError: The states have other leaves or shapes; names the leaf.

    Examples:
        >>> from faccel.func import init_state, sgd, stack
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> states = [init_state(torch.nn.Linear(2, 1), sgd(0.1), ctx, seed=i) for i in range(3)]
        >>> stack(states).params["weight"].shape
        torch.Size([3, 1, 2])
    """
    if not states:
        raise ModelError(
            "an ensemble has at least one state", fix="write `stack([init_state(...), ...])`"
        )
    for each in states:
        check_state(each)
    named = [leaves(leaves_of(each)) for each in states]
    for other in named[1:]:
        for name in named[0].keys() ^ other.keys():
            raise ModelError(
                "these states are not of one model",
                got=f"`{name}` in some only",
                fix="stack equal models",
            )
        for name, leaf in named[0].items():
            if other[name].shape != leaf.shape or other[name].dtype != leaf.dtype:
                got = f"`{name}`: {tuple(leaf.shape)} {leaf.dtype} and {tuple(other[name].shape)} {other[name].dtype}"
                raise ModelError(
                    "these states are not of one model", got=got, fix="stack equal models"
                )
    return state_of(_zipped([leaves_of(each) for each in states]), states[0].scaler, [len(states)])


def _zipped(trees: list[Any]) -> Any:
    if isinstance(trees[0], torch.Tensor):
        return torch.stack(trees)
    return {name: _zipped([tree[name] for tree in trees]) for name in trees[0]}


def unstack(states: TrainState) -> list[TrainState]:
    """Return the states of an ensemble.

    Effects: pure. They alias the ensemble.

    Examples:
        >>> from faccel.func import init_state, sgd, stack, unstack
        >>> from faccel.testing import fake_context
        >>> state = init_state(torch.nn.Linear(2, 1), sgd(0.1), fake_context(0, 1), seed=7)
        >>> [int(each.seed) for each in unstack(stack([state, state]))]
        [7, 7]
    """
    check_state(states)
    if not states.seed.ndim:
        raise ModelError(
            "this state is a single one",
            got="no stacked tensors",
            fix="unstack what `stack` returned",
        )
    held = leaves_of(states)
    return [
        state_of(map_leaves(lambda x, i=i: x[i], held), states.scaler)
        for i in range(states.seed.numel())
    ]


@effectful(COLLECTIVE)
def ensemble(step: Step, ctx: DistContext, *, batch_dim: int | None = None) -> Step:
    """Return the step that trains all models of a stacked state at once, as one batched computation.

    Effects: collective. What is returned is, as `step` is, which must not donate. One all-reduce per bucket carries the
    gradients of all models.

    Args:
        step: From `make_step` and its like.
        ctx: The world.
        batch_dim: Dim of the batch's tensors along which each model has a batch of its own; None gives all of them the
            same.

    Returns:
        `step(states, batch) -> (metrics, states)` on what `stack` returned; metrics are `T[k]`. Random numbers of the
        models differ. Compiled, it is several times faster than one model after the other.

    Raises:
        ConfigError: `states` is not stacked.

    Examples:
        >>> from faccel.func import functional_call, ensemble, init_state, make_step, sgd, stack
        >>> from faccel.testing import fake_context
        >>> ctx, models = fake_context(0, 1), [torch.nn.Linear(2, 1) for _ in range(3)]
        >>> def loss_fn(params, batch, generator):
        ...     return functional_call(models[0], params, batch).square().mean()
        >>> states = stack([init_state(model, sgd(0.1), ctx, seed=i) for i, model in enumerate(models)])
        >>> metrics, states = ensemble(make_step(loss_fn, sgd(0.1), ctx), ctx)(states, torch.ones(4, 2))
        >>> metrics["loss"].shape
        torch.Size([3])
    """

    own = torch.Generator(ctx.device)

    def run(
        states: TrainState, batch: Tree, generator: Stream | None = None
    ) -> tuple[Metrics, TrainState]:
        check_state(states)
        if states.seed.ndim != 1:
            raise ConfigError(
                "an ensemble steps several states at once",
                got="one state",
                fix="write `states = faccel.func.stack([state_a, state_b])`",
            )
        if generator is None and not is_traced():
            generator = seeded(own, states.seed, states.step, ctx)
        scaler = states.scaler

        def one(held: Any, batch: Tree) -> Any:
            metrics, new = step(state_of(held, scaler), batch, generator)
            return metrics, leaves_of(new)

        mapped = torch.vmap(one, in_dims=(0, batch_dim), randomness="different")
        metrics, held = mapped(leaves_of(states), batch)
        return metrics, state_of(held, scaler, [states.seed.numel()])

    return run
