"""Values and gradients of loss functions, averaged exactly over micro-batches and data ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from tensordict import TensorDict

from faccel.comm.buckets import summed_buckets
from faccel.context import DistContext
from faccel.data.batch_split import split_batch
from faccel.errors import DataError, ModelError
from faccel.func.gradient_transformation import is_traced
from faccel.func.loss import LossOptions, call_loss, describe_type
from faccel.func.purity import call_pure
from faccel.func.rng_streams import RandomSource
from faccel.func.stacked_outputs import stack_outputs
from faccel.func.tensordicts import NamedTensors, flat_dict, foreach, to_tensordict
from faccel.tree import Tree, flatten, map_leaves

RunLoss = Callable[[Mapping[str, torch.Tensor]], Tree]
"""`run(params) -> (loss, (buffers, aux))`."""

Differentiate = Callable[[RunLoss, NamedTensors], Tree]
"""`differentiate(run, params) -> (loss, (buffers, aux), grads)`."""


class GradInputs(NamedTuple):
    """What a gradient is computed of.

    Args:
        options: The loss function.
        ctx: The context.
        params: Argument of the loss function, as the next three.
        batch: This rank's batch.
        generator: Source of random numbers.
        buffers: The model's buffers; None without `has_buffers`.
        loss_scale: Factor of the loss in the backward pass, for fp16.
        check_writes: Whether to check that the loss function does not write to its arguments.
    """

    options: LossOptions
    ctx: DistContext
    params: TensorDict
    batch: Tree
    generator: RandomSource
    buffers: TensorDict | None = None
    loss_scale: float = 1.0
    check_writes: bool = False


class LossAndGrads(NamedTuple):
    """Loss and gradients, averaged over the data ranks.

    Args:
        loss: The mean, 0-d.
        grads: Gradients of the mean, by name. Nothing aliases them, so they can be overwritten.
        buffers: New buffers, averaged over the data ranks; None without `has_buffers`.
        aux: What else this rank's loss function returned; of several micro-batches stacked.
    """

    loss: torch.Tensor
    grads: NamedTensors
    buffers: NamedTensors | None
    aux: Tree


class LossSums(NamedTuple):
    """Loss and gradients before averaging: sums over micro-batches, then over ranks.

    Args:
        loss: 0-d.
        grads: Gradients of `loss`, multiplied by the loss scale.
        weight: Sum of the weights; None if the loss is a mean.
        buffers: Buffers after the last micro-batch.
        aux: As in `LossAndGrads`.
    """

    loss: torch.Tensor
    grads: NamedTensors
    weight: int | float | torch.Tensor | None
    buffers: NamedTensors | None
    aux: Tree


def mean_gradient(
    inputs: GradInputs, *, differentiate: Differentiate | None = None
) -> LossAndGrads:
    """Return loss and gradients, averaged over micro-batches and data ranks. Collective.

    Args:
        inputs: The loss function and its arguments.
        differentiate: What to compute for each micro-batch instead of the gradient.
    """
    if differentiate is None:
        differentiate = _functorch_grad if is_traced(inputs.params) else _autograd_grad
    return mean_over_ranks(inputs, lambda inputs: _sum_micro_batches(inputs, differentiate))


def mean_over_ranks(
    inputs: GradInputs, local_sums: Callable[[GradInputs], LossSums]
) -> LossAndGrads:
    """Return the mean over the data ranks of what `local_sums` returns on each. Collective.

    Raises:
        PurityError: Outside of transforms: the loss function drew from PyTorch's default
            generator, or wrote to an argument.
    """
    if is_traced(inputs.params):
        # Tensors have no values to compare, and a transform rejects most impure functions itself.
        return _mean_of_sums(inputs, local_sums(inputs), traced=True)
    arguments = {"params": inputs.params, "batch": inputs.batch, "buffers": inputs.buffers}
    check_writes = inputs.check_writes or inputs.ctx.config.debug
    sums = call_pure(lambda: local_sums(inputs), arguments, inputs.ctx, check_writes=check_writes)
    return _mean_of_sums(inputs, sums, traced=False)


def _autograd_grad(run: RunLoss, params: NamedTensors) -> Tree:
    """Differentiate by `torch.autograd.grad`, which needs less time and memory than functorch."""
    # Detached copies of the handles: no attribute of the caller's tensors is changed.
    leaves = {name: param.detach().requires_grad_() for name, param in params.items()}
    with torch.enable_grad():
        loss, extra = run(leaves)
    # The message of PyTorch does not mention the usual causes.
    if not loss.requires_grad:
        raise ModelError(
            "the loss does not depend on the parameters",
            got=describe_type(loss),
            fix="compute it from `params`, as in `functional_call(model, params, x)`, "
            "with gradients enabled and without `.item()`",
        )
    # A parameter that the loss does not use has a gradient of zeros, as in `torch.func.grad`.
    grads = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return loss.detach(), extra, dict(zip(leaves, grads, strict=True))


def _functorch_grad(run: RunLoss, params: NamedTensors) -> Tree:
    """Differentiate by `torch.func.grad`, which other transforms can trace."""
    # `torch.func.grad` accepts only tensors as auxiliary output. Other leaves leave by this list.
    captured: list[Tree] = []

    def run_for_grad(tracked: NamedTensors) -> Tree:
        loss, extra = run(tracked)
        leaves, rebuild = flatten(extra)
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        captured[:] = [leaves, rebuild]
        return loss, (loss, tensors)

    grads, (loss, tensors) = torch.func.grad(run_for_grad, has_aux=True)(params)
    leaves, rebuild = captured
    extra = rebuild([tensors.get(i, leaf) for i, leaf in enumerate(leaves)])
    return loss, extra, grads


def _without_aliases(grads: NamedTensors, inputs: Iterable[torch.Tensor]) -> NamedTensors:
    """Return gradients that alias neither each other nor `inputs`, so they can be overwritten.

    A backward pass may return one tensor for two parameters, an input of the loss function, or a
    tensor that an autograd node still holds. Such gradients are copied.
    """
    addresses = {tensor.data_ptr() for tensor in inputs if tensor.layout == torch.strided}
    unaliased: NamedTensors = {}
    for name, grad in grads.items():
        if grad.layout != torch.strided:
            raise ModelError(
                "gradients of a functional step must be dense",
                got=f"`{name}`, {grad.layout}",
                fix="build its layer without `sparse=True`",
            )
        address = grad.data_ptr()
        # The tensor is held by C++, for instance as a saved tensor of an autograd node.
        is_referenced = grad._use_count() > 1  # type: ignore[attr-defined]
        is_aliased = address in addresses or not grad.is_contiguous() or is_referenced
        addresses.add(address)
        unaliased[name] = grad.clone() if is_aliased else grad
    return unaliased


def _sum_micro_batches(inputs: GradInputs, differentiate: Differentiate) -> LossSums:
    """Return the sums over the micro-batches of this rank, one of which is in memory at a time."""
    options = inputs.options
    params = flat_dict(inputs.params)
    is_eager = differentiate is _autograd_grad
    total: LossSums | None = None
    outputs: list[Tree] = []
    is_mean = options.weight is None
    for micro_batch in split_batch(inputs.batch, options.num_micro_batches, is_mean=is_mean):
        # Each micro-batch starts from the buffers of the one before, as sequential steps would.
        buffers = inputs.buffers
        if total is not None:
            buffers = to_tensordict(total.buffers or {})
        run = _bind_loss(inputs, micro_batch, buffers)
        # Forward and backward of one micro-batch; its activations are released here.
        loss, (new_buffers, aux), grads = differentiate(run, params)
        if is_eager:
            leaves = flatten(micro_batch)[0]
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            grads = _without_aliases(grads, [*tensors, *params.values()])
        weight = None
        if options.weight is not None:
            weight = _checked_weight(options.weight(micro_batch))
        outputs.append(map_leaves(_detach, aux) if options.has_aux else None)
        sums = LossSums(loss, grads, weight, new_buffers, None)
        total = sums if total is None else _add(total, sums, in_place=is_eager)
        # Release this micro-batch's gradients before the next ones are computed.
        del grads, loss, sums
    assert total is not None
    # A single micro-batch adds no dim.
    aux = outputs[0] if len(outputs) == 1 else stack_outputs(outputs)
    return total._replace(aux=aux)


def _bind_loss(inputs: GradInputs, micro_batch: Tree, buffers: TensorDict | None) -> RunLoss:
    """Return the scaled loss of one micro-batch as a function of the parameters."""

    def run(params: Mapping[str, torch.Tensor]) -> Tree:
        loss, extra = call_loss(
            inputs.options, params, micro_batch, inputs.generator, buffers, inputs.ctx
        )
        if inputs.loss_scale != 1.0:
            loss = loss * inputs.loss_scale
        return loss, extra

    return run


def _detach(leaf: Tree) -> Tree:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _checked_weight(weight: Tree) -> int | float | torch.Tensor:
    # A tensor is accepted, because counting tokens must not wait for the device.
    is_number = isinstance(weight, int | float)
    is_scalar = isinstance(weight, torch.Tensor) and not weight.ndim
    if not is_number and not is_scalar:
        raise DataError(
            "`weight` must return a number or a 0-d tensor",
            got=describe_type(weight),
            fix="return the number of rows or tokens, as in `weight=lambda batch: len(batch[0])`",
        )
    return weight


def _add(total: LossSums, sums: LossSums, *, in_place: bool) -> LossSums:
    """Return the sum of two; `in_place` overwrites the gradients of the first."""
    grads = total.grads
    # One call for all parameters, without a second copy of the gradients.
    if in_place:
        foreach._foreach_add_(list(grads.values()), list(sums.grads.values()))
    else:
        grads = {name: grad + sums.grads[name] for name, grad in grads.items()}
    weight = None
    if total.weight is not None and sums.weight is not None:
        weight = total.weight + sums.weight
    return LossSums(total.loss + sums.loss, grads, weight, sums.buffers, None)


def _mean_of_sums(inputs: GradInputs, sums: LossSums, *, traced: bool) -> LossAndGrads:
    """Return the means over all data ranks of this rank's sums. Collective."""
    options, ctx = inputs.options, inputs.ctx
    # bf16 has 8 bits: a sum of 1000 rows would not be exact.
    wide_dtype = _wide_dtype(sums.grads)
    weight = sums.weight
    if isinstance(weight, torch.Tensor):
        weight = weight.detach().to(sums.loss.device, wide_dtype)
    elif weight is not None:
        weight = torch.full((), weight, dtype=wide_dtype, device=sums.loss.device)
    # A number became a tensor, so that it can be all-reduced.
    sums = sums._replace(weight=weight)
    if ctx.data_world_size > 1:
        # A single data rank communicates nothing.
        sums = _all_reduce(inputs, sums, wide_dtype, traced=traced)
    loss, grads, weight, buffers, aux = sums
    # Without weights each of the W ranks sums the means of M micro-batches: divide by W * M.
    factor: Tree = 1.0 / (ctx.data_world_size * options.num_micro_batches * inputs.loss_scale)
    if isinstance(weight, torch.Tensor):
        # With weights: divide by the number of rows or tokens of all ranks, which may be 0.
        factor = torch.where(weight > 0, 1.0 / (weight * inputs.loss_scale), 0.0)
    # One rank, one micro-batch, no loss scale: nothing to divide.
    if isinstance(factor, torch.Tensor) or factor != 1.0:
        loss = loss * factor
        if traced:
            grads = {name: grad * factor for name, grad in grads.items()}
        else:
            # The gradients have no other reference, so they are scaled in place.
            foreach._foreach_mul_(list(grads.values()), factor)
    return LossAndGrads(loss, grads, buffers, aux)


