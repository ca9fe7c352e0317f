"""Values and gradients of loss functions, averaged exactly over micro-batches and data ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import attrs
import torch
from tensordict import TensorDict

from faccel.comm.buckets import check_cap, check_replicas, summed_buckets
from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError, DataError, ModelError
from faccel.func.gradient_transformation import is_traced
from faccel.func.micro_batches import micro_batches, stacked
from faccel.func.purity import found_pure
from faccel.func.rng_streams import Stream
from faccel.func.tensordicts import check_like, foreach, named, tensordict
from faccel.training.precision import autocast
from faccel.tree import Tree, flatten, map_leaves

Weight = Callable[[Tree], int | float | torch.Tensor]
"""What a batch counts on this rank: its rows, its tokens; a number or a 0-d tensor, 0 allowed."""

_Named = dict[str, torch.Tensor]
Differentiate = Callable[[Callable[[Mapping[str, torch.Tensor]], Any], _Named], Any]
"""`differentiate(run, params) -> (loss, rest, grads)` of `run(params) -> (loss, rest)`."""


@attrs.frozen(eq=False)
class LossSpec:
    """A loss function and how it is to be called.

    Args:
        loss_fn: `loss_fn(params, batch, generator)`, with `buffers` behind them where `has_buffers`.
        has_buffers: Whether it takes buffers, and returns new ones behind the loss.
        has_aux: Whether it returns anything else last.
        weight: What a batch counts; None where the loss is a mean.
        num_micro_batches: MicroBatch-batches of a batch.
        bucket_cap_mb: Size of the buckets in which gradients travel, in MB.
    """

    loss_fn: Callable[..., Any]
    has_buffers: bool = False
    has_aux: bool = False
    weight: Weight | None = None
    num_micro_batches: int = 1
    bucket_cap_mb: float = 25.0

    def __attrs_post_init__(self) -> None:
        check_cap(self.bucket_cap_mb)
        if self.num_micro_batches < 1:
            raise ConfigError(
                "a batch has at least one micro-batch",
                got=str(self.num_micro_batches),
                fix="use `num_micro_batches=1`",
            )


class Outcome(NamedTuple):
    """What a loss function gave, averaged over the data ranks.

    Args:
        loss: The mean, 0-d.
        grads: Of the mean, by name; nobody else holds them.
        buffers: The new buffers, averaged over the data ranks; None without `has_buffers`.
        aux: What else it returned on this rank; of several micro-batches stacked. None without `has_aux`.
    """

    loss: torch.Tensor
    grads: _Named
    buffers: _Named | None
    aux: Any


class Parts(NamedTuple):
    """The same before it is averaged: sums over micro-batches."""

    loss: torch.Tensor
    grads: _Named
    count: Any
    buffers: _Named | None
    aux: Any


class Task(NamedTuple):
    """What a step is to find a direction for.

    Args:
        spec: The loss.
        ctx: The world.
        params: Where.
        batch: As the loss takes it.
        generator: Likewise.
        buffers: Likewise; None without `has_buffers`.
        loss_scale: What the loss is multiplied by while it is differentiated.
        by_value: Whether writes to arguments are looked for.
    """

    spec: LossSpec
    ctx: DistContext
    params: TensorDict
    batch: Tree
    generator: Stream
    buffers: TensorDict | None = None
    loss_scale: float = 1.0
    by_value: bool = False


def gradient(task: Task, *, differentiate: Differentiate | None = None) -> Outcome:
    """Return value and gradients of a loss, averaged over micro-batches and data ranks. Collective.

    Args:
        task: Of which loss, where.
        differentiate: What is computed of each micro-batch, where that is not the gradient.
    """
    way = differentiate or (_transformed if is_traced(task.params) else _by_autograd)
    return outcome(task, lambda task: _local(task, way))


def outcome(task: Task, local: Callable[[Task], Parts]) -> Outcome:
    """Return what `local` finds on each data rank, averaged over all; it is watched, where nobody else looks on."""
    if is_traced(task.params):
        return _averaged(task, local(task), traced=True)
    arguments = {"params": task.params, "batch": task.batch, "buffers": task.buffers}
    by_value = task.by_value or task.ctx.config.debug
    return _averaged(
        task, found_pure(lambda: local(task), arguments, task.ctx, by_value=by_value), traced=False
    )


def scalar_loss(
    spec: LossSpec,
    params: Mapping[str, torch.Tensor],
    batch: Tree,
    generator: Stream,
    buffers: Any,
    ctx: DistContext,
) -> tuple[torch.Tensor, tuple[Any, Any]]:
    """Return `(loss, (buffers, aux))` of one call of the loss function, whatever it returns."""
    extra = (buffers,) if spec.has_buffers else ()
    if ctx.compute_dtype is None:
        out = spec.loss_fn(tensordict(params), batch, generator, *extra)
    else:
        with autocast(ctx):
            out = spec.loss_fn(tensordict(params), batch, generator, *extra)
    num_more = spec.has_buffers + spec.has_aux
    if num_more and not (isinstance(out, tuple) and len(out) == 1 + num_more):
        wanted = ", ".join(["loss"] + ["buffers"] * spec.has_buffers + ["aux"] * spec.has_aux)
        raise ModelError(
            f"the loss function must return `({wanted})`",
            got=_kind(out),
            fix=f"write `return {wanted}`",
        )
    loss, *more = out if num_more else (out,)
    if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.is_floating_point():
        raise ModelError(
            "a loss is a 0-d tensor of floating point",
            got=_kind(loss),
            fix="reduce it, as in `loss.mean()`"
            + (
                ", or pass `has_aux=True` where more is returned" if isinstance(loss, tuple) else ""
            ),
        )
    new = more.pop(0) if spec.has_buffers else None
    if new is not None:
        check_like(buffers, new, "buffers")
    return loss, (
        None if new is None else {k: v.detach() for k, v in new.items()},
        more[0] if more else None,
    )


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"a {type(value).__name__}"


def _by_autograd(run: Callable[[Mapping[str, torch.Tensor]], Any], params: _Named) -> Any:
    """Return value and gradients, by torch's plain autograd: the fastest way, and the one with the least memory."""
    tracked = {name: param.detach().requires_grad_() for name, param in params.items()}
    with torch.enable_grad():
        loss, rest = run(tracked)
    if not loss.requires_grad:
        raise ModelError(
            "the loss does not depend on the parameters",
            got=_kind(loss),
            fix="compute it from `params`, as in `functional_call(model, params, x)`, with gradients on and without `.item()`",
        )
    grads = torch.autograd.grad(
        loss, list(tracked.values()), allow_unused=True, materialize_grads=True
    )
    return loss.detach(), rest, dict(zip(tracked, grads, strict=True))


