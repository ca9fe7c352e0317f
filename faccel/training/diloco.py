"""DiLoCo: replicas train independently, and an outer optimizer steps with what they have learned.

Douillard et al.: DiLoCo: Distributed Low-Communication Training of Language Models, 2023
(https://arxiv.org/abs/2311.08105), algorithm 1. Fragments that are synchronised in turn: Douillard
et al.: Streaming DiLoCo with overlapping communication, 2025 (https://arxiv.org/abs/2501.18512).
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch

from faccel.checks import in_range, instance_of, integer, positive
from faccel.comm.buckets import check_replicas
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import ConfigError, ModelError
from faccel.training.local_sgd import SyncInfo, averaged_buckets
from faccel.training.model import WrappedModel, check_context, unwrap

_LOW_PRECISION = (torch.float16, torch.bfloat16)


@attrs.frozen(eq=False)
class DilocoState:
    """The state of the outer optimizer, equal on all ranks; save it with the model.

    Args:
        anchors: The global parameters by name: those of the last synchronisation. fp32 for
            parameters of 16 bits.
        velocities: The momentum of each.
        every: Number of updates between two synchronisations of a fragment.
        lr: Learning rate of the outer optimizer.
        momentum: Its Nesterov momentum.
        num_fragments: In how many parts the parameters are synchronised, one after the other.
    """

    anchors: Mapping[str, torch.Tensor] = attrs.field(repr=False)
    velocities: Mapping[str, torch.Tensor] = attrs.field(repr=False)
    every: int
    lr: float
    momentum: float
    num_fragments: int


def init_diloco(
    model: WrappedModel,
    ctx: DistContext,
    *,
    every: int,
    lr: float = 0.7,
    momentum: float = 0.9,
    num_fragments: int = 1,
) -> DilocoState:
    """Return the state of the outer optimizer, which begins with the present parameters.

    Effects: pure. Allocates two copies of the trainable parameters.

    Args:
        model: From `wrap`, with equal parameters on all ranks, as after `wrap` or `load`.
        ctx: The context that `model` was wrapped with; its mesh has replicas only.
        every: Number of updates between two synchronisations of a parameter.
        lr: Learning rate of the outer optimizer. `lr=1` and `momentum=0` is `local_sgd`.
        momentum: Its Nesterov momentum.
        num_fragments: In how many parts, of about equally many elements, the parameters are
            synchronised. Each has its turn once in `every` updates: the ranks send as many bytes in
            total, and fewer at once.

    Raises:
        ConfigError: An option is invalid, or the mesh shards parameters.
        ModelError: `model` is not wrapped, was wrapped with another context, or all of its
            parameters are frozen.

    Examples:
        >>> from faccel.testing import fake_context
        >>> from faccel.training.model import wrap
        >>> ctx = fake_context(0, 1)
        >>> init_diloco(wrap(torch.nn.Linear(2, 1), ctx), ctx, every=50)
        DilocoState(every=50, lr=0.7, momentum=0.9, num_fragments=1)
    """
    require_context(ctx, "faccel.parallel.init_diloco(model, ctx, every=50)")
    params = _trainable(model)
    check_context(model, ctx)
    check_replicas(ctx, "train without `diloco`")
    integer("every", every, at_least=1)
    positive("lr", lr)
    in_range("momentum", momentum, 0.0, 1.0)
    integer("num_fragments", num_fragments, at_least=1)
    # With more fragments than updates, two would have the same turn.
    largest = min(every, len(params))
    if num_fragments > largest:
        raise ConfigError(
            "`num_fragments` must not exceed `every`, nor the number of trainable parameters",
            got=f"num_fragments={num_fragments}, every={every}, {len(params)} parameters",
            fix=f"write `num_fragments={largest}` or less",
        )
    anchors: dict[str, torch.Tensor] = {}
    velocities: dict[str, torch.Tensor] = {}
    for name, param in params.items():
        # An outer step that is smaller than a rounding step of 16 bits would be lost.
        dtype = torch.float32 if param.dtype in _LOW_PRECISION else param.dtype
        anchors[name] = param.detach().to(dtype, copy=True)
        velocities[name] = torch.zeros_like(anchors[name])
    return DilocoState(anchors, velocities, every, lr, momentum, num_fragments)


@effectful(updates("model"), COLLECTIVE)
def diloco(
    outer: DilocoState,
    model: WrappedModel,
    ctx: DistContext,
    *,
    step: int,
    sync_all: bool = False,
    bucket_cap_mb: float = 25.0,
) -> tuple[SyncInfo, DilocoState]:
    """Synchronise the fragments whose turn it is: one step of the outer optimizer for them.

    Effects: updates model, collective. In other steps it communicates and changes nothing. Every
    rank must call it, with the same `step`.

    The outer gradient is the mean over the data ranks of `anchor - parameter`. The optimizer is SGD
    with Nesterov momentum, as in PyTorch. Its result is the new anchor, and every rank continues
    from it. Fragment `p` of `P` has its turn if `step - p * every // P` is a multiple of `every`.

    Run forward, backward and `optimizer_step` inside `grad_sync(model, on=False)`. Buffers and the
    states of the inner optimizer are not synchronised.

    Args:
        outer: From `init_diloco` or `diloco`; it is not modified.
        model: The model that it was made from.
        ctx: The context; its mesh has replicas only.
        step: The number of updates made so far; 1 after the first.
        sync_all: Whether to synchronise all fragments now, such as after the last update.
        bucket_cap_mb: As in `averaged`.

    Returns:
        What was sent, and the new state.

    Raises:
        ConfigError: `step` is not a positive int, or the mesh shards parameters.
        ModelError: `model` has other trainable parameters than `outer`, or of other shapes, is not
            wrapped, or was wrapped with another context.
        DesyncError: As in `averaged`.

    Examples:
        >>> from faccel.testing import fake_context
        >>> from faccel.training.model import wrap
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(1, 1, bias=False), ctx)
        >>> _ = torch.nn.init.constant_(model.module.weight, 1.0)
        >>> outer = init_diloco(model, ctx, every=2, lr=0.5, momentum=0.0)
        >>> _ = torch.nn.init.constant_(model.module.weight, 2.0)  # two updates of a rank
        >>> info, outer = diloco(outer, model, ctx, step=2)
        >>> info.fragments, model.module.weight.item()
        ((0,), 1.5)
    """
    require_context(ctx, "info, outer = faccel.parallel.diloco(outer, model, ctx, step=step)")
    fix = "write `outer = faccel.parallel.init_diloco(model, ctx, every=50)`"
    instance_of("outer", outer, DilocoState, fix=fix)
    integer("step", step, at_least=1)
    due = _due_fragments(outer, step)
    if sync_all:
        due = tuple(range(outer.num_fragments))
    # In most steps nothing is due, and nothing else is looked at.
    if not due:
        return SyncInfo(synced=False, num_bytes=0), outer
    params = _trainable(model)
    check_context(model, ctx)
    check_replicas(ctx, "train without `diloco`")
    _check_same_params(outer, params)
    names = _names_of(outer, due)
    anchors, velocities = dict(outer.anchors), dict(outer.velocities)
    num_bytes = 0
    with torch.no_grad():
        deltas: dict[str, torch.Tensor] = {}
        for name in names:
            deltas[name] = anchors[name] - params[name]
            num_bytes += deltas[name].nbytes
        for bucket in averaged_buckets(deltas, ctx, bucket_cap_mb):
            for name, grad in bucket.items():
                # PyTorch's SGD: v = m * v + g and x = x - lr * (g + m * v). New tensors, because
                # records are not modified.
                velocity = velocities[name].mul(outer.momentum).add_(grad)
                update = grad.add(velocity, alpha=outer.momentum)
                velocities[name] = velocity
                anchors[name] = anchors[name].add(update, alpha=-outer.lr)
                params[name].copy_(anchors[name])
    # One process averages with itself, without a collective.
    if ctx.data_world_size == 1:
        num_bytes = 0
    info = SyncInfo(synced=True, num_bytes=num_bytes, fragments=due)
    return info, attrs.evolve(outer, anchors=anchors, velocities=velocities)


def _due_fragments(outer: DilocoState, step: int) -> tuple[int, ...]:
    """Return the fragments whose turn it is after an update."""
    due: list[int] = []
    for fragment in range(outer.num_fragments):
        # The offsets are spread evenly, so that the network is used evenly, too.
        offset = fragment * outer.every // outer.num_fragments
        if (step - offset) % outer.every == 0:
            due.append(fragment)
    return tuple(due)


def _names_of(outer: DilocoState, fragments: tuple[int, ...]) -> list[str]:
    """Return the names of the parameters of some fragments, which have consecutive ones."""
    total = sum(anchor.numel() for anchor in outer.anchors.values())
    names: list[str] = []
    num_before = 0
    for name, anchor in outer.anchors.items():
        # By the middle of the parameter. Integers only: every rank gets the same.
        middle = 2 * num_before + anchor.numel()
        if middle * outer.num_fragments // (2 * total) in fragments:
            names.append(name)
        num_before += anchor.numel()
    return names


def _trainable(model: WrappedModel) -> dict[str, torch.nn.Parameter]:
    params = {
        name: param for name, param in unwrap(model).named_parameters() if param.requires_grad
    }
    if not params:
        raise ModelError(
            "all parameters of `model` are frozen, so there is nothing to synchronise",
            got=f"a {type(model.module).__name__}",
            fix="call `requires_grad_(True)` on the parameters that you train first",
        )
    return params


def _check_same_params(outer: DilocoState, params: Mapping[str, torch.nn.Parameter]) -> None:
    for name in sorted(outer.anchors.keys() ^ params.keys()):
        raise ModelError(
            "`model` has other trainable parameters than `outer`",
            got=f"`{name}` in one of them only",
            fix="call `faccel.parallel.init_diloco` again after parameters were added or frozen",
        )
    for name, anchor in outer.anchors.items():
        # Otherwise a size of 1 would be broadcast.
        if anchor.shape != params[name].shape:
            raise ModelError(
                f"`{name}` of `model` has another shape than in `outer`",
                got=f"{list(params[name].shape)} for {list(anchor.shape)}",
                fix="call `faccel.parallel.init_diloco` again after parameters were resized",
            )
