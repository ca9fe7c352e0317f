"""Learning to learn: losses that are those of what a few steps of training lead to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict

from faccel.errors import ConfigError, OptimizerError
from faccel.func.gradient_transformation import GradientTransformation, apply_updates
from faccel.func.rng_streams import Stream
from faccel.func.tensordicts import named, tensordict
from faccel.tree import Tree

Loss = Callable[[TensorDict, Any, Any], torch.Tensor]


def adapt(
    loss_fn: Loss, transformation: GradientTransformation, *, num_steps: int
) -> Callable[[TensorDict, Tree, Stream], TensorDict]:
    """Return the function that makes `num_steps` steps of training on one batch.

    Effects: pure. It can be differentiated, as `maml` does.

    Args:
        loss_fn: `loss_fn(params, batch, generator) -> loss`.
        transformation: The optimizer of these steps; it starts afresh.
        num_steps: How many.

    Returns:
        `fn(params, batch, generator) -> params`.

    Examples:
        >>> from faccel.func import adapt, sgd
        >>> def loss_fn(params, batch, generator):
        ...     return (params["w"] - batch).square()
        >>> params = TensorDict({"w": torch.zeros(())})
        >>> adapt(loss_fn, sgd(0.25), num_steps=2)(params, torch.tensor(1.0), torch.Generator())["w"]
        tensor(0.7500)
    """
    if num_steps < 1:
        raise ConfigError(
            "at least one step is made", got=f"num_steps={num_steps}", fix="use 1 or more"
        )
    if not transformation.makes_params:
        raise OptimizerError(
            "steps need an optimizer", got=f"`{transformation.name}`", fix="write `sgd(0.1)`"
        )

    def run(params: TensorDict, batch: Tree, generator: Stream) -> TensorDict:
        opt = transformation.init(params)
        for _ in range(num_steps):

            def loss_of(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
                return loss_fn(tensordict(tensors), batch, generator)

            grads = tensordict(torch.func.grad(loss_of)(named(params)))
            updates, opt = transformation.update(grads, opt, params)
            params = apply_updates(params, updates)
        return params

    return run


def maml(loss_fn: Loss, transformation: GradientTransformation, *, num_steps: int) -> Loss:
    """Return the loss whose minimum is a good place to start from: MAML (Finn, Abbeel and Levine, 2017).

    It is a loss function like any other, for `make_step`: of each task it makes `num_steps` steps on the first half of
    the batch, and is the mean loss of the second half then. Gradients pass through these steps.

    Effects: pure.

    Args:
        loss_fn: `loss_fn(params, batch, generator) -> loss` of one task.
        transformation: The optimizer of the inner steps.
        num_steps: How many inner steps.

    Returns:
        `meta_loss(params, (support, query), generator)`, where both are batches of tasks: tensors `T[tasks, ...]`.
        Tasks are computed together; of several data ranks each takes its own.

    Examples:
        >>> from faccel.func import adam, init_state, functional_call, make_step, maml, sgd
        >>> from faccel.testing import fake_context
        >>> ctx, model = fake_context(0, 1), torch.nn.Linear(1, 1)
        >>> def loss_fn(params, batch, generator):
        ...     x, y = batch
        ...     return (functional_call(model, params, x) - y).square().mean()
        >>> step = make_step(maml(loss_fn, sgd(0.1), num_steps=3), adam(1e-3), ctx)
        >>> tasks = torch.randn(4, 10, 1), torch.randn(4, 10, 1)
        >>> metrics, state = step(init_state(model, adam(1e-3), ctx, seed=0), (tasks, tasks))
    """
    learn = adapt(loss_fn, transformation, num_steps=num_steps)

    def meta_loss(params: TensorDict, batch: Tree, generator: Stream) -> torch.Tensor:
        def of_task(tensors: dict[str, torch.Tensor], support: Tree, query: Tree) -> torch.Tensor:
            return loss_fn(learn(tensordict(tensors), support, generator), query, generator)

        support, query = batch
        losses = torch.vmap(of_task, in_dims=(None, 0, 0), randomness="different")(
            named(params), support, query
        )
        return losses.mean()

    return meta_loss
