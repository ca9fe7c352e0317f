"""Exponential moving averages of a model's parameters, in the layout of each strategy."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from weakref import WeakSet

import attrs
import torch
from torch import nn

from faccel.checks import in_range, instance_of, one_of
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, consumes, effectful, updates
from faccel.errors import DonatedError, ModelError
from faccel.flat_shard import FlatShard
from faccel.training.model import WrappedModel, check_context, check_wrapped
from faccel.training.module_names import user_name
from faccel.tree import local_tensor

_BUFFERS = ("copy", "average")
# A step of 1 - decay = 0.001 is smaller than the distance between two such numbers.
_LOW_PRECISION = (torch.float16, torch.bfloat16)


# The modules whose parameters are averages now, in `ema_weights`.
_APPLIED: WeakSet[nn.Module] = WeakSet()


@attrs.define(eq=False)
class Lineage:
    """The mutable state of the records that `update_ema` has made from one another.

    Args:
        num_updates: Of the newest record; the older ones are consumed.
        is_applied: Whether the model has the averages as its parameters, in `ema_weights`.
    """

    num_updates: int = 0
    is_applied: bool = False


@attrs.frozen(eq=False)
class EmaState:
    """Exponential moving averages of the trainable parameters of a model.

    Args:
        averages: By name, in the layout of the parameter: a rank stores the average of its shard.
            Averages of fp16 and bf16 parameters are fp32.
        decay: Weight of the old average; see `init_ema`.
        warmup: Whether the decay is smaller in the first updates.
        buffers: `"copy"` or `"average"`.
        num_updates: Number of updates.
        lineage: The state that this record has in common with those it was made from.
    """

    averages: Mapping[str, torch.Tensor] = attrs.field(repr=False)
    decay: float
    warmup: bool = False
    buffers: str = "copy"
    num_updates: int = 0
    lineage: Lineage = attrs.field(factory=Lineage, repr=False)


def init_ema(
    model: WrappedModel,
    ctx: DistContext,
    *,
    decay: float = 0.999,
    warmup: bool = False,
    buffers: str = "copy",
) -> EmaState:
    """Return averages that begin with the present parameters.

    Effects: pure. Allocates memory for this rank's shards of the trainable parameters.

    Args:
        model: From `wrap`; under DeepSpeed after `wrap_optimizer`, which shards its parameters.
        ctx: The context that `model` was wrapped with.
        decay: An update computes `decay * average + (1 - decay) * parameter`.
        warmup: Whether update `n = 0, 1, ...` uses `min(decay, (1 + n) / (10 + n))`, so that the
            first parameters are forgotten sooner.
        buffers: `"copy"` evaluates with the model's present buffers, such as the statistics of
            batch norm. `"average"` averages the floating point ones.

    Returns:
        Averages of all parameters that require gradients. Those that are frozen now are not
        averaged: `ema_weights` evaluates with the model's. Save the averages with the model, as in
        `faccel.save({"model": model, "ema": ema}, path, ctx, step=step)`.

    Raises:
        ConfigError: `decay`, `warmup` or `buffers` is invalid.
        ModelError: `model` is not wrapped, was wrapped with another context, or all of its
            parameters are frozen.

    Examples:
        >>> from faccel.testing import fake_context
        >>> from faccel.training.model import wrap
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(2, 1), ctx)
        >>> init_ema(model, ctx, decay=0.99)
        EmaState(decay=0.99, warmup=False, buffers='copy', num_updates=0)
    """
    require_context(ctx, "faccel.parallel.init_ema(model, ctx)")
    check_wrapped(model)
    check_context(model, ctx)
    in_range("decay", decay, 0.0, 1.0)
    instance_of("warmup", warmup, bool, fix="write `warmup=True`")
    one_of("buffers", buffers, _BUFFERS)
    tensors = _averaged_tensors(model, buffers, ())
    # All parameters of one stage of a pipeline may be frozen.
    if not tensors and ctx.mesh.spec.pp == 1:
        raise ModelError(
            "all parameters of `model` are frozen, so there is nothing to average",
            got=f"a {type(model.module).__name__}",
            fix="call `requires_grad_(True)` on the parameters that you train first",
        )
    averages = {name: _copy_of(tensor) for name, tensor in tensors.items()}
    return EmaState(averages, decay, warmup, buffers)


@effectful(consumes("ema"))
def update_ema(ema: EmaState, model: WrappedModel, ctx: DistContext) -> EmaState:
    """Move the averages towards the present parameters; call it after each `optimizer_step`.

    Effects: consumes ema. The averages are updated in place, so that an update allocates nothing.
    No communication: each rank averages its shards.

    Args:
        ema: From `init_ema` or `update_ema`.
        model: The model that it was made from.
        ctx: The context that `model` was wrapped with.

    Returns:
        The averages after the update.

    Raises:
        DonatedError: `ema` is not the result of the last update, or the call is inside
            `ema_weights`.
        ModelError: `model` has other trainable parameters than `ema`.

    Examples:
        >>> from faccel.testing import fake_context
        >>> from faccel.training.model import wrap
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(1, 1, bias=False), ctx)
        >>> _ = torch.nn.init.zeros_(model.module.weight)
        >>> ema = init_ema(model, ctx, decay=0.75)
        >>> _ = torch.nn.init.ones_(model.module.weight)
        >>> ema = update_ema(ema, model, ctx)
        >>> ema.num_updates, ema.averages["weight"].item()
        (1, 0.25)
    """
    require_context(ctx, "ema = faccel.parallel.update_ema(ema, model, ctx)")
    _check(ema, model, ctx)
    decay = ema.decay
    if ema.warmup:
        decay = min(decay, (1 + ema.num_updates) / (10 + ema.num_updates))
    with torch.no_grad():
        averages, tensors = _pairs(ema, model)
        _lerp(averages, tensors, decay)
    ema.lineage.num_updates += 1
    return attrs.evolve(ema, num_updates=ema.num_updates + 1)


@effectful(updates("model"), COLLECTIVE)
def ema_weights(
    model: WrappedModel, ema: EmaState, ctx: DistContext
) -> AbstractContextManager[None]:
    """Return a context in which the parameters of the model are the averages.

    Effects: updates model, collective. Evaluate, export or sample inside. At the end, also after an
    exception, the model has its parameters again, bit for bit. What is written to them inside is
    lost. Needs memory for another copy of this rank's shards.

    Args:
        model: The model that `ema` was made from.
        ema: From `init_ema` or `update_ema`.
        ctx: The context that `model` was wrapped with.

    Raises:
        DonatedError: As in `update_ema`.
        ModelError: As in `update_ema`.

    Examples:
        >>> from faccel.testing import fake_context
        >>> from faccel.training.model import wrap
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(1, 1, bias=False), ctx)
        >>> _ = torch.nn.init.zeros_(model.module.weight)
        >>> ema = init_ema(model, ctx)
        >>> _ = torch.nn.init.ones_(model.module.weight)
        >>> with ema_weights(model, ema, ctx):
        ...     model(torch.ones(1, 1)).item()
        0.0
        >>> model(torch.ones(1, 1)).item()
        1.0
    """
    require_context(ctx, "faccel.parallel.ema_weights(model, ema, ctx)")
    _check(ema, model, ctx)
    ctx.comm.begin_call("ema_weights")
    return _applied(model, ema, ctx)


@contextmanager
def _applied(model: WrappedModel, ema: EmaState, ctx: DistContext) -> Generator[None]:
    with torch.no_grad():
        averages, tensors = _pairs(ema, model)
        buffers: list[torch.Tensor] = []
        if ema.buffers == "average":
            # All of them, because `sync_buffers` overwrites those without an average, too.
            buffers = list(model.module.buffers())
        backups = [tensor.clone() for tensor in tensors]
        buffer_backups = [buffer.clone() for buffer in buffers]
    ema.lineage.is_applied = True
    _APPLIED.add(model.module)
    try:
        with torch.no_grad():
            _copy(tensors, averages)
        _publish(model)
        if buffers:
            # The statistics of batch norm differ between data ranks.
            model.parallelism.sync_buffers(model.engine, ctx)
        yield
    finally:
        with torch.no_grad():
            _copy([*tensors, *buffers], [*backups, *buffer_backups])
        _publish(model)
        ema.lineage.is_applied = False
        _APPLIED.discard(model.module)


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy tensors in place. Updates `targets`."""
    # Without any, as in a frozen stage of a pipeline, PyTorch raises.
    if targets:
        # One kernel for many tensors; it casts fp32 averages of bf16 parameters.
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateUsage]


