"""Several models trained by one step: states stacked along a new dim 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError, ModelError
from faccel.func.gradient_transformation import is_traced
from faccel.func.rng_streams import RandomSource, reseed
from faccel.func.tensordicts import NamedTensors, describe, named_leaves
from faccel.func.train_state import TrainState, check_state, state_from_dict, state_to_dict
from faccel.func.train_step import Metrics, Step
from faccel.tree import Tree, map_leaves


def stack(states: Sequence[TrainState]) -> TrainState:
    """Return one state with the tensors of `k` states stacked: `T[k, ...]`.

    Effects: pure. The result aliases none of them.

    Raises:
        DonatedError: A state was donated.
        ModelError: The states differ in names, shapes or dtypes; names the leaf.

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
            "`states` must have at least one state",
            got="none",
            fix="write `stack([init_state(...), ...])`",
        )
    # Nested dicts of tensors: a state also has a scaler, which is not stacked.
    trees: list[Tree] = []
    for state in states:
        check_state(state)
        trees.append(state_to_dict(state))
    first = named_leaves(trees[0])
    for tree in trees[1:]:
        _check_same_leaves(first, named_leaves(tree))
    return state_from_dict(_stack_trees(trees), states[0].scaler, [len(states)])


def _check_same_leaves(first: NamedTensors, other: NamedTensors) -> None:
    for name in first.keys() ^ other.keys():
        raise _different_models_error(f"`{name}` in some states only")
    for name, leaf in first.items():
        if describe(other[name]) != describe(leaf):
            difference = f"`{name}`: {describe(leaf)} and {describe(other[name])}"
            raise _different_models_error(difference)


def _different_models_error(got: str) -> ModelError:
    return ModelError(
        "the states belong to different models",
        got=got,
        fix="stack states of models with equal parameters, and of one optimizer",
    )


def _stack_trees(trees: list[Tree]) -> Tree:
    # Counts and seeds, 0-d, become vectors of length k; they are leaves like all others.
    if isinstance(trees[0], torch.Tensor):
        return torch.stack(trees)
    return {name: _stack_trees([tree[name] for tree in trees]) for name in trees[0]}


def unstack(states: TrainState) -> list[TrainState]:
    """Return the states of a stacked state.

    Effects: pure. The results alias it.

    Raises:
        DonatedError: The state was donated.
        ModelError: The state is not stacked.

    Examples:
        >>> from faccel.func import init_state, sgd, stack, unstack
        >>> from faccel.testing import fake_context
        >>> state = init_state(torch.nn.Linear(2, 1), sgd(0.1), fake_context(0, 1), seed=7)
        >>> [int(state.seed) for state in unstack(stack([state, state]))]
        [7, 7]
    """
    check_state(states)
    # The seed is 0-d in a single state and int64[k] in a stacked one.
    if not states.seed.ndim:
        raise ModelError(
            "`states` must be a stacked state",
            got="one state",
            fix="unstack the result of `stack`",
        )
    tensors = state_to_dict(states)
    unstacked: list[TrainState] = []
    for i in range(states.seed.numel()):
        # `i=i` binds the value: the lambda must not see the next iteration's.
        row = map_leaves(lambda tensor, i=i: tensor[i], tensors)
        unstacked.append(state_from_dict(row, states.scaler))
    return unstacked


@effectful(COLLECTIVE)
def ensemble(step: Step, ctx: DistContext, *, batch_dim: int | None = None) -> Step:
    """Return the step that trains all models of a stacked state in one batched computation.

    Effects: collective. The returned step has the effects of `step`. One all-reduce per bucket has
    the gradients of all models.

    Args:
        step: From `make_step`, `sam` or `dp_sgd`, without `donate`.
        ctx: The context.
        batch_dim: Dim of the batch's tensors that indexes the models, if each model has its own
            batch; None if all have the same.

    Returns:
        `step(states, batch) -> (metrics, states)` for the result of `stack`; metrics are `T[k]`.
        Each model draws its own random numbers. Compiled, it is several times faster than one
        model after the other.

    Raises:
        ConfigError: In the returned step: `states` is not stacked, or `step` donates.

    Examples:
        >>> from faccel.func import functional_call, ensemble, init_state, make_step, sgd, stack
        >>> from faccel.testing import fake_context
        >>> ctx, net = fake_context(0, 1), torch.nn.Linear(2, 1)
        >>> def loss_fn(params, batch, generator):
        ...     return functional_call(net, params, batch).square().mean()
        >>> states = stack([init_state(net, sgd(0.1), ctx, seed=i) for i in range(3)])
        >>> step = ensemble(make_step(loss_fn, sgd(0.1), ctx), ctx)
        >>> metrics, states = step(states, torch.ones(4, 2))
        >>> metrics["loss"].shape
        torch.Size([3])
    """
    require_context(ctx, "faccel.func.ensemble(step, ctx)")
    # One generator for all models: `randomness="different"` gives each its own numbers from it.
    ensemble_generator = torch.Generator(ctx.device)

    def run(
        states: TrainState, batch: Tree, generator: RandomSource | None = None
    ) -> tuple[Metrics, TrainState]:
        check_state(states)
        if states.seed.ndim != 1:
            raise ConfigError(
                "the step of an ensemble expects stacked states",
                got="one state",
                fix="write `states = faccel.func.stack([state_a, state_b])`",
            )
        if generator is None and not is_traced():
            generator = reseed(ensemble_generator, states.seed, states.step, ctx)
        # The same for all models; fp16 is refused by the step itself.
        scaler = states.scaler

        # vmap accepts dicts of tensors; a TrainState holds the scaler, which is not one
        def step_one(tensors: dict[str, Tree], batch: Tree) -> tuple[Metrics, dict[str, Tree]]:
            call: Tree = step  # the public type of a step does not mention `NoGenerator`
            metrics, new_state = call(state_from_dict(tensors, scaler), batch, generator)
            return metrics, state_to_dict(new_state)

        # batch_dim None: every model sees the same batch.
        step_all = torch.vmap(step_one, in_dims=(0, batch_dim), randomness="different")
        metrics, tensors = step_all(state_to_dict(states), batch)
        return metrics, state_from_dict(tensors, scaler, [states.seed.numel()])

    return run
