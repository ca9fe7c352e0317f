"""Second derivatives: Hessian-vector products, sharpness, and sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict

from faccel.checks import positive
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful
from faccel.func.grad import (
    Differentiate,
    GradInputs,
    LossAndGrads,
    RunLoss,
    mean_gradient,
)
from faccel.func.gradient_transformation import GradientTransformation
from faccel.func.loss import LossFunction, LossOptions, Weight
from faccel.func.rng_streams import RandomSource, clone_generator
from faccel.func.tensordicts import (
    NamedTensors,
    check_same_structure,
    flat_dict,
    to_tensordict,
)
from faccel.func.train_step import Step, build_step
from faccel.func.transforms import global_norm
from faccel.tree import Tree


def _hessian_along(vector: Mapping[str, torch.Tensor]) -> Differentiate:
    """Return the function that differentiates a loss twice: H v = d/dp (dL/dp . v)."""

    def differentiate(run: RunLoss, params: NamedTensors) -> Tree:
        def loss_twice(tracked: NamedTensors) -> Tree:
            loss = run(tracked)[0]
            return loss, loss  # the value as auxiliary output, too

        def directional_derivative(tracked: NamedTensors) -> Tree:
            grads, loss = torch.func.grad(loss_twice, has_aux=True)(tracked)
            # g . v over all parameters, in the dtype of the loss
            total = torch.zeros((), dtype=loss.dtype, device=loss.device)
            for name, grad in grads.items():
                total = total + (grad * vector[name]).sum()
            return total, loss

        # Reverse over reverse: every operation supports it; forward mode misses some.
        products, loss = torch.func.grad(directional_derivative, has_aux=True)(params)
        no_extra = (None, None)
        return loss.detach(), no_extra, {name: p.detach() for name, p in products.items()}

    return differentiate


@effectful(COLLECTIVE)
def hessian_vector_product(
    loss_fn: LossFunction,
    ctx: DistContext,
    *,
    weight: Weight | None = None,
    num_micro_batches: int = 1,
) -> Callable[[TensorDict, TensorDict, Tree, RandomSource], TensorDict]:
    """Return the function that multiplies the Hessian of a loss with a vector (Pearlmutter, 1994).

    The Hessian is never stored. A product costs about as much as two gradients.

    Effects: collective. The returned function is, too; its result is equal on all ranks.

    Args:
        loss_fn: As in `value_and_grad`.
        ctx: The context.
        weight: Returns the number of rows or tokens of this rank's batch; the loss is then a sum.
        num_micro_batches: How many micro-batches a batch is cut into.

    Returns:
        `fn(params, vector, batch, generator) -> product`, with the Hessian of the mean loss of all
        data ranks. The vector and the product have the names, shapes and dtypes of the parameters.

    Raises:
        TreeError: In the returned function: vector and parameters differ; names the leaf.

    Examples:
        >>> from faccel.func import hessian_vector_product
        >>> from faccel.testing import fake_context
        >>> def loss_fn(params, batch, generator):
        ...     return (params["w"] ** 2 * batch).sum()
        >>> w, batch = TensorDict({"w": torch.ones(2)}), torch.tensor([1.0, 3.0])
        >>> hessian_vector_product(loss_fn, fake_context(0, 1))(w, w, batch, torch.Generator())["w"]
        tensor([2., 6.])
    """
    require_context(ctx, "faccel.func.hessian_vector_product(loss_fn, ctx)")
    options = LossOptions(loss_fn, weight=weight, num_micro_batches=num_micro_batches)

    def run(
        params: TensorDict, vector: TensorDict, batch: Tree, generator: RandomSource
    ) -> TensorDict:
        check_same_structure(params, vector, "vector")
        inputs = GradInputs(options, ctx, params, batch, generator)
        result = mean_gradient(inputs, differentiate=_hessian_along(flat_dict(vector)))
        return to_tensordict(result.grads)

    return run


@effectful(COLLECTIVE)
def sharpness(
    loss_fn: LossFunction,
    ctx: DistContext,
    *,
    num_iterations: int = 20,
    weight: Weight | None = None,
    num_micro_batches: int = 1,
) -> Callable[[TensorDict, Tree, RandomSource], torch.Tensor]:
    """Return the function that estimates the eigenvalue of the Hessian of largest magnitude.

    It uses power iteration: v is replaced by H v / |v|, and v . H v tends to the eigenvalue.

    Effects: collective. The returned function is, too.

    Args:
        loss_fn: As in `value_and_grad`.
        ctx: The context.
        num_iterations: Products with the Hessian, each with the same random numbers.
        weight: Returns the number of rows or tokens of this rank's batch; the loss is then a sum.
        num_micro_batches: How many micro-batches a batch is cut into.

    Returns:
        `fn(params, batch, generator) -> T[]`, equal on all ranks.

    Raises:
        ConfigError: `num_iterations` is not positive.

    Examples:
        >>> from faccel.func import sharpness
        >>> from faccel.testing import fake_context
        >>> def loss_fn(params, batch, generator):
        ...     return (params["w"] ** 2 * batch).sum()
        >>> w, batch = TensorDict({"w": torch.ones(2)}), torch.tensor([1.0, 3.0])
        >>> sharpness(loss_fn, fake_context(0, 1))(w, batch, torch.Generator())
        tensor(6.)
    """
    require_context(ctx, "faccel.func.sharpness(loss_fn, ctx)")
    # The error of the estimate falls with (second / first eigenvalue)^iterations.
    positive("num_iterations", num_iterations)
    product = hessian_vector_product(
        loss_fn, ctx, weight=weight, num_micro_batches=num_micro_batches
    )

    def run(params: TensorDict, batch: Tree, generator: RandomSource) -> torch.Tensor:
        vector = _random_like(params, torch.Generator(ctx.device).manual_seed(0))
        eigenvalue = torch.zeros(())
        for _ in range(num_iterations):
            # a Hessian of 0 maps every vector to 0
            scale = 1.0 / global_norm(vector).clamp(min=1e-30)
            unit = to_tensordict({name: v * scale for name, v in vector.items()})
            vector = product(params, unit, batch, clone_generator(generator))
            # Rayleigh quotient of a unit vector: v . H v.
            dots = [(unit[name] * v).sum() for name, v in vector.items()]
            eigenvalue = torch.stack(dots).sum()
        return eigenvalue

    return run


def _random_like(params: TensorDict, generator: torch.Generator) -> TensorDict:
    """Return Gaussian noise in the shapes of the parameters; from one seed equal on all ranks."""
    noise: NamedTensors = {}
    for name, p in flat_dict(params).items():
        noise[name] = torch.randn(p.shape, dtype=p.dtype, device=p.device, generator=generator)
    return to_tensordict(noise)


@effectful(COLLECTIVE)
def sam(
    loss_fn: LossFunction,
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
    """Return the step of sharpness-aware minimization (Foret et al., 2021, arXiv:2010.01412).

    It applies the gradient at `params + rho * g / |g|`, where `g` is the gradient at `params`, so
    it costs two gradients. `g` is averaged over all data ranks: the result does not depend on
    their number. Loss and new buffers are those at `params`, and both gradients use the same
    random numbers.

    Effects: collective. The returned step has the effects of the one of `make_step`.

    Args:
        loss_fn: As in `make_step`.
        transformation: An optimizer, or a chain with one.
        ctx: The context.
        rho: Distance of the second gradient, as 2-norm over all parameters.
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
        >>> int(state.step)
        1
    """
    require_context(ctx, "faccel.func.sam(loss_fn, transformation, ctx)")
    positive("rho", rho)

    def gradient_fn(inputs: GradInputs) -> LossAndGrads:
        generator = clone_generator(inputs.generator)  # before the first gradient draws
        ascent = mean_gradient(inputs)
        # 1e-12 as in the paper's code: no division by a norm of 0
        factor = rho / (global_norm(to_tensordict(ascent.grads)) + 1e-12)
        perturbed: NamedTensors = {}
        for name, param in flat_dict(inputs.params).items():
            perturbed[name] = param + factor * ascent.grads[name]
        # the first call has already checked for writes
        inputs = inputs._replace(
            params=to_tensordict(perturbed), generator=generator, check_writes=False
        )
        return ascent._replace(grads=mean_gradient(inputs).grads)

    options = LossOptions(loss_fn, has_buffers, has_aux, weight, num_micro_batches)
    return build_step(gradient_fn, options, transformation, ctx, donate=donate)
