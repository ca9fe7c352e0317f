"""`value_and_grad`: a loss function becomes one of its value and its gradients."""

from __future__ import annotations

from collections.abc import Callable

from tensordict import TensorDict

from faccel.comm.buckets import BUCKET_CAP_MB, check_replicas
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful
from faccel.func.grad import GradInputs, mean_gradient
from faccel.func.loss import LossFunction, LossOptions, Weight, check_precision
from faccel.func.rng_streams import RandomSource
from faccel.func.tensordicts import to_tensordict
from faccel.tree import Tree

ValueAndGrad = Callable[..., tuple[Tree, TensorDict]]
"""`fn(params, batch, generator) -> (loss, grads)`."""


@effectful(COLLECTIVE)
def value_and_grad(
    loss_fn: LossFunction,
    ctx: DistContext,
    *,
    has_aux: bool = False,
    has_buffers: bool = False,
    weight: Weight | None = None,
    num_micro_batches: int = 1,
    bucket_cap_mb: float = BUCKET_CAP_MB,
) -> ValueAndGrad:
    """Return the function that computes a loss and its gradients, averaged over all data ranks.

    Effects: collective. The returned function is, too: one all-reduce per bucket of gradients,
    which also carries the loss.

    Args:
        loss_fn: `loss_fn(params, batch, generator) -> loss`, a 0-d tensor. It must be pure. It
            runs in the precision of the context.
        ctx: The context; its mesh must have replicas only.
        has_aux: Whether it returns `(loss, aux)`. `aux` is this rank's, detached; of several
            micro-batches its tensors are stacked.
        has_buffers: Whether it is `loss_fn(params, batch, generator, buffers)` and returns new
            buffers after the loss. Floating-point buffers are averaged over the data ranks.
        weight: Returns the number of rows or tokens of this rank's batch, as in `windows`; it may
            be 0. The loss must then be a *sum* over them. Value and gradients are those of the
            mean over all ranks, exact for any numbers. Without it the loss must be a mean, and
            all ranks have equal weight.
        num_micro_batches: How many micro-batches a batch is cut into along dim 0. Activations
            of one micro-batch are in memory at a time.
        bucket_cap_mb: Size of the buckets in which gradients of one dtype are reduced, in MiB.

    Returns:
        `fn(params, batch, generator)` that returns `(loss, grads)`, equal on all ranks. With
        `has_aux` it returns `((loss, aux), grads)`. With `has_buffers` it takes `buffers` last
        and returns `(loss, buffers)` or `(loss, buffers, aux)` first.

    Raises:
        ConfigError: The mesh shards parameters or work, or a number is not positive.
        DataError: In the returned function: a batch cannot be cut into so many micro-batches.
        ModelError: In the returned function: the loss is no 0-d tensor, or does not depend on the
            parameters.
        PurityError: In the returned function: the loss function drew from PyTorch's default
            generator, wrote to an argument, or drew from NumPy's or Python's generator. The last
            two are detected in debug mode, and by the first call of a step.

    Examples:
        >>> import torch
        >>> from faccel.func import value_and_grad
        >>> from faccel.testing import simulate
        >>> params = TensorDict({"w": torch.tensor(2.0)})
        >>> def loss_fn(params, batch, generator):
        ...     return (params["w"] * batch).sum()
        >>> def run(ctx):  # rank 0 has one row, rank 1 has two
        ...     batch = torch.arange(1.0 + ctx.rank)
        ...     return value_and_grad(loss_fn, ctx, weight=len)(params, batch, torch.Generator())
        >>> loss, grads = simulate(run, 2)[0]
        >>> loss, grads["w"]
        (tensor(0.6667), tensor(0.3333))
    """
    require_context(ctx, "faccel.func.value_and_grad(loss_fn, ctx)")
    check_precision(ctx)
    check_replicas(ctx, "use `faccel.wrap` and `faccel.scaled_backward`")
    options = LossOptions(loss_fn, has_buffers, has_aux, weight, num_micro_batches, bucket_cap_mb)

    def run(
        params: TensorDict,
        batch: Tree,
        generator: RandomSource,
        buffers: TensorDict | None = None,
    ) -> tuple[Tree, TensorDict]:
        result = mean_gradient(GradInputs(options, ctx, params, batch, generator, buffers))
        values: list[Tree] = [result.loss]
        if has_buffers:
            values.append(to_tensordict(result.buffers or {}))
        if has_aux:
            values.append(result.aux)
        value = tuple(values) if len(values) > 1 else result.loss
        return value, to_tensordict(result.grads)

    return run
