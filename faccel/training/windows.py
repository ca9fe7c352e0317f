"""Windows: the micro-batches of one update, for gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice

import attrs
import torch

from faccel.checks import instance_of, positive
from faccel.config import is_given
from faccel.context import DistContext
from faccel.data.batch import Batch
from faccel.data.loader import ShardedLoader, batches
from faccel.data.order import Cursor
from faccel.device_table import widest_dtype
from faccel.effects import AMBIENT, COLLECTIVE, effectful
from faccel.errors import ConfigError, DataError, with_source
from faccel.mesh import DATA
from faccel.training.failures import stop_all_ranks
from faccel.tree import Tree

Weight = Callable[[Batch], int | float | torch.Tensor]
"""Counts a micro-batch, in rows or tokens: a number or a 0-d tensor, 0 allowed."""


@attrs.frozen(eq=False)
class MicroBatch:
    """One micro-batch of a window.

    Args:
        data: As in `Batch`.
        num_valid: As in `Batch`.
        scale: The factor of its loss, for `scaled_backward`: a number or a 0-d tensor.
        sync: Whether its backward reduces gradients, for `grad_sync`; True for the last one.
    """

    data: Tree
    num_valid: int
    scale: float | torch.Tensor
    sync: bool


def _equal_scale(batches: Sequence[Batch]) -> float:
    return 1 / max(1, len(batches))


@attrs.frozen(eq=False)
class Window:
    """The micro-batches of one update; iterate it once.

    Args:
        batches: The batches of the loader.
        scale: The factor of each loss.
        cursor: The position to resume from after this update. A saved state never contains
            partial gradients.
        is_mean: Whether losses are means over rows, and not sums.
        failure: The exception that reading a batch has raised; iterating raises it.
        read_ahead: Reads a batch of the next window.
        weigh: Returns the factor of each loss for these batches. Collective with a `weight`.
        read: Reads the batches of the window from the dataset.
    """

    batches: Sequence[Batch] = attrs.field(repr=False)
    scale: float | torch.Tensor
    cursor: Cursor
    is_mean: bool = attrs.field(repr=False)
    failure: Exception | None = attrs.field(repr=False)
    _read_ahead: Callable[[], None] = attrs.field(repr=False, alias="read_ahead")
    _weigh: Callable[[Sequence[Batch]], float | torch.Tensor] = attrs.field(
        repr=False, alias="weigh"
    )
    _read: Callable[[], Iterator[Batch]] = attrs.field(repr=False, alias="read")

    def read_again(self) -> Window:
        """Return the window with all of its batches, after a failure. Reads the dataset.

        Not collective: `weighed_again` returns the factor of its losses.
        """
        if self.failure is None:
            return self
        try:
            batches = tuple(self._read())
        except Exception as error:
            return attrs.evolve(self, failure=error)
        return attrs.evolve(self, batches=batches, failure=None)

    def weighed_again(self) -> Window:
        """Return the window with the factor of all of its batches. Collective with a `weight`."""
        return attrs.evolve(self, scale=self._weigh(self.batches))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        if self.failure is not None:
            raise self.failure
        last = len(self.batches) - 1
        for index, batch in enumerate(self.batches):
            yield MicroBatch(batch.data, batch.num_valid, self.scale, index == last)
            self._read_ahead()


@effectful(AMBIENT, COLLECTIVE)
def windows(
    loader: ShardedLoader,
    ctx: DistContext,
    *,
    size: int | None = None,
    weight: Weight | None = None,
) -> Iterator[Window]:
    """Group a loader's batches into windows: the micro-batches of one update each.

    Effects: ambient, collective. Reads the dataset. With `weight`, one all-reduce of a number per
    window, for which the host does not wait.

    If reading a batch raises, iterating its window does, so that all ranks get as far as this
    window. The next window starts after it.

    The last window of an epoch may be shorter. While a window is iterated, the batches of the next
    one are read, one for each micro-batch.

    Without `weight` the loss must be the mean over the rows of a micro-batch, and
    `scale = 1 / len(window)`. With `weight` the loss must be the *sum* over the valid rows, and
    `scale = data_world_size * cp / total`, where `total` is the weight of the window over all data
    ranks. The gradient is then exactly the gradient of the mean over all rows or tokens counted,
    for any lengths. A window of weight 0 has scale 0.

    Args:
        loader: From `shard`, at an epoch.
        ctx: The context.
        size: Micro-batches per update; None is the configuration's `grad_accum`, which a number
            must not contradict.
        weight: Counts a micro-batch of this rank; full sequences where the mesh has `cp`.
            `Batch.num_valid` is the number of rows to count.

    Raises:
        ConfigError: `size` is not positive, or contradicts the configured `grad_accum`.
        DataError: `loader` is not from `shard`, or has an uneven tail: its ranks would make
            different numbers of updates.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from faccel.data.loader import shard
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> loader = shard(DataLoader(range(5), batch_size=1), ctx)
        >>> [(len(w), [m.sync for m in w], w.scale) for w in windows(loader, ctx, size=3)]
        [(3, [False, False, True], 0.3333333333333333), (2, [False, True], 0.5)]
    """
    fix = "write `faccel.windows(faccel.shard(loader, ctx).at(epoch), ctx)`"
    instance_of("loader", loader, ShardedLoader, fix=fix, error=DataError)
    num_micro_batches = ctx.config.grad_accum
    if size is not None:
        num_micro_batches = positive("size", size)
        _check_size(num_micro_batches, ctx)
    # One process has no other ranks to wait for it.
    if loader.source.tail == "uneven" and ctx.data_world_size > 1:
        raise uneven_tail_error()
    ctx.lifetime.add_windows()
    return _windows(loader, ctx, num_micro_batches, weight)


def _check_size(size: int, ctx: DistContext) -> None:
    """Raise if a flag, a variable, a file or an argument of `init` asks for another size."""
    grad_accum = ctx.config.grad_accum
    is_configured = grad_accum != 1 or is_given(ctx.config, "grad_accum")
    if is_configured and size != grad_accum:
        error = ConfigError(
            "`size` contradicts the configured `grad_accum`",
            got=f"size={size}, grad_accum={grad_accum}",
            fix="leave one of them out: write `faccel.windows(loader, ctx)`, or configure no "
            "`grad_accum`",
        )
        raise with_source(error, ctx.config.sources.get("grad_accum", "argument"))


def check_accumulated(ctx: DistContext) -> None:
    """Raise if the first update of a loop ignores the configured `grad_accum`.

    A loop uses it if it called `windows`, or if an update had that many backwards. Later updates
    are not checked: the last one of an epoch may have fewer.

    Raises:
        ConfigError: The update has fewer backwards.
    """
    lifetime = ctx.lifetime
    grad_accum = ctx.config.grad_accum
    # Without a backward since the last update, a second optimizer steps with the same gradients.
    if lifetime.has_accumulated or not 0 < lifetime.num_backwards < grad_accum:
        return
    error = ConfigError(
        "`grad_accum` is configured, but the loop updates after fewer micro-batches",
        got=f"grad_accum={grad_accum}, and {lifetime.num_backwards} backward before "
        "`optimizer_step`",
        fix="write `for window in faccel.windows(loader, ctx)` and `for micro in window`, with "
        "`scale=micro.scale` in `scaled_backward` and one `optimizer_step` per window; or "
        "configure no `grad_accum`",
    )
    raise with_source(error, ctx.config.sources.get("grad_accum", "argument"))


def _windows(
    loader: ShardedLoader, ctx: DistContext, num_micro_batches: int, weight: Weight | None
) -> Iterator[Window]:
    before = loader.cursor
    weigh: Callable[[Sequence[Batch]], float | torch.Tensor] = _equal_scale
    if weight is not None:
        weigh = partial(_agreed_scale, weight=weight, ctx=ctx)
    # One window is read before the first is yielded: its length gives the scale.
    reader = _WindowReader(batches(loader), num_micro_batches)
    while reader.finish():
        current, failure = tuple(reader.batches), reader.failure
        source: Iterator[Batch] = reader.source
        if failure is None:
            after = current[-1].cursor
        else:
            after = _position_after(before, num_micro_batches, loader)
            source = iter(())
            if after is not None and after.epoch == before.epoch:
                source = batches(loader.resume(after))
        reader = _WindowReader(source, num_micro_batches)
        yield Window(
            current,
            weigh(current),  # also after a failure: the other ranks communicate here
            after or before,
            is_mean=weight is None,
            failure=failure,
            read_ahead=reader.read,
            weigh=weigh,
            read=partial(_read_window, loader, before, num_micro_batches),
        )
        # Also after a `break` inside the window: the next one starts where this one ends.
        if after is None:
            assert failure is not None
            raise failure
        before = after


def _read_window(loader: ShardedLoader, start: Cursor, num_batches: int) -> Iterator[Batch]:
    return islice(batches(loader.resume(start)), num_batches)


def _position_after(before: Cursor, num_batches: int, loader: ShardedLoader) -> Cursor | None:
    """Return the position after some batches, without reading them; None for a stream."""
    try:
        num_left = len(loader.resume(before))
        # Steps are counted from the start of the epoch.
        step = len(loader.resume(Cursor(before.epoch))) - num_left + num_batches
    except TypeError:  # its length is unknown
        return None
    if num_left <= num_batches:
        return Cursor(before.epoch + 1, of=before.of)
    return loader.at(before.epoch, step).cursor


class _WindowReader:
    """Reads the batches of one window, while the previous one is used.

    Args:
        source: The batches of the loader.
        num_batches: Batches of the window.

    Attributes:
        source: As above.
        batches: Those that were read.
        failure: The exception that reading one has raised. It belongs to this window, and is raised
            where this window is used.
    """

    def __init__(self, source: Iterator[Batch], num_batches: int) -> None:
        self.source = source
        self._num_missing = num_batches
        self.batches: list[Batch] = []
        self.failure: Exception | None = None

    def read(self) -> None:
        """Read one batch, unless the window has all of its batches."""
        self._read(min(1, self._num_missing))

    def finish(self) -> bool:
        """Read all batches; return whether there are any. `read` does nothing afterwards."""
        self._read(self._num_missing)
        return bool(self.batches) or self.failure is not None

    def _read(self, num_batches: int) -> None:
        try:
            self.batches.extend(islice(self.source, num_batches))
        except Exception as error:
            self.failure = error
            num_batches = self._num_missing
        self._num_missing -= num_batches


def _agreed_scale(window: Sequence[Batch], weight: Weight, ctx: DistContext) -> torch.Tensor:
    try:
        return _scale(window, weight, ctx)
    # Of `weight` on this rank, or of another rank that failed before it came here.
    except Exception as error:
        stop_all_ranks(error, "windows", ctx)
        raise


def _scale(window: Sequence[Batch], weight: Weight, ctx: DistContext) -> torch.Tensor:
    # Counts are exact up to 2**53, on devices without double up to 2**24.
    dtype = widest_dtype(ctx.device)
    # Numbers are added on the host, so that only tensors cost a kernel each.
    host_sum = 0.0
    local_sum = torch.zeros((), dtype=dtype, device=ctx.device)
    for batch in window:
        value = weight(batch)
        if isinstance(value, torch.Tensor):
            local_sum = local_sum + value.detach().to(local_sum)
        else:
            host_sum += value
    local_sum = local_sum + host_sum
    total = ctx.comm.all_reduce(local_sum, "sum", DATA)
    # Backward averages gradients over the data ranks and the ranks of `cp`: multiply them again.
    num_averaged = ctx.mesh.spec.data_world_size * ctx.mesh.spec.cp
    return torch.where(total > 0, num_averaged / total, 0.0)


def uneven_tail_error(more_fix: str = "") -> DataError:
    """Return the error for training on a loader that gives some ranks fewer batches."""
    return DataError(
        'training on a loader with `tail="uneven"` would hang: some ranks have fewer batches',
        got="a backward while such a loader is iterated",
        fix='write `faccel.shard(loader, ctx, tail="pad")` or `tail="drop"` for training'
        + more_fix,
    )
