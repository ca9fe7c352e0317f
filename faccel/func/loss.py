"""A loss function with its options, and one call of it with its result checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch

from faccel.checks import positive
from faccel.comm.buckets import BUCKET_CAP_MB, check_cap
from faccel.context import DistContext
from faccel.errors import ConfigError, ModelError, short_repr
from faccel.func.rng_streams import RandomSource
from faccel.func.tensordicts import NamedTensors, check_same_structure, flat_dict, to_tensordict
from faccel.training.precision import autocast
from faccel.tree import Tree

LossFunction = Callable[..., Tree]
"""`loss_fn(params, batch, generator) -> loss`; see `value_and_grad` for its options."""

Weight = Callable[[Tree], int | float | torch.Tensor]
"""`weight(batch)`: how many rows or tokens this rank's batch has; a number or a 0-d tensor."""


@attrs.frozen(eq=False)
class LossOptions:
    """A loss function and how it is called.

    Args:
        loss_fn: `loss_fn(params, batch, generator)`, with `buffers` last if `has_buffers`.
        has_buffers: Whether it takes buffers, and returns new ones after the loss.
        has_aux: Whether it returns anything else last.
        weight: Number of rows or tokens of a batch; None if the loss is a mean.
        num_micro_batches: Micro-batches of a batch.
        bucket_cap_mb: Size of the buckets in which gradients are all-reduced, in MiB.
    """

    loss_fn: LossFunction
    has_buffers: bool = False
    has_aux: bool = False
    weight: Weight | None = None
    num_micro_batches: int = 1
    bucket_cap_mb: float = BUCKET_CAP_MB

    def __attrs_post_init__(self) -> None:
        check_cap(self.bucket_cap_mb)
        positive("num_micro_batches", self.num_micro_batches)


def call_loss(
    options: LossOptions,
    params: Mapping[str, torch.Tensor],
    batch: Tree,
    generator: RandomSource,
    buffers: Tree,
    ctx: DistContext,
) -> tuple[torch.Tensor, tuple[NamedTensors | None, Tree]]:
    """Return `(loss, (buffers, aux))` of one call of the loss function.

    Buffers are detached. What the loss function does not return is None.

    Raises:
        ModelError: It did not return a 0-d floating-point loss, and what its options require.
        TreeError: The new buffers differ from the old ones in names, shapes or dtypes.
    """
    # A new TensorDict over the same tensors: the loss function sees the type of `state.params`.
    arguments = [to_tensordict(params), batch, generator]
    if options.has_buffers:
        arguments.append(buffers)
    if ctx.compute_dtype is None:
        output = options.loss_fn(*arguments)
    else:
        # The loss, too, is computed inside of autocast, as in `faccel.autocast`.
        with autocast(ctx):
            output = options.loss_fn(*arguments)
    loss, new_buffers, aux = _split_output(options, output)
    _check_loss(loss)
    if new_buffers is None:
        return loss, (None, aux)
    # A buffer of another shape would fail only in the next step, or in a checkpoint.
    check_same_structure(buffers, new_buffers, "buffers")
    # Buffers that kept a graph would keep the activations of every step alive.
    detached = {name: buffer.detach() for name, buffer in flat_dict(new_buffers).items()}
    return loss, (detached, aux)


def check_precision(ctx: DistContext) -> None:
    """Raise for a precision that changes modules: a pure function has none.

    Raises:
        ConfigError: It does.
    """
    precision = ctx.config.mixed_precision
    if precision == "fp8" or ctx.param_dtype is not None:
        raise ConfigError(
            f"`faccel.func` does not support {precision}, which changes the layers or parameters "
            "of a module",
            got=f"mixed_precision={short_repr(precision)}",
            fix='use `mixed_precision="bf16"`, or `faccel.wrap` and `faccel.optimizer_step`',
        )


def _split_output(options: LossOptions, output: Tree) -> tuple[Tree, Tree, Tree]:
    """Return loss, buffers and aux, each of the last two None if it is not returned."""
    names = ["loss"]
    if options.has_buffers:
        names.append("buffers")
    if options.has_aux:
        names.append("aux")
    # Without options a loss function may return a tuple only by mistake; see `_check_loss`.
    if len(names) == 1:
        return output, None, None
    if not isinstance(output, tuple) or len(output) != len(names):
        listed = ", ".join(names)
        raise ModelError(
            f"the loss function must return `({listed})`",
            got=describe_type(output),
            fix=f"write `return {listed}`",
        )
    loss = output[0]
    new_buffers = output[1] if options.has_buffers else None
    aux = output[-1] if options.has_aux else None
    return loss, new_buffers, aux


def _check_loss(loss: Tree) -> None:
    if isinstance(loss, torch.Tensor) and not loss.ndim and loss.is_floating_point():
        return
    fix = "reduce it, as in `loss.mean()`"
    if isinstance(loss, tuple):
        fix += ", or pass `has_aux=True` if the loss function returns more"
    raise ModelError(
        "the loss must be a 0-d floating-point tensor", got=describe_type(loss), fix=fix
    )


def describe_type(value: object) -> str:
    """Return what a value is, for messages: type, and of a tensor dtype and shape."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"a {dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__name__}"