def _publish(model: WrappedModel) -> None:
    """Let the engine compute with what was written into its shards."""
    state_io = model.parallelism.state
    if state_io is not None:
        # Nothing to restore: DeepSpeed then copies its master weights into the model.
        state_io.restore(model.engine, {})


def _check(ema: EmaState, model: WrappedModel, ctx: DistContext) -> None:
    instance_of("ema", ema, EmaState, fix="write `ema = faccel.parallel.init_ema(model, ctx)`")
    check_wrapped(model)
    check_context(model, ctx)
    check_current(ema)
    if model.module in _APPLIED:
        raise DonatedError(
            "another average is applied: the parameters of the model are not the trained ones",
            got="a call inside `faccel.parallel.ema_weights`",
            fix="end the `with` block first",
        )


def check_current(ema: EmaState) -> None:
    """Raise unless `ema` is the newest record of its averages, and the model has its parameters.

    Raises:
        DonatedError: `update_ema` has consumed it, or `ema_weights` has applied it.
    """
    if ema.lineage.num_updates != ema.num_updates:
        raise DonatedError(
            "`ema` was consumed by `update_ema`, which has updated its averages in place",
            got=f"the record of update {ema.num_updates}; the newest one is of update "
            f"{ema.lineage.num_updates}",
            fix="write `ema = faccel.parallel.update_ema(ema, model, ctx)`, and use the result",
        )
    if ema.lineage.is_applied:
        raise DonatedError(
            "`ema` is applied: the parameters of the model are the averages",
            got="a call inside `faccel.parallel.ema_weights`",
            fix="end the `with` block first",
        )