def _owned(grads: _Named, others: Iterable[torch.Tensor]) -> _Named:
    """Return gradients of which each has memory of its own, so that they can be written into.

    A backward may give one tensor to two parameters, or what it was given itself.
    """
    seen = {other.data_ptr() for other in others if other.layout == torch.strided}
    owned: _Named = {}
    for name, grad in grads.items():
        if grad.layout != torch.strided:
            raise ModelError(
                "gradients of a functional step are dense",
                got=f"`{name}`, {grad.layout}",
                fix="build its layer without `sparse=True`",
            )
        place = grad.data_ptr()
        is_shared = place in seen or not grad.is_contiguous() or grad._use_count() > 1  # type: ignore[attr-defined]
        seen.add(place)
        owned[name] = grad.clone() if is_shared else grad
    return owned


def _transformed(run: Callable[[Mapping[str, torch.Tensor]], Any], params: _Named) -> Any:
    """Return value and gradients in a way that torch's transforms can see through."""
    kept: list[Any] = []

    def loss_first(tracked: _Named) -> Any:
        loss, rest = run(tracked)
        leaves, rebuild = flatten(rest)
        tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        kept[:] = [leaves, rebuild]  # of what else is returned, torch takes tensors only
        return loss, (loss, tensors)

    grads, (loss, tensors) = torch.func.grad(loss_first, has_aux=True)(params)
    leaves, rebuild = kept
    return loss, rebuild([tensors.get(i, leaf) for i, leaf in enumerate(leaves)]), grads


