"""The records of experiment tracking: one way to record a run, and the open trackers of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from faccel.checks import instance_of

Cell = str | float | int | bool | None
"""What a cell of a table contains."""


def _state(state: Any) -> Any:
    return state


# The type of `state` is decided by `open`, and that of a figure by the library that draws it.
@attrs.frozen(eq=False)
class Tracker:
    """One way to record a run, as functions. Those that are None are not supported.

    Args:
        open: `open(folder, config, **options) -> state`: starts or continues a run in an existing
            folder. The options are those of `init_trackers`.
        log: `log(state, values, step)`: records values. Numbers and tensors of one element are
            floats.
        close: `close(state)`: ends the run. Afterwards everything is on disk.
        types: The types of values that `log` records. A value of another type is left out, and the
            logger `faccel` names it once.
        images: `images(state, name, images, step)`: records images, `uint8[n, h, w, c]` of NumPy,
            with 1, 3 or 4 channels.
        table: `table(state, name, columns, rows, step)`: records a table. Each row has a cell per
            column: a number, text, a bool or None.
        figure: `figure(state, name, figure, step)`: records a figure of matplotlib or plotly.
            Without it, figures of matplotlib are recorded as images.
        file: `file(state, name, path)`: records a copy of an existing file.
        handle: `handle(state)`: what `faccel.tracking.handle` returns; the state by default.
        name: Name for `handle`, for `options=` and for messages.
    """

    open: Callable[..., Any]
    log: Callable[[Any, Mapping[str, Any], int], None]
    close: Callable[[Any], None]
    types: tuple[type, ...] = (float,)
    images: Callable[[Any, str, np.ndarray, int], None] | None = None
    table: Callable[[Any, str, Sequence[str], Sequence[Sequence[Cell]], int], None] | None = None
    figure: Callable[[Any, str, Any, int], None] | None = None
    file: Callable[[Any, str, Path], None] | None = None
    handle: Callable[[Any], Any] = _state
    name: str = ""


@attrs.frozen(eq=False)
class Trackers:
    """The trackers of a run; none is open on the ranks other than 0.

    Args:
        opened: Name, tracker and state of each.
        names: The names of all requested trackers, on every rank.
    """

    opened: Sequence[tuple[str, Tracker, object]] = ()
    names: Sequence[str] = ()
    # Sources whose failure is logged already: a broken service must not flood the log.
    _failed: set[str] = attrs.field(factory=set, init=False, repr=False)

    def report_failure(self, source: str, error: Exception, hint: str = "") -> None:
        """Log the first failure of a source, such as "the tracker `csv`"; ignore later ones.

        Effects: ambient. Training continues.
        """
        if source in self._failed:
            return
        self._failed.add(source)
        logging.getLogger("faccel").error(
            "%s failed; its later failures are not logged: %r%s", source, error, hint
        )

    def report_omission(self, source: str, name: str, reason: str) -> None:
        """Log once that a source leaves out the values of a name.

        Effects: ambient. The other values are recorded.
        """
        key = f"{source}, {name}"
        if key in self._failed:
            return
        self._failed.add(key)
        logging.getLogger("faccel").error("%s leaves out `%s`: %s", source, name, reason)


def require_trackers(trackers: object, call: str) -> None:
    """Check that an argument is what `init_trackers` has returned.

    Effects: pure.

    Raises:
        ConfigError: It is something else; the fix has `call`.
    """
    if not isinstance(trackers, Trackers):
        fix = f"write `trackers = init_trackers(run, ctx)`, then `{call}`"
        instance_of("trackers", trackers, Trackers, fix=fix)
