"""One update: windows of micro-batches, the backward of each, the step at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import attrs
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from faccel.comm.rank_errors import raise_naming_rank
from faccel.context import DistContext
from faccel.data.loader import ShardedLoader, batches
from faccel.data.order import Cursor
from faccel.data.source import Batch
from faccel.effects import AMBIENT, COLLECTIVE, effectful, updates
from faccel.errors import ConfigError, DataError, ModelError
from faccel.protocols import DATA, UpdateOptions
from faccel.training.grad_clip import apply, check_limits, clip_, parameters_with_gradients
from faccel.training.model import WrappedModel, grad_sync
from faccel.training.precision import ScalerState, check_scaler, unscale_
from faccel.tree import Tree, full_tensor

Weight = Callable[[Batch], int | float | torch.Tensor]
"""What a micro-batch counts: its rows, its tokens, ...; a number or a 0-d tensor, 0 allowed."""


@attrs.frozen(eq=False)
class MicroBatch:
    """One micro-batch of a window.

    Args:
        data: As in `Batch`.
        num_valid: As in `Batch`.
        scale: What its loss is to be multiplied by, for `scaled_backward`: a number or a 0-d tensor.
        sync: Whether gradients are reduced in its backward, for `grad_sync`: the last one of the window.
    """

    data: Tree
    num_valid: int
    scale: float | torch.Tensor
    sync: bool


@attrs.frozen(eq=False)
class Window:
    """The micro-batches of one update; iterate it once.

    Args:
        batches: They, as they were read.
        scale: What each loss is to be multiplied by.
        cursor: The place to resume after this update. No partial gradient is ever part of a state.
    """

    batches: Sequence[Batch] = attrs.field(repr=False)
    scale: float | torch.Tensor
    cursor: Cursor
    _read_ahead: Callable[[], None] = attrs.field(repr=False)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        last = len(self.batches) - 1
        for i, batch in enumerate(self.batches):
            yield MicroBatch(batch.data, batch.num_valid, self.scale, i == last)
            self._read_ahead()


@effectful(AMBIENT, COLLECTIVE)
def windows(
    loader: ShardedLoader,
    ctx: DistContext,
    *,
    size: int | None = None,
    weight: Weight | None = None,
) -> Iterator[Window]:
    """Group a loader's batches into the micro-batches of one update each; the last window may be short.

    Effects: ambient, collective. Reads the data set; with `weight` one all-reduce of a number per window, for which
    the host does not wait. Batches are read one window ahead, one for each that is consumed.

    Without `weight` the loss is a mean over the rows of a micro-batch, and `scale = 1 / len(window)`. With it the loss
    is a *sum* over the valid rows, and `scale = data_world_size * cp / total`, where `total` is the weight of the
    window over all data ranks: the gradient is that of the mean over everything that was counted, whatever the lengths.
    A window that counts nothing has scale 0.

    Args:
        loader: From `shard`, placed in an epoch.
        ctx: The world.
        size: MicroBatch-batches per update; None takes the configuration's `grad_accum`.
        weight: What a micro-batch counts on this rank, of whole sequences where ranks share them (`cp`); see
            `Batch.num_valid` for what not to count.

    Raises:
        ConfigError: `size` is not positive.
        DataError: A loader with an uneven tail: its ranks would disagree about the number of updates.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from faccel.data.loader import shard
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> loader = shard(DataLoader(range(5), batch_size=1), ctx)
        >>> [(len(w), [m.sync for m in w], w.scale) for w in windows(loader, ctx, size=3)]
        [(3, [False, False, True], 0.3333333333333333), (2, [False, True], 0.5)]
    """
    if not isinstance(loader, ShardedLoader):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(
            "windows are made of a loader from `faccel.shard`",
            got=f"a {type(loader).__name__}",
            fix="write `faccel.windows(faccel.shard(loader, ctx).at(epoch), ctx)`",
        )
    num_micro_batches = ctx.config.grad_accum if size is None else size
    if num_micro_batches < 1:
        raise ConfigError(
            "a window has at least one micro-batch", got=f"size={size}", fix="use `size=1` or more"
        )
    if loader.source.tail == "uneven" and ctx.data_world_size > 1:
        raise _uneven()
    return _windows(loader, ctx, num_micro_batches, weight)


def _windows(
    loader: ShardedLoader, ctx: DistContext, size: int, weight: Weight | None
) -> Iterator[Window]:
    source = batches(loader)
    current = list(islice(source, size))
    while current:
        ahead: list[Batch] = []
        room = [
            size
        ]  # none, once the next window is there: whoever still walks this one reads nothing

        def read_ahead(ahead: list[Batch] = ahead, room: list[int] = room) -> None:
            ahead.extend(islice(source, max(0, min(1, room[0] - len(ahead)))))

        scale = 1 / len(current) if weight is None else _scale(current, weight, ctx)
        yield Window(tuple(current), scale, current[-1].cursor, read_ahead)
        room[0] = 0
        current = ahead + list(islice(source, size - len(ahead)))


def _scale(window: list[Batch], weight: Weight, ctx: DistContext) -> torch.Tensor:
    dtype = (
        torch.float32 if ctx.device.type == "mps" else torch.float64
    )  # counts stay exact up to 2**53
    counts = [weight(batch) for batch in window]
    numbers = sum(n for n in counts if not isinstance(n, torch.Tensor))
    mine = torch.full((), numbers, dtype=dtype, device=ctx.device)
    for count in counts:
        if isinstance(count, torch.Tensor):
            mine = mine + count.detach().to(mine)
    total = ctx.comm.all_reduce(mine, "sum", DATA)
    spec = ctx.mesh.spec  # losses, hence gradients, are averaged over the ranks of a sequence, too
    return torch.where(total > 0, spec.data_world_size * spec.cp / total, 0.0)


def _uneven(or_else: str = "") -> DataError:
    return DataError(
        'a loader with `tail="uneven"` gives some ranks fewer batches, so training on it would hang',
        got="a backward while such a loader is being read",
        fix='write `faccel.shard(loader, ctx, tail="pad")` or `tail="drop"` for training' + or_else,
    )


def _is_loss(loss: Any) -> bool:
    return isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad


def _no_loss(loss: Any) -> ModelError:
    got = f"a {type(loss).__name__}"
    if isinstance(loss, torch.Tensor):
        got = f"a tensor of shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}"
    return ModelError(
        "a loss is a scalar tensor that depends on parameters",
        got=got,
        fix="pass the tensor, not its `.item()`, reduce it, as in `loss.mean()`, and compute it with gradients on",
    )


@effectful(updates(".grad"), COLLECTIVE)
def scaled_backward(
    loss: torch.Tensor, scaler: ScalerState, ctx: DistContext, *, scale: float | torch.Tensor = 1.0
) -> ScalerState:
    """Run backward on `loss`, multiplied by `scale` and by the loss scale of fp16.

    Effects: updates .grad, collective. Gradients are averaged over the data ranks, unless inside
    `grad_sync(model, on=False)`.

    Args:
        loss: A scalar that depends on parameters.
        scaler: From `init_scaler`, or the last function that returned it.
        ctx: The world.
        scale: `MicroBatch.scale` of a window.

    Returns:
        The scaler to go on with.

    Raises:
        ModelError: The loss is not a scalar, or depends on no parameter.
        ScalerError: `scaler` is none.
        DataError: A loader with an uneven tail is being read outside of `join`: ranks with fewer batches would leave
            the others waiting.
        RankFailedError: Another rank left, or failed before its backward; names it.

    Examples:
        >>> from faccel.training.precision import init_scaler
        >>> from faccel.testing import fake_context
        >>> ctx, w = fake_context(0, 1), torch.ones((), requires_grad=True)
        >>> scaler = scaled_backward(3 * w, init_scaler(ctx), ctx, scale=0.5)
        >>> w.grad
        tensor(1.5000)
    """
    if ctx.lifetime.has_uneven_iteration and not ctx.lifetime.has_join:
        raise _uneven(
            ", or train inside of `with faccel.parallel.join(model, opt, ctx)`, without `windows`"
        )
    if not _is_loss(loss):
        raise _no_loss(loss)
    check_scaler(scaler)
    factor = scaler.scale
    if isinstance(scale, torch.Tensor):
        loss = loss * scale.to(loss.dtype)
    else:
        factor = factor * scale
    try:
        torch.autograd.backward(loss if factor == 1.0 else loss * factor)
    except RuntimeError as error:
        raise_naming_rank(error, "backward", DATA, ctx.comm)
    return scaler.after_backward()


@effectful(updates(".grad"), COLLECTIVE)
def pipeline_step(
    loss_fn: Callable[[Callable[..., Any], Tree], torch.Tensor],
    model: WrappedModel,
    window: Window,
    scaler: ScalerState,
    ctx: DistContext,
) -> tuple[torch.Tensor, ScalerState]:
    """Run forward and backward of all micro-batches of a window, through a pipeline where the mesh has one.

    Without one the micro-batches are taken one by one, so that one loop serves every mesh.

    Effects: updates .grad, collective. As `scaled_backward` for each micro-batch, with gradients reduced once.

    Args:
        loss_fn: `loss_fn(model, data)` calls `model` once and returns a scalar; on a pipeline `model` gives the output
            of the last stage there, and what it is called with is the input of the first stage.
        model: From `wrap`.
        window: From `windows`; a pipeline needs as many micro-batches as ranks, all of the same shapes.
        scaler: From `init_scaler`, or the last function that returned it.
        ctx: The world.

    Returns:
        The loss of each micro-batch as `T[len(window)]`, without its `scale`, the same on all ranks of a pipeline; and
        the scaler to go on with.

    Raises:
        ModelError: A loss is not a scalar, or `loss_fn` does not call its model.
        ConfigError: Too few micro-batches for the schedule.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from faccel.data.loader import shard
        >>> from faccel.training.model import wrap
        >>> from faccel.training.precision import init_scaler
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(1, 1), ctx)
        >>> loader = shard(DataLoader(torch.ones(4, 1), batch_size=1), ctx)
        >>> window = next(windows(loader, ctx, size=4))
        >>> losses, scaler = pipeline_step(lambda model, x: model(x).mean(), model, window, init_scaler(ctx), ctx)
        >>> losses.shape
        torch.Size([4])
    """
    forward_backward = model.parallelism.pipeline_forward_backward
    if forward_backward is None:
        found: list[torch.Tensor] = []
        for micro in window:
            with grad_sync(model, on=micro.sync):
                loss = loss_fn(model, micro.data)
                scaler = scaled_backward(loss, scaler, ctx, scale=micro.scale)
            found.append(full_tensor(loss.detach()))
        return torch.stack(found), scaler
    check_scaler(scaler)
    micros = list(window)
    factors = [micro.scale * scaler.scale for micro in micros]

    def unscaled(data: Tree) -> Callable[[Callable[..., Any]], torch.Tensor]:
        def run(call: Callable[..., Any]) -> torch.Tensor:
            loss = loss_fn(call, data)
            if not _is_loss(loss):
                raise _no_loss(loss)
            return loss

        return run

    losses = forward_backward(
        model.engine, [unscaled(micro.data) for micro in micros], factors, ctx
    )
    return losses, scaler.after_backward()


@attrs.frozen(eq=False)
class StepInfo:
    """What one update did.

    Args:
        grad_norm: 2-norm of all gradients of the optimizer from before clipping, 0-d; None without `clip_norm`
            (`clip_norm=float("inf")` measures it and clips nothing).
        skipped: Whether the update was left out because a gradient was not finite.
        scale: The loss scale that was taken out of the gradients.
    """

    grad_norm: torch.Tensor | None
    skipped: bool
    scale: float


@effectful(updates("opt"), COLLECTIVE)
def optimizer_step(
    opt: Optimizer,
    scaler: ScalerState,
    ctx: DistContext,
    *,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
    skip_nonfinite: bool = False,
) -> tuple[StepInfo, ScalerState]:
    """Clip, step, and set this optimizer's gradients to None.

    Effects: updates opt, collective. Its parameters and gradients, and `scheduler`. Under DDP every rank holds the
    same gradients, so that nothing is communicated.

    Under fp16 the gradients are unscaled first, and an update with one that is not finite is left out; other
    precisions neither inspect gradients nor wait for the device, unless `skip_nonfinite`. A changed loss scale takes
    effect at the next `scaled_backward`, so that several optimizers share one scaler.

    Args:
        opt: From `wrap_optimizer`.
        scaler: From `scaled_backward`.
        ctx: The world.
        clip_norm: The largest 2-norm of all gradients together.
        clip_value: The largest magnitude of an element, applied after `clip_norm`.
        scheduler: One or several, moved once per update, not on a skipped one. One that moves per epoch, or on a
            metric, you step yourself.
        skip_nonfinite: Whether an update with a gradient that is not finite is left out in any precision.

    Returns:
        What happened, and the scaler to go on with.

    Raises:
        OptimizerError: No gradient has reached a parameter of `opt`, or its step needs a closure.
        ScalerError: `scaler` has seen no `scaled_backward` (under fp16: none since `opt` stepped last).
        ConfigError: A limit that is not positive, or a scheduler that needs a metric.

    Examples:
        >>> from faccel.training.precision import init_scaler
        >>> from faccel.testing import fake_context
        >>> ctx, w = fake_context(0, 1), torch.nn.Parameter(torch.ones(()))
        >>> opt = torch.optim.SGD([w], lr=0.1)
        >>> scaler = scaled_backward(3 * w, init_scaler(ctx), ctx)
        >>> info, scaler = optimizer_step(opt, scaler, ctx, clip_norm=1.0)
        >>> info.grad_norm, info.skipped, w.grad
        (tensor(3.), False, None)
    """
    check_scaler(scaler)
    update = ctx.parallelism.optimizer_step
    params = parameters_with_gradients(opt, ctx) if update is None else []
    scale = scaler.scale_of_gradients(opt)
    check_limits(clip_norm, clip_value)
    schedulers = () if scheduler is None else _schedulers(scheduler)
    options = UpdateOptions(clip_norm, clip_value, scale, scaler.enabled or skip_nonfinite)
    norm, finite = (
        _update(opt, params, options, ctx) if update is None else update(opt, options, ctx)
    )
    if finite:
        for each in schedulers:
            each.step()
    return StepInfo(norm, not finite, scale), scaler.after_step(opt, finite=finite)


def _update(
    opt: Optimizer, params: list[torch.Tensor], options: UpdateOptions, ctx: DistContext
) -> tuple[torch.Tensor | None, bool]:
    """Clip and step with the gradients that are in `.grad` of `params`; return their norm, and whether it stepped."""
    finite, norm = True, None
    if options.skip_nonfinite:
        finite = unscale_([p.grad for p in params if p.grad is not None], options.grad_scale, ctx)
    if options.clip_norm is not None or options.clip_value is not None:
        norm = clip_(params, options.clip_norm, options.clip_value, ctx)
    if finite:
        apply(opt)
    for p in (
        params
    ):  # what `zero_grad` does, without its profiler range: 9 us that a small step would notice
        p.grad = None
    return norm, finite


def _schedulers(scheduler: Any) -> Sequence[LRScheduler]:
    several: Sequence[Any] = scheduler if isinstance(scheduler, Sequence) else (scheduler,)
    for each in several:
        if isinstance(each, ReduceLROnPlateau) or not hasattr(each, "step"):
            raise ConfigError(
                "`scheduler` takes those that move once per update",
                got=f"a {type(each).__name__}",
                fix="step a ReduceLROnPlateau yourself, as in `plateau.step(metric)`",
            )
    return several
