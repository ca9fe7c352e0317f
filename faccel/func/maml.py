"""Meta-learning: losses after a few steps of training, differentiated through these steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict

from faccel.checks import positive
from faccel.errors import OptimizerError
from faccel.func.gradient_transformation import GradientTransformation, Role, apply_updates
from faccel.func.rng_streams import RandomSource
from faccel.func.tensordicts import NamedTensors, flat_dict, to_tensordict
from faccel.tree import Tree

Loss = Callable[[TensorDict, Tree, RandomSource], torch.Tensor]


def adapt(
    loss_fn: Loss, transformation: GradientTransformation, *, num_steps: int
) -> Callable[[TensorDict, Tree, RandomSource], TensorDict]:
    """Return the function that makes `num_steps` training steps on one batch.

    `torch.func.grad` can differentiate it, as `maml` does.

    Effects: pure.

    Args:
        loss_fn: `loss_fn(params, batch, generator) -> loss`.
        transformation: The optimizer of these steps, with a new state at each call.
        num_steps: At least 1.

    Returns:
        `fn(params, batch, generator) -> params`.

    Raises:
        ConfigError: `num_steps` is not positive.
        OptimizerError: `transformation` has no optimizer.

    Examples:
        >>> from faccel.func import adapt, sgd
        >>> def loss_fn(params, batch, generator):
        ...     return (params["w"] - batch).square()
        >>> params, batch = TensorDict({"w": torch.zeros(())}), torch.tensor(1.0)
        >>> adapt(loss_fn, sgd(0.25), num_steps=2)(params, batch, torch.Generator())["w"]
        tensor(0.7500)
    """
    positive("num_steps", num_steps)
    if transformation.role is not Role.OPTIMIZER:
        raise OptimizerError(
            "`transformation` must be an optimizer, or a chain with one",
            got=f"`{transformation.name}`",
            fix="write `sgd(0.1)`",
        )

    def run(params: TensorDict, batch: Tree, generator: RandomSource) -> TensorDict:
        def batch_loss(tensors: NamedTensors) -> torch.Tensor:
            return loss_fn(to_tensordict(tensors), batch, generator)

        grad_fn = torch.func.grad(batch_loss)
        # A new optimizer state for each call: tasks must not affect each other.
        opt = transformation.init(params)
        for _ in range(num_steps):
            # `torch.func.grad` nests, so that an outer `grad` differentiates these steps.
            grads = to_tensordict(grad_fn(flat_dict(params)))
            updates, opt = transformation.update(grads, opt, params)
            params = apply_updates(params, updates)
        return params

    return run


def maml(loss_fn: Loss, transformation: GradientTransformation, *, num_steps: int) -> Loss:
    """Return the meta-loss of MAML (Finn, Abbeel and Levine, 2017, arXiv:1703.03400).

    For each task it makes `num_steps` steps on the support set, and returns the mean loss on the
    query set afterwards. Gradients pass through these steps, so that minimizing it finds
    parameters from which few steps lead far. It is a loss function for `make_step`.

    Effects: pure.

    Args:
        loss_fn: `loss_fn(params, batch, generator) -> loss` of one task.
        transformation: The optimizer of the inner steps.
        num_steps: Inner steps, at least 1.

    Returns:
        `meta_loss(params, (support, query), generator)`. Both are batches of tasks, with tensors
        `T[tasks, ...]`, computed in one batch. Each data rank has its own tasks.

    Raises:
        ConfigError: `num_steps` is not positive.
        OptimizerError: `transformation` has no optimizer.

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
        >>> int(state.step)
        1
    """
    inner_steps = adapt(loss_fn, transformation, num_steps=num_steps)

    def meta_loss(params: TensorDict, batch: Tree, generator: RandomSource) -> torch.Tensor:
        def task_loss(tensors: NamedTensors, support: Tree, query: Tree) -> torch.Tensor:
            adapted = inner_steps(to_tensordict(tensors), support, generator)
            return loss_fn(adapted, query, generator)

        # The support set is trained on, the query set is evaluated.
        support, query = batch
        # one set of parameters, many tasks
        batched = torch.vmap(task_loss, in_dims=(None, 0, 0), randomness="different")
        return batched(flat_dict(params), support, query).mean()

    return meta_loss