def _local(task: Task, differentiate: Differentiate) -> Parts:
    """Return the sums over the micro-batches of this rank, one of which is in memory at a time."""
    spec, scale, tensors = task.spec, task.loss_scale, named(task.params)
    total: Parts | None = None
    outputs: list[Any] = []
    for micro in micro_batches(task.batch, spec.num_micro_batches, is_mean=spec.weight is None):
        before = task.buffers if total is None else tensordict(total.buffers or {})

        def run(
            tracked: Mapping[str, torch.Tensor], micro: Tree = micro, held: Any = before
        ) -> Any:
            loss, rest = scalar_loss(spec, tracked, micro, task.generator, held, task.ctx)
            return loss * scale if scale != 1.0 else loss, rest

        loss, (new, aux), grads = differentiate(run, tensors)
        if differentiate is _by_autograd:
            given = [leaf for leaf in flatten(micro)[0] if isinstance(leaf, torch.Tensor)]
            grads = _owned(grads, [*given, *tensors.values()])
        count = None if spec.weight is None else _count(spec.weight(micro))
        outputs.append(aux if aux is None else map_leaves(_detached, aux))
        total = _added(
            total, Parts(loss, grads, count, new, None), in_place=differentiate is _by_autograd
        )
        del grads, loss  # while the next ones are computed
    assert total is not None
    return total._replace(aux=outputs[0] if len(outputs) == 1 else stacked(outputs))


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _count(weight: Any) -> Any:
    if not isinstance(weight, (int, float, torch.Tensor)) or (
        isinstance(weight, torch.Tensor) and weight.ndim
    ):
        raise DataError(
            "a weight is a number or a 0-d tensor",
            got=_kind(weight),
            fix="return what the batch counts",
        )
    return weight


def _added(total: Parts | None, part: Parts, *, in_place: bool) -> Parts:
    if total is None:
        return part
    if in_place:
        foreach._foreach_add_(list(total.grads.values()), list(part.grads.values()))
        grads = total.grads
    else:
        grads = {name: grad + part.grads[name] for name, grad in total.grads.items()}
    count = None if part.count is None else total.count + part.count
    return Parts(total.loss + part.loss, grads, count, part.buffers, None)


def _averaged(task: Task, parts: Parts, *, traced: bool) -> Outcome:
    """Return the means over the data ranks; all that travels shares the buckets of the gradients."""
    spec, ctx, loss_scale = task.spec, task.ctx, task.loss_scale
    loss, count = parts.loss, parts.count
    is_double = any(g.dtype in (torch.float64, torch.complex128) for g in parts.grads.values())
    wide = torch.float64 if is_double else torch.float32
    if count is not None:
        tensor = isinstance(count, torch.Tensor)
        count = (
            count.detach().to(loss.device, wide)
            if tensor
            else torch.full((), count, dtype=wide, device=loss.device)
        )
    grads, buffers = parts.grads, parts.buffers
    if ctx.data_world_size > 1:
        names = list(grads)
        travels: _Named = {f"g{name}": grads.pop(name) for name in names} | {"loss": loss.to(wide)}
        travels |= {} if count is None else {"count": count}
        moving = {name: b for name, b in (buffers or {}).items() if b.is_floating_point()}
        travels |= {f"b{name}": b for name, b in moving.items()}
        arrived: _Named = {}
        for sums in summed_buckets(
            travels, ctx, bucket_cap_mb=spec.bucket_cap_mb, call="value_and_grad", is_traced=traced
        ):
            arrived |= sums
        grads = {name: arrived[f"g{name}"] for name in names}
        loss, count = arrived["loss"].to(loss.dtype), arrived.get("count")
        if buffers is not None:
            buffers = buffers | {name: arrived[f"b{name}"] / ctx.data_world_size for name in moving}
    factor: Any = 1.0 / (ctx.data_world_size * spec.num_micro_batches * loss_scale)
    if count is not None:
        factor = torch.where(count > 0, 1.0 / (count * loss_scale), 0.0)
    if isinstance(factor, torch.Tensor) or factor != 1.0:
        loss = loss * factor
        if traced:
            grads = {name: grad * factor for name, grad in grads.items()}
        else:
            foreach._foreach_mul_(list(grads.values()), factor)
    return Outcome(loss, grads, buffers, parts.aux)


