"""Gradients of each sample of a batch, and the step of differential privacy that is made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict

from faccel.context import DistContext
from faccel.data.source import Batch
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError
from faccel.func.grad import LossSpec, Outcome, Parts, Task, outcome, scalar_loss
from faccel.func.gradient_transformation import GradientTransformation, is_traced
from faccel.func.micro_batches import micro_batches
from faccel.func.rng_streams import Stream
from faccel.func.tensordicts import named, tensordict
from faccel.func.train_step import Step, step_along
from faccel.tree import Tree, flatten


def per_sample_grads(
    loss_fn: Callable[..., torch.Tensor], ctx: DistContext
) -> Callable[[TensorDict, Tree, Stream], tuple[torch.Tensor, TensorDict]]:
    """Return the function that gives the loss and the gradient of each sample of this rank's batch.

    Effects: pure. One batched computation (`vmap` over `grad`), not one after the other.

    Args:
        loss_fn: `loss_fn(params, batch, generator) -> loss`, as for `make_step`; here it sees batches of one row.
        ctx: The world, for the precision.

    Returns:
        `fn(params, batch, generator) -> (losses, grads)`: `T[n]`, and `T[n, ...]` for each parameter. Random numbers of
        the samples differ.

    Examples:
        >>> from faccel.func import per_sample_grads
        >>> from faccel.testing import fake_context
        >>> def loss_fn(params, batch, generator):
        ...     return (params["w"] * batch).square().mean()
        >>> params, batch = TensorDict({"w": torch.tensor(1.0)}), torch.tensor([1.0, 2.0])
        >>> losses, grads = per_sample_grads(loss_fn, fake_context(0, 1))(params, batch, torch.Generator())
        >>> losses, grads["w"]
        (tensor([1., 4.]), tensor([2., 8.]))
    """
    spec = LossSpec(loss_fn)

    def run(params: TensorDict, batch: Tree, generator: Stream) -> tuple[torch.Tensor, TensorDict]:
        leaves, rebuild = flatten(batch)
        rows = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.ndim]

        def loss_of(tracked: dict[str, torch.Tensor], sample: list[torch.Tensor]) -> Any:
            row = dict(zip(rows, sample, strict=True))
            one = rebuild([row[i][None] if i in row else leaf for i, leaf in enumerate(leaves)])
            loss = scalar_loss(spec, tracked, one, generator, None, ctx)[0]
            return loss, loss

        batched = torch.vmap(
            torch.func.grad(loss_of, has_aux=True), in_dims=(None, 0), randomness="different"
        )
        grads, losses = batched(named(params), [leaves[i] for i in rows])
        return losses.detach() if not is_traced(params) else losses, tensordict(
            grads, [len(losses)]
        )

    return run


def clip_per_sample(grads: TensorDict, max_norm: float) -> TensorDict:
    """Scale the gradient of each sample so that its norm over all parameters is at most `max_norm`.

    Effects: pure.

    Args:
        grads: `T[n, ...]` for each parameter, from `per_sample_grads`.
        max_norm: The largest 2-norm of one sample's gradient.

    Examples:
        >>> from faccel.func import clip_per_sample
        >>> clip_per_sample(TensorDict({"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}), 1.0)["w"]
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    norms = torch.stack(
        [
            grad.flatten(1).norm(dim=1) if grad.ndim > 1 else grad.abs()
            for grad in named(grads).values()
        ]
    ).norm(dim=0)
    factors = (max_norm / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    clipped = {
        n: g * factors.to(g.dtype).view(-1, *[1] * (g.ndim - 1)) for n, g in named(grads).items()
    }
    return tensordict(clipped, grads.batch_size)


@effectful(COLLECTIVE)
def dp_sgd(
    loss_fn: Callable[..., torch.Tensor],
    transformation: GradientTransformation,
    ctx: DistContext,
    *,
    clip_norm: float,
    noise_multiplier: float,
    num_micro_batches: int = 1,
    donate: bool = False,
) -> Step:
    """Return the step of differentially private training (Abadi et al., 2016, arXiv:1607.00133).

    Each sample's gradient is clipped to `clip_norm`; to their sum over all ranks comes Gaussian noise of standard
    deviation `noise_multiplier * clip_norm`, of which each rank adds its part from its own stream; the result is
    divided by the number of samples. Rows that are padding (`Batch.num_valid`) do not count. What privacy that gives
    over a whole run is computed by an accountant, such as Opacus's, from `noise_multiplier`, the sampling rate and the
    number of steps; the guarantee supposes that batches are sampled at random.

    Effects: collective. What is returned is, as in `make_step`.

    Args:
        loss_fn: As in `per_sample_grads`.
        transformation: As in `make_step`.
        ctx: The world.
        clip_norm: The largest 2-norm of one sample's gradient.
        noise_multiplier: Standard deviation of the noise, in units of `clip_norm`; 0 is no privacy.
        num_micro_batches: MicroBatch-batches of a batch: the gradients of one of them are in memory at a time.
        donate: As in `make_step`.

    Raises:
        ConfigError: A limit that is not positive, or a negative noise.

    Examples:
        >>> from faccel.func import functional_call, dp_sgd, init_state, sgd
        >>> from faccel.testing import fake_context
        >>> ctx, model = fake_context(0, 1), torch.nn.Linear(2, 1)
        >>> def loss_fn(params, batch, generator):
        ...     return functional_call(model, params, batch).square().mean()
        >>> step = dp_sgd(loss_fn, sgd(0.1), ctx, clip_norm=1.0, noise_multiplier=1.1)
        >>> metrics, state = step(init_state(model, sgd(0.1), ctx, seed=0), torch.ones(4, 2))
    """
    if not clip_norm > 0 or not noise_multiplier >= 0:
        got = f"clip_norm={clip_norm}, noise_multiplier={noise_multiplier}"
        raise ConfigError(
            "clipping is to a positive norm, and noise is not negative", got=got, fix="mend them"
        )
    grads_of = per_sample_grads(loss_fn, ctx)

    def local(task: Task) -> Parts:
        total, losses, count = (
            {n: torch.zeros_like(p) for n, p in named(task.params).items()},
            torch.zeros(()),
            0,
        )
        for micro in micro_batches(task.batch, num_micro_batches, is_mean=False):
            data = micro.data if isinstance(micro, Batch) else micro
            each, grads = grads_of(task.params, data, task.generator)
            num_valid = micro.num_valid if isinstance(micro, Batch) else len(each)
            clipped = clip_per_sample(grads, clip_norm)
            total = {name: held + clipped[name][:num_valid].sum(0) for name, held in total.items()}
            losses, count = losses.to(each) + each[:num_valid].sum(), count + num_valid
        scale = noise_multiplier * clip_norm / ctx.data_world_size**0.5
        if scale:
            total = {
                name: held + _noise(held, task.generator) * scale for name, held in total.items()
            }
        return Parts(losses, total, count, None, None)

    def direction(task: Task) -> Outcome:
        return outcome(
            task._replace(loss_scale=1.0), local
        )  # nothing is scaled: gradients are clipped one by one

    spec = LossSpec(loss_fn, weight=len, num_micro_batches=num_micro_batches)
    return step_along(direction, spec, transformation, ctx, donating=donate)


def _noise(like: torch.Tensor, generator: Stream) -> torch.Tensor:
    if isinstance(generator, torch.Generator):
        return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    generator.draw("Gaussian noise")
    return torch.randn_like(like)