def _wide_dtype(grads: NamedTensors) -> torch.dtype:
    """Return the dtype in which losses and counts are summed over ranks."""
    dtypes = {grad.dtype for grad in grads.values()}
    if torch.float64 in dtypes or torch.complex128 in dtypes:
        return torch.float64
    return torch.float32


def _all_reduce(
    inputs: GradInputs, sums: LossSums, wide_dtype: torch.dtype, *, traced: bool
) -> LossSums:
    """Return the sums over the data ranks, and the means of the buffers. Collective.

    Loss, weight and buffers are in the buckets of the gradients: there is no further all-reduce.
    Empties `sums.grads`, so that each gradient is released as soon as it is copied to a bucket.
    """
    options, ctx = inputs.options, inputs.ctx
    # Prefixes keep a parameter and a buffer of one name apart.
    names = list(sums.grads)
    packed: NamedTensors = {}
    for name in names:
        packed[f"grad.{name}"] = sums.grads.pop(name)
    packed["loss"] = sums.loss.to(wide_dtype)
    if isinstance(sums.weight, torch.Tensor):
        packed["weight"] = sums.weight
    averaged_buffers: list[str] = []
    for name, buffer in (sums.buffers or {}).items():
        # integer buffers, such as `num_batches_tracked`, are equal on all ranks
        if buffer.is_floating_point():
            packed[f"buffer.{name}"] = buffer
            averaged_buffers.append(name)
    # Ranks reduce in the same order, because models have the same parameter order.
    totals: NamedTensors = {}
    buckets = summed_buckets(
        packed,
        ctx,
        bucket_cap_mb=options.bucket_cap_mb,
        call="value_and_grad",
        is_traced=traced,
    )
    for bucket in buckets:
        totals |= bucket
    buffers = sums.buffers
    if buffers is not None:
        buffers = dict(buffers)
        # Running statistics describe the rows of one rank: average them for the global batch.
        for name in averaged_buffers:
            buffers[name] = totals[f"buffer.{name}"] / ctx.data_world_size
    return sums._replace(
        loss=totals["loss"].to(sums.loss.dtype),
        grads={name: totals[f"grad.{name}"] for name in names},
        weight=totals.get("weight"),
        buffers=buffers,
    )