def _averaged_tensors(
    model: WrappedModel, buffers: str, averaged: Collection[str]
) -> dict[str, torch.Tensor]:
    """Return the tensors of the model to average, by name, in the layout of this rank.

    Args:
        model: The model.
        buffers: As of `init_ema`.
        averaged: Names of parameters with an average, which may have been frozen since.
    """
    tensors: dict[str, torch.Tensor] = {}
    state_io = model.parallelism.state
    # Where the engine flattens parameters, its shards of the fp32 master weights.
    shards: Mapping[str, object] = {}
    if state_io is not None:
        shards = state_io.export(model.engine)
    # A parameter that is tied between two stages of a pipeline has one name, as in a checkpoint.
    tied_copies = model.parallelism.tied_copies(model.engine)
    # Not those of the module: Megatron-core counts the layers of each stage from 0.
    for name, param in model.named_parameters():
        key = tied_copies.get(id(param), user_name(name))
        if param.requires_grad or key in averaged:
            shard = shards.get(name, param)
            assert isinstance(shard, torch.Tensor)
            tensors[key] = shard
    if buffers == "average":
        named_buffers = model.module.named_buffers()
        tensors |= {name: buffer for name, buffer in named_buffers if buffer.is_floating_point()}
    return tensors


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    dtype = tensor.dtype
    if dtype in _LOW_PRECISION:
        dtype = torch.float32
    tensor = tensor.detach()
    if isinstance(tensor, FlatShard):
        return tensor.with_local(tensor.to_local().to(dtype, copy=True))
    return tensor.to(dtype, copy=True)


def _pairs(ema: EmaState, model: WrappedModel) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the averages and the tensors of the model, both local, in one order."""
    tensors = _averaged_tensors(model, ema.buffers, ema.averages.keys())
    if tensors.keys() != ema.averages.keys():
        raise _other_parameters(ema, tensors)
    averages: list[torch.Tensor] = []
    current: list[torch.Tensor] = []
    for name, tensor in tensors.items():
        average = local_tensor(ema.averages[name])
        tensor = local_tensor(tensor).detach()
        # Otherwise a smaller one would be broadcast.
        if average.shape != tensor.shape:
            raise ModelError(
                f"the average of `{name}` has another layout than the parameter",
                got=f"{list(average.shape)} on this rank, for {list(tensor.shape)}",
                fix="call `faccel.parallel.init_ema` after `faccel.wrap_optimizer`, for this model",
            )
        averages.append(average)
        current.append(tensor)
    return averages, current


def _other_parameters(ema: EmaState, tensors: Mapping[str, torch.Tensor]) -> ModelError:
    difference = sorted(tensors.keys() ^ ema.averages.keys())
    name = difference[0]
    if name in tensors:
        got = f"`{name}` in the model, without an average"
    else:
        got = f"an average of `{name}`, which the model does not have"
    return ModelError(
        "the trainable parameters of the model are not those that `ema` averages",
        got=got,
        fix="after parameters were unfrozen or added, call "
        "`ema = faccel.parallel.init_ema(model, ctx)`",
    )


def _lerp(averages: list[torch.Tensor], tensors: list[torch.Tensor], decay: float) -> None:
    """Compute `average += (1 - decay) * (tensor - average)` in place."""
    # By whether the dtypes agree, which `lerp` needs.
    equal: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    mixed: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for average, tensor in zip(averages, tensors, strict=True):
        target = equal
        if average.dtype != tensor.dtype:
            target = mixed
        target[0].append(average)
        target[1].append(tensor)
    if equal[0]:
        # As `torch.optim.swa_utils.get_ema_multi_avg_fn`.
        torch._foreach_lerp_(*equal, 1 - decay)  # pyright: ignore[reportPrivateUsage]
    if mixed[0]:
        torch._foreach_mul_(mixed[0], decay)  # pyright: ignore[reportPrivateUsage]
        torch._foreach_add_(*mixed, alpha=1 - decay)  # pyright: ignore[reportPrivateUsage]
