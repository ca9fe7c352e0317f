"""Gradients of each sample of a batch, and differentially private training with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict

from faccel.checks import positive
from faccel.context import DistContext, require_context
from faccel.data.batch import Batch
from faccel.data.batch_split import split_batch
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError
from faccel.func.grad import GradInputs, LossAndGrads, LossSums, mean_over_ranks
from faccel.func.gradient_transformation import GradientTransformation, is_traced
from faccel.func.loss import LossFunction, LossOptions, call_loss
from faccel.func.rng_streams import RandomSource
from faccel.func.tensordicts import NamedTensors, flat_dict, to_tensordict
from faccel.func.train_step import Step, build_step
from faccel.tree import Tree, flatten


def per_sample_grads(
    loss_fn: LossFunction, ctx: DistContext
) -> Callable[[TensorDict, Tree, RandomSource], tuple[torch.Tensor, TensorDict]]:
    """Return the function that computes loss and gradient of each sample of this rank's batch.

    It is one batched computation, `vmap` over `grad`.

    Effects: pure.

    Args:
        loss_fn: `loss_fn(params, batch, generator) -> loss`, as in `make_step`. It is called with
            batches of one row.
        ctx: The context, for its precision.

    Returns:
        `fn(params, batch, generator) -> (losses, grads)`: `T[n]`, and `T[n, ...]` for each
        parameter. Each sample draws its own random numbers.

    Examples:
        >>> from faccel.func import per_sample_grads
        >>> from faccel.testing import fake_context
        >>> def loss_fn(params, batch, generator):
        ...     return (params["w"] * batch).square().mean()
        >>> params, batch = TensorDict({"w": torch.tensor(1.0)}), torch.tensor([1.0, 2.0])
        >>> grad_fn = per_sample_grads(loss_fn, fake_context(0, 1))
        >>> losses, grads = grad_fn(params, batch, torch.Generator())
        >>> losses, grads["w"]
        (tensor([1., 4.]), tensor([2., 8.]))
    """
    require_context(ctx, "faccel.func.per_sample_grads(loss_fn, ctx)")
    options = LossOptions(loss_fn)

    def run(
        params: TensorDict, batch: Tree, generator: RandomSource
    ) -> tuple[torch.Tensor, TensorDict]:
        leaves, rebuild = flatten(batch)
        # leaves without dim 0 are the same for all samples
        rows = {i: leaf for i, leaf in enumerate(leaves) if torch.is_tensor(leaf) and leaf.ndim}

        def sample_loss(tracked: NamedTensors, sample: dict[int, torch.Tensor]) -> Tree:
            sample_leaves = list(leaves)
            for i, row in sample.items():
                sample_leaves[i] = row[None]  # vmap removed dim 0
            sample_batch = rebuild(sample_leaves)
            loss = call_loss(options, tracked, sample_batch, generator, None, ctx)[0]
            return loss, loss

        # The loss as auxiliary output, because `grad` returns gradients only.
        grad_fn = torch.func.grad(sample_loss, has_aux=True)
        # All samples use the same parameters (None); rows are mapped over dim 0.
        batched = torch.vmap(grad_fn, in_dims=(None, 0), randomness="different")
        grads, losses = batched(flat_dict(params), rows)
        if not is_traced(params):
            # Outside of transforms no caller differentiates them.
            losses = losses.detach()
        return losses, to_tensordict(grads, [len(losses)])

    return run


def clip_per_sample(grads: TensorDict, max_norm: float) -> TensorDict:
    """Scale the gradient of each sample so that its norm over all parameters is at most `max_norm`.

    Effects: pure.

    Args:
        grads: `T[n, ...]` for each parameter, from `per_sample_grads`.
        max_norm: Largest 2-norm of the gradient of one sample.

    Examples:
        >>> from faccel.func import clip_per_sample
        >>> clip_per_sample(TensorDict({"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}), 1.0)["w"]
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    # [n, numel] of each parameter: its norms, then the norm over all parameters. `reshape(n, -1)`
    # fails for n = 0; the new last dim is for 0-d parameters.
    rows = [grad.unsqueeze(-1).flatten(1) for grad in flat_dict(grads).values()]
    norms = torch.stack([row.norm(dim=1) for row in rows]).norm(dim=0)
    # the smallest normal number: a gradient of 0 stays 0
    factors = (max_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    clipped: NamedTensors = {}
    for name, grad in flat_dict(grads).items():
        row_factors = factors.to(grad.dtype).view(-1, *[1] * (grad.ndim - 1))
        clipped[name] = grad * row_factors
    return to_tensordict(clipped, grads.batch_size)


@effectful(COLLECTIVE)
def dp_sgd(
    loss_fn: LossFunction,
    transformation: GradientTransformation,
    ctx: DistContext,
    *,
    clip_norm: float,
    noise_multiplier: float,
    num_micro_batches: int = 1,
    donate: bool = False,
) -> Step:
    """Return the step of differentially private training (Abadi et al., 2016, arXiv:1607.00133).

    The gradient of each sample is clipped to `clip_norm`. To their sum over all ranks the step
    adds Gaussian noise of standard deviation `noise_multiplier * clip_norm`, and divides by the
    number of samples. Rows that are padding (beyond `Batch.num_valid`) do not count.

    An accountant, such as Opacus's, computes the privacy of a whole run from `noise_multiplier`,
    the sampling rate and the number of steps. Its guarantee requires batches that are sampled at
    random.

    Effects: collective. The returned step has the effects of the one of `make_step`.

    Args:
        loss_fn: As in `per_sample_grads`.
        transformation: As in `make_step`.
        ctx: The context.
        clip_norm: Largest 2-norm of the gradient of one sample.
        noise_multiplier: Standard deviation of the noise, in units of `clip_norm`; 0 is no privacy.
        num_micro_batches: How many micro-batches a batch is cut into. Per-sample gradients of one
            micro-batch are in memory at a time.
        donate: As in `make_step`.

    Raises:
        ConfigError: `clip_norm` is not positive, or `noise_multiplier` is negative.

    Examples:
        >>> from faccel.func import functional_call, dp_sgd, init_state, sgd
        >>> from faccel.testing import fake_context
        >>> ctx, model = fake_context(0, 1), torch.nn.Linear(2, 1)
        >>> def loss_fn(params, batch, generator):
        ...     return functional_call(model, params, batch).square().mean()
        >>> step = dp_sgd(loss_fn, sgd(0.1), ctx, clip_norm=1.0, noise_multiplier=1.1)
        >>> metrics, state = step(init_state(model, sgd(0.1), ctx, seed=0), torch.ones(4, 2))
        >>> int(state.step)
        1
    """
    require_context(ctx, "faccel.func.dp_sgd(loss_fn, transformation, ctx)")
    positive("clip_norm", clip_norm)
    if not noise_multiplier >= 0:
        raise ConfigError(
            "`noise_multiplier` must be at least 0",
            got=f"noise_multiplier={noise_multiplier}",
            fix="use `noise_multiplier=1.0`, or 0.0 for no privacy",
        )
    sample_grads = per_sample_grads(loss_fn, ctx)
    # W ranks add independent noise: variances add up, so each has 1/W of the variance.
    noise_std = noise_multiplier * clip_norm / ctx.data_world_size**0.5

    def local_sums(inputs: GradInputs) -> LossSums:
        params = flat_dict(inputs.params)
        grad_sums = {name: torch.zeros_like(param) for name, param in params.items()}
        loss_sum = torch.zeros(())
        count = 0
        for micro_batch in split_batch(inputs.batch, num_micro_batches, is_mean=False):
            is_padded = isinstance(micro_batch, Batch)
            data = micro_batch.data if is_padded else micro_batch
            losses, grads = sample_grads(inputs.params, data, inputs.generator)
            num_valid = micro_batch.num_valid if is_padded else len(losses)
            clipped = clip_per_sample(grads, clip_norm)
            # Padding is at the end, so valid rows are the first ones.
            for name in grad_sums:
                grad_sums[name] = grad_sums[name] + clipped[name][:num_valid].sum(0)
            loss_sum = loss_sum.to(losses) + losses[:num_valid].sum()
            count += num_valid
        # Noise once per step and rank, after all micro-batches, from the rank's own generator.
        if noise_std:
            for name, grad_sum in grad_sums.items():
                noise = _noise_like(grad_sum, inputs.generator)
                grad_sums[name] = grad_sum + noise_std * noise
        return LossSums(loss_sum, grad_sums, count, None, None)

    def gradient_fn(inputs: GradInputs) -> LossAndGrads:
        # Clipping needs true norms, so the loss is not scaled.
        return mean_over_ranks(inputs._replace(loss_scale=1.0), local_sums)

    # The weight only selects the division by the count, which `local_sums` returns itself.
    options = LossOptions(loss_fn, weight=len, num_micro_batches=num_micro_batches)
    return build_step(gradient_fn, options, transformation, ctx, donate=donate)


def _noise_like(tensor: torch.Tensor, generator: RandomSource) -> torch.Tensor:
    """Return Gaussian noise of standard deviation 1 in the shape of a tensor."""
    if isinstance(generator, torch.Generator):
        return torch.randn(
            tensor.shape, dtype=tensor.dtype, device=tensor.device, generator=generator
        )
    # Under a transform: raises, unless `compiled` has seeded the default generator.
    generator.check_draw("Gaussian noise")
    return torch.randn_like(tensor)