ValueAndGrad = Callable[..., tuple[Any, TensorDict]]


@effectful(COLLECTIVE)
def value_and_grad(
    loss_fn: Callable[..., Any],
    ctx: DistContext,
    *,
    has_aux: bool = False,
    has_buffers: bool = False,
    weight: Weight | None = None,
    num_micro_batches: int = 1,
    bucket_cap_mb: float = 25.0,
) -> ValueAndGrad:
    """Return the function that gives the value of a loss and its gradients, averaged over all data ranks.

    Effects: collective. What is returned is: one packed all-reduce per bucket, in which the loss travels, too.

    Args:
        loss_fn: `loss_fn(params, batch, generator) -> loss`, a 0-d tensor; it must be pure. It runs in the precision
            of the context.
        ctx: The world; its mesh has replicas only.
        has_aux: Whether it returns `(loss, aux)`. `aux` is this rank's, detached; of several micro-batches stacked.
        has_buffers: Whether it is `loss_fn(params, batch, generator, buffers)` that returns new buffers behind the
            loss. Those of floating point are averaged over the data ranks.
        weight: What a batch counts on this rank (rows, tokens), as in `windows`. The loss is then a *sum* over what is
            counted, and value and gradients are those of the mean over all ranks, whatever each of them counted; 0
            where nothing was. Without it the loss is a mean, and every rank counts alike.
        num_micro_batches: How many micro-batches a batch is cut into along dim 0; memory is that of one.
        bucket_cap_mb: Size of the buckets in which gradients of one dtype travel, in MB.

    Returns:
        `fn(params, batch, generator)` that returns `(loss, grads)`, with `has_aux` `((loss, aux), grads)`; with
        `has_buffers` it takes `buffers` last, and the first of both is `(loss, buffers)` or `(loss, buffers, aux)`.

    Raises:
        ConfigError: The mesh shares parameters or work between its ranks.
        DataError: Later: a batch cannot be cut into that many.
        ModelError: Later: the loss is no 0-d tensor, or does not depend on the parameters.
        PurityError: Later: the loss function wrote to an argument (looked for in debug mode, and by steps at their
            first call), or drew from a generator of the process.

    Examples:
        >>> from faccel.func import value_and_grad
        >>> from faccel.testing import simulate
        >>> params = TensorDict({"w": torch.tensor(2.0)})
        >>> def loss_fn(params, batch, generator):
        ...     return (params["w"] * batch).sum()
        >>> def run(ctx):  # rank 0 counts one row, rank 1 two
        ...     batch = torch.arange(1.0 + ctx.rank)
        ...     return value_and_grad(loss_fn, ctx, weight=len)(params, batch, torch.Generator())
        >>> loss, grads = simulate(run, 2)[0]
        >>> loss, grads["w"]
        (tensor(0.6667), tensor(0.3333))
    """
    check_replicas(ctx, "use `faccel.wrap` and `faccel.scaled_backward`")
    spec = LossSpec(loss_fn, has_buffers, has_aux, weight, num_micro_batches, bucket_cap_mb)

    def run(
        params: TensorDict, batch: Tree, generator: Stream, buffers: TensorDict | None = None
    ) -> Any:
        out = gradient(Task(spec, ctx, params, batch, generator, buffers))
        more = [tensordict(out.buffers or {})] * has_buffers + [out.aux] * has_aux
        return (out.loss, *more) if more else out.loss, tensordict(out.grads)

    return run
