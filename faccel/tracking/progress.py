"""Progress of an iteration on rank 0: a bar in a terminal or a notebook, otherwise lines."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Generic, TextIO, TypeVar

import torch

from faccel import device_table
from faccel.checks import instance_of, integer
from faccel.context import DistContext, require_context
from faccel.device_table import is_host
from faccel.effects import AMBIENT, effectful, updates
from faccel.errors import ConfigError
from faccel.tracking.progress_text import Status, metric_texts
from faccel.tracking.progress_views import View, view_of

T = TypeVar("T")

# The next redraw waits so many times as long as the last one took: 0.25 % of the time, and half as
# much again for the caches that it leaves to the step.
_DRAW_FACTOR = 400
# A host that waits for its device loses less than that: the device computes meanwhile.
_WAIT_FACTOR = 20
# The rate is the mean over this many redraws: seconds in a terminal.
_NUM_RATES = 30


class Progress(Generic[T]):
    """The items of `progress`, which are counted while they are iterated over.

    Args:
        items: The items.
        view: Where the progress is shown; None on the ranks that show none.
        device: Whose memory is shown; None for none.
        total: Number of items, None if unknown.
        initial: Number of items that were done before.
        description: A label.
        unit: Name of an item.
    """

    def __init__(
        self,
        items: Iterable[T],
        view: View | None,
        *,
        device: torch.device | None,
        total: int | None,
        initial: int,
        description: str,
        unit: str,
    ) -> None:
        self._items = items
        self._view = view
        self._device = device
        self._total = total
        self._initial = initial
        self._count = initial
        self._description = description
        self._unit = unit
        self._metrics: dict[str, object] = {}
        self._start_s = 0.0
        self._has_failed = False
        self._marks: deque[tuple[float, int]] = deque(maxlen=_NUM_RATES)
        self._iterator: Iterator[T] | None = None

    def __iter__(self) -> Iterator[T]:
        # Not kept here: the `for` statement has the only reference, so that `break` closes the bar.
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            return iterator
        if self._view is None:
            return iter(self._items)
        return self._iterate(self._view)

    def __next__(self) -> T:
        if self._iterator is None:
            self._iterator = iter(self)
        return next(self._iterator)

    def __repr__(self) -> str:
        return f"Progress(count={self._count}, total={self._total})"

    def show(self, metrics: Mapping[str, object]) -> None:
        """Show metrics from the next redraw on; tensors are read then."""
        if self._view is None:
            return
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                value = value.detach()  # or the graph of the step would stay until the next one
            self._metrics[name] = value

    def _iterate(self, view: View) -> Iterator[T]:
        clock = time.monotonic
        count = self._initial
        self._start(clock())
        # Not what the first drawing has cost: it imports.
        self._draw(view)
        next_count, next_s = view.next_count(count, self._total), clock() + view.interval_s
        try:
            # Each item adds a comparison and a look at the clock.
            for item in self._items:
                yield item  # first, so that an item counts after the caller has processed it
                count += 1
                if count >= next_count or clock() >= next_s:
                    self._count = count
                    next_count, next_s = view.next_count(count, self._total), self._draw(view)
        finally:  # also after `break` and errors
            # Of a loop that is left, the item in work does not count.
            self._count = count
            self._write(view.close, self._status(clock()))

    def _start(self, now_s: float) -> None:
        self._count = self._initial
        self._start_s = now_s
        self._marks.clear()
        self._marks.append((now_s, self._initial))

    def _draw(self, view: View) -> float:
        """Show how far the iteration is; return the time of the next redraw."""
        if self._has_failed:
            return math.inf
        start_s = time.monotonic()
        status = self._status(start_s)
        read_s = time.monotonic()
        self._write(view.draw, status)
        end_s = time.monotonic()
        self._marks.append((start_s, self._count))
        costs_s = _DRAW_FACTOR * (end_s - read_s) + _WAIT_FACTOR * (read_s - start_s)
        return end_s + max(view.interval_s, costs_s)

    def _write(self, draw: Callable[[Status], None], status: Status) -> None:
        # A full disk, or a terminal that was closed, must not end the training.
        try:
            draw(status)
        except (OSError, ValueError):  # ValueError: a closed file
            self._has_failed = True

    def _status(self, now_s: float) -> Status:
        first_s, first_count = self._marks[0]
        rate = None
        if self._count > first_count and now_s > first_s:
            rate = (self._count - first_count) / (now_s - first_s)
        peak_bytes = None
        if self._device is not None:
            peak_bytes = device_table.peak_bytes(self._device)
        return Status(
            description=self._description,
            count=self._count,
            total=self._total,
            unit=self._unit,
            elapsed_s=now_s - self._start_s,
            rate=rate,
            metrics=metric_texts(self._metrics),
            peak_bytes=peak_bytes,
        )


@effectful(AMBIENT)
def progress(
    items: Iterable[T],
    ctx: DistContext,
    *,
    total: int | None = None,
    initial: int = 0,
    description: str = "",
    unit: str = "it",
    file: TextIO | None = None,
) -> Progress[T]:
    """Yield the items, and show the progress on rank 0.

    Effects: ambient. A terminal and a notebook have a bar that is redrawn, anything else a line
    after each tenth of a known total, else after 1, 2, 4, ... items, and at least every 30 s.
    Drawing takes at most 0.5 % of the time. While a bar is in a terminal, `sys.stdout` and
    `sys.stderr` are replaced if they are terminals, so that `print` writes above the bar. The
    loggers of `get_logger` do so, too.

    Args:
        items: Any iterable.
        ctx: The context.
        total: Number of items; None takes `initial + len(items)`, if they have a length.
        initial: How many of the total were done before, as after a resume.
        description: Label of the bar or the lines.
        unit: Name of an item, as in "step".
        file: Where to print; None is standard error, or the output of the cell of a notebook.

    Returns:
        An iterable for one `for` statement. Metrics are shown in it with `show`.

    Raises:
        ConfigError: `items` cannot be iterated over, or a count is negative.

    Examples:
        >>> from faccel.testing import fake_context
        >>> list(progress([1, 2], fake_context(1, 2)))
        [1, 2]
    """
    require_context(ctx, "faccel.progress(items, ctx)")
    if not hasattr(items, "__iter__") and not hasattr(items, "__getitem__"):
        raise ConfigError(
            "`items` must be iterable",
            got=f"an object of type {type(items).__name__}",
            fix="write `faccel.progress(range(num_steps), ctx)`",
        )
    integer("initial", initial, at_least=0)
    if total is None:
        total = _total_of(items, initial)
    else:
        integer("total", total, at_least=0)
    view = None
    # The items are not touched: each rank iterates over them at its own speed.
    if ctx.is_main:
        view = view_of(file)
    device = None
    if not is_host(ctx.device):
        device = ctx.device
    return Progress(
        items,
        view,
        device=device,
        total=total,
        initial=initial,
        description=description,
        unit=unit,
    )


def _total_of(items: object, initial: int) -> int | None:
    if not isinstance(items, Sized):
        return None
    # A `DataLoader` over a stream has the method, and raises in it.
    try:
        return initial + len(items)
    except (TypeError, NotImplementedError):
        return None


@effectful(updates("bar"))
def show(metrics: Mapping[str, object], bar: Progress[T]) -> None:
    """Show metrics in a progress bar.

    Effects: updates bar. Tensors are detached, and read when the bar is redrawn: only then does the
    host wait for the device. On ranks that show no progress it does nothing.

    Args:
        metrics: Numbers, tensors of one element or text, by name. They stay until a later value.
        bar: From `progress`.

    Raises:
        ConfigError: `metrics` is not a mapping, or `bar` is not from `progress`.

    Examples:
        >>> import sys
        >>> from faccel.testing import fake_context
        >>> bar = progress(range(2), fake_context(0, 1), file=sys.stdout)
        >>> for step in bar:
        ...     show({"step": step}, bar)  # doctest: +ELLIPSIS
        1/2 in 0.0 s, ... it/s, 0:00 left, step 0
        2/2 in 0.0 s, ... it/s, step 1
    """
    # One test in an ordinary step; the messages are made elsewhere.
    if type(metrics) is not dict or type(bar) is not Progress:
        _check_show(metrics, bar)
    bar.show(metrics)


def _check_show(metrics: object, bar: object) -> None:
    fix = 'write `bar = faccel.progress(items, ctx)`, then `show({"loss": loss}, bar)`'
    instance_of("metrics", metrics, Mapping, fix=fix)
    instance_of("bar", bar, Progress, fix=fix)
