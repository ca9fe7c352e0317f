"""Second derivatives: products with the Hessian, the sharpness of a minimum, and a step that looks for flat ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict

from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError
from faccel.func.grad import Differentiate, LossSpec, Outcome, Task, Weight, gradient
from faccel.func.gradient_transformation import GradientTransformation
from faccel.func.rng_streams import Stream, again
from faccel.func.tensordicts import check_like, named, tensordict
from faccel.func.train_step import Step, step_along
from faccel.func.transforms import global_norm
from faccel.tree import Tree


def _along(vector: Mapping[str, torch.Tensor]) -> Differentiate:
    """Return what differentiates a loss twice: the gradient of its derivative along `vector`."""

    def differentiate(
        run: Callable[[Mapping[str, torch.Tensor]], Any], params: dict[str, torch.Tensor]
    ) -> Any:
        def slope(tracked: dict[str, torch.Tensor]) -> Any:
            grads, loss = torch.func.grad(lambda p: (run(p)[0],) * 2, has_aux=True)(tracked)
            total = sum(
                ((grads[name] * vector[name]).sum() for name in tracked), torch.zeros(()).to(loss)
            )
            return total, loss

        products, loss = torch.func.grad(slope, has_aux=True)(params)
        return loss.detach(), (None, None), {name: each.detach() for name, each in products.items()}

    return differentiate


@effectful(COLLECTIVE)
def hessian_vector_product(
    loss_fn: Callable[..., torch.Tensor],
    ctx: DistContext,
    *,
    weight: Weight | None = None,
    num_micro_batches: int = 1,
) -> Callable[[TensorDict, TensorDict, Tree, Stream], TensorDict]:
    """Return the function that multiplies the Hessian of a loss with a vector (Pearlmutter, 1994).

    Effects: collective. What is returned is: the product is that of the mean loss of all data ranks.

    Args:
        loss_fn: As in `value_and_grad`, likewise the others.
        ctx: The world.
        weight: What a batch counts on this rank; the loss is then a sum.
        num_micro_batches: MicroBatch-batches of a batch.

    Returns:
        `fn(params, vector, batch, generator) -> product`, TensorDicts of one structure. The Hessian is never made: it
        costs about two gradients.

    Examples:
        >>> from faccel.func import hessian_vector_product
        >>> from faccel.testing import fake_context
        >>> def loss_fn(params, batch, generator):
        ...     return (params["w"] ** 2 * batch).sum()
        >>> w, batch = TensorDict({"w": torch.ones(2)}), torch.tensor([1.0, 3.0])
        >>> hessian_vector_product(loss_fn, fake_context(0, 1))(w, w, batch, torch.Generator())["w"]
        tensor([2., 6.])
    """
    spec = LossSpec(loss_fn, weight=weight, num_micro_batches=num_micro_batches)

    def run(params: TensorDict, vector: TensorDict, batch: Tree, generator: Stream) -> TensorDict:
        check_like(params, vector, "vector")
        way = _along(named(vector))
        return tensordict(
            gradient(Task(spec, ctx, params, batch, generator), differentiate=way).grads
        )

    return run


@effectful(COLLECTIVE)
def sharpness(
    loss_fn: Callable[..., torch.Tensor],
    ctx: DistContext,
    *,
    num_iterations: int = 20,
    weight: Weight | None = None,
    num_micro_batches: int = 1,
) -> Callable[[TensorDict, Tree, Stream], torch.Tensor]:
    """Return the function that estimates the eigenvalue of the Hessian of largest magnitude, by power iteration.

    Effects: collective. What is returned is.

    Args:
        loss_fn: As in `value_and_grad`, likewise `weight` and `num_micro_batches`.
        ctx: The world.
        num_iterations: Products with the Hessian, each with the same random numbers.
        weight: What a batch counts on this rank; the loss is then a sum.
        num_micro_batches: MicroBatch-batches of a batch.

    Returns:
        `fn(params, batch, generator) -> T[]`, the same on every rank.

    Examples:
        >>> from faccel.func import sharpness
        >>> from faccel.testing import fake_context
        >>> def loss_fn(params, batch, generator):
        ...     return (params["w"] ** 2 * batch).sum()
        >>> w, batch = TensorDict({"w": torch.ones(2)}), torch.tensor([1.0, 3.0])
        >>> sharpness(loss_fn, fake_context(0, 1))(w, batch, torch.Generator())
        tensor(6.)
    """
    if num_iterations < 1:
        raise ConfigError("at least one iteration is made", got=str(num_iterations), fix="use 20")
    product = hessian_vector_product(
        loss_fn, ctx, weight=weight, num_micro_batches=num_micro_batches
    )

    def run(params: TensorDict, batch: Tree, generator: Stream) -> torch.Tensor:
        start = torch.Generator(ctx.device).manual_seed(0)  # one direction on every rank
        vector = tensordict(
            {
                n: torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=start)
                for n, p in named(params).items()
            }
        )
        value = torch.zeros(())
        for _ in range(num_iterations):
            vector = _scaled(vector, 1.0 / global_norm(vector).clamp(min=1e-30))
            image = product(params, vector, batch, again(generator))
            value = torch.stack([(vector[name] * each).sum() for name, each in image.items()]).sum()
            vector = image
        return value

    return run


def _scaled(tree: TensorDict, factor: torch.Tensor) -> TensorDict:
    return tensordict({name: each * factor for name, each in tree.items()})


@effectful(COLLECTIVE)
def sam(
    loss_fn: Callable[..., Any],
    transformation: GradientTransformation,
    ctx: DistContext,
    *,
    rho: float = 0.05,
    has_aux: bool = False,
    has_buffers: bool = False,
    weight: Weight | None = None,
    num_micro_batches: int = 1,
    donate: bool = False,
) -> Step:
    """Return the sharpness-aware step (Foret et al., 2021, arXiv:2010.01412), which costs two gradients.

    The gradient is taken where the loss is about the highest within `rho` of the parameters. Uphill is the direction of
    the gradient of all data ranks, so that any number of them trains alike; loss and new buffers are those of the
    parameters themselves, and both gradients see the same random numbers.

    Effects: collective. What is returned is, as in `make_step`.

    Args:
        loss_fn: As in `make_step`, likewise all but `rho`.
        transformation: The optimizer, or a chain with one.
        ctx: The world.
        rho: How far uphill, as 2-norm over all parameters.
        has_aux: As in `make_step`.
        has_buffers: As in `make_step`.
        weight: As in `make_step`.
        num_micro_batches: As in `make_step`.
        donate: As in `make_step`.

    Raises:
        ConfigError: `rho` is not positive.

    Examples:
        >>> from faccel.func import functional_call, init_state, sam, sgd
        >>> from faccel.testing import fake_context
        >>> ctx, model = fake_context(0, 1), torch.nn.Linear(2, 1)
        >>> def loss_fn(params, batch, generator):
        ...     return functional_call(model, params, batch).square().mean()
        >>> step = sam(loss_fn, sgd(0.1), ctx, rho=0.05)
        >>> metrics, state = step(init_state(model, sgd(0.1), ctx, seed=0), torch.ones(4, 2))
    """
    if not rho > 0:
        raise ConfigError("`rho` must be positive", got=str(rho), fix="use `make_step` for none")

    def direction(task: Task) -> Outcome:
        same = again(task.generator)
        here = gradient(task)
        factor = rho / (global_norm(tensordict(here.grads)) + 1e-12)
        there = tensordict(
            {name: param + factor * here.grads[name] for name, param in named(task.params).items()}
        )
        return here._replace(
            grads=gradient(task._replace(params=there, generator=same, by_value=False)).grads
        )

    spec = LossSpec(loss_fn, has_buffers, has_aux, weight, num_micro_batches)
    return step_along(direction, spec, transformation, ctx, donating=donate)
