"""Experiment trackers: rank 0 records the metrics of a run in files or with a service."""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TextIO

import attrs
import torch

from faccel.checks import local_path, one_of
from faccel.context import DistContext
from faccel.effects import AMBIENT, effectful, updates
from faccel.errors import ConfigError, FaccelError

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

RunConfig = Mapping[str, object]


@attrs.frozen(eq=False)
class Tracker:
    """One way to record a run, as three functions.

    Args:
        open: `open(folder, config) -> state`: starts or continues a run in an existing folder.
        log: `log(state, values, step)`: records numbers.
        close: `close(state)`: ends the run. Afterwards everything is on disk.
    """

    # The type of `state` is known to the tracker only.
    open: Callable[[Path, RunConfig], Any]
    log: Callable[[Any, Mapping[str, float], int], None]
    close: Callable[[Any], None]


@attrs.frozen(eq=False)
class Trackers:
    """The trackers of a run; empty on every rank except 0.

    Args:
        opened: Name, tracker and state of each.
    """

    opened: Sequence[tuple[str, Tracker, object]] = ()
    # Sources whose failure is logged already: a broken service must not flood the log.
    _failed: set[str] = attrs.field(factory=set, init=False, repr=False)

    def report_failure(self, source: str, error: Exception) -> None:
        """Log the first failure of a source, such as "the tracker `csv`"; ignore later ones.

        Effects: ambient. Training continues.
        """
        if source in self._failed:
            return
        self._failed.add(source)
        logging.getLogger("faccel").error(
            "%s failed; its later failures are not logged: %r", source, error
        )


def _to_json(values: Mapping[str, object], indent: int | None = None) -> str:
    # `default=str`: the configuration of a run contains paths, dtypes and the like
    return json.dumps(dict(values), indent=indent, default=str)


def _open_jsonl(folder: Path, config: RunConfig) -> TextIO:
    (folder / "config.json").write_text(_to_json(config, indent=2) + "\n")
    return (folder / "metrics.jsonl").open("a")


def _log_jsonl(file: TextIO, values: Mapping[str, float], step: int) -> None:
    file.write(_to_json({"step": step, "time": time.time(), **values}) + "\n")
    file.flush()  # a killed run keeps all that it logged


def _open_csv(folder: Path, config: RunConfig) -> TextIO:
    path = folder / "metrics.csv"
    # a continued run has its header already
    is_new = not path.exists() or path.stat().st_size == 0
    # The csv module writes the ends of lines; text mode would translate them a second time.
    file = path.open("a", newline="")
    # One row per number, because a column per name needs all names before the first row.
    if is_new:
        csv.writer(file).writerow(("step", "name", "value"))
    return file


def _log_csv(file: TextIO, values: Mapping[str, float], step: int) -> None:
    csv.writer(file).writerows((step, name, value) for name, value in values.items())
    file.flush()


def _open_tensorboard(folder: Path, config: RunConfig) -> SummaryWriter:
    # tensorboard is an optional dependency, and slow to import.
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "the tracker `tensorboard` is not installed",
            got=str(error),
            fix='run `pip install "faccel[track]"`',
        ) from None
    writer = SummaryWriter(str(folder))
    writer.add_text("config", _to_json(config, indent=2))
    return writer


def _log_tensorboard(writer: SummaryWriter, values: Mapping[str, float], step: int) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)


def _close(file: TextIO | SummaryWriter) -> None:
    file.close()


TRACKERS: Mapping[str, Tracker] = MappingProxyType(
    {
        "csv": Tracker(_open_csv, _log_csv, _close),
        "jsonl": Tracker(_open_jsonl, _log_jsonl, _close),
        "tensorboard": Tracker(_open_tensorboard, _log_tensorboard, _close),
    }
)
"""The built-in trackers by name. For another service, pass a `Tracker` to `init_trackers`."""


@effectful(AMBIENT)
def init_trackers(
    run: str,
    ctx: DistContext,
    *,
    trackers: Sequence[str | Tracker] = ("jsonl",),
    config: RunConfig | None = None,
) -> Trackers:
    """Start to record a run in the folder `ctx.config.run_dir / run`.

    Effects: ambient. Rank 0 creates the folder and opens the trackers. A run that exists continues.

    Args:
        run: Name of the run.
        ctx: The context.
        trackers: `"jsonl"`, `"csv"`, `"tensorboard"`, or a `Tracker`.
        config: What to store about the run.

    Returns:
        The trackers, for `log` and `finish`.

    Raises:
        ConfigError: A tracker is unknown or not installed, or `run` is a URL.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1, config={"run_dir": tempfile.mkdtemp()})
        >>> trackers = init_trackers("a", ctx, config={"lr": 0.1})
        >>> log({"loss": 2.5}, trackers, step=1)
        >>> finish(trackers)
    """
    local_path("run", run)
    by_name = [_named_tracker(tracker) for tracker in trackers]  # every rank raises on a wrong name
    if not ctx.is_main:
        return Trackers()
    folder = Path(ctx.config.run_dir) / run
    folder.mkdir(parents=True, exist_ok=True)
    opened: list[tuple[str, Tracker, object]] = []
    for name, tracker in by_name:
        try:
            opened.append((name, tracker, tracker.open(folder, config or {})))
        except FaccelError:  # a requested tracker is not installed
            raise
        except Exception as error:
            # A service that is unreachable must not stop the training. The other trackers open.
            Trackers().report_failure(f"the tracker `{name}`", error)
    return Trackers(opened)


def _named_tracker(tracker: str | Tracker) -> tuple[str, Tracker]:
    if isinstance(tracker, Tracker):
        return "Tracker", tracker
    one_of("trackers", tracker, TRACKERS)
    return tracker, TRACKERS[tracker]


@effectful(AMBIENT, updates("trackers"))
def log(values: Mapping[str, float | torch.Tensor], trackers: Trackers, *, step: int) -> None:
    """Record numbers.

    Effects: ambient, updates trackers. On rank 0 the host waits for tensors on a device. A tracker
    that fails never stops the training: its first failure is logged by the logger `faccel`.

    Args:
        values: Numbers or 0-d tensors by name.
        trackers: From `init_trackers`.
        step: The step that they belong to.

    Examples:
        >>> log({"loss": 2.5}, Trackers(), step=1)
    """
    # Before `float`, so that only rank 0 waits for its device.
    if not trackers.opened:
        return
    # Once for all trackers: each conversion waits for the device.
    try:
        numbers = {name: float(value) for name, value in values.items()}
    except (TypeError, ValueError) as error:
        trackers.report_failure("`log` with a value that is not a number", error)
        return
    for name, tracker, state in trackers.opened:
        try:
            tracker.log(state, numbers, step)
        except Exception as error:
            trackers.report_failure(f"the tracker `{name}`", error)


@effectful(AMBIENT, updates("trackers"))
def finish(trackers: Trackers) -> None:
    """End the recording. Afterwards everything is on disk.

    Effects: ambient, updates trackers.

    Examples:
        >>> finish(Trackers())
    """
    for name, tracker, state in trackers.opened:
        try:
            tracker.close(state)
        except Exception as error:
            trackers.report_failure(f"the tracker `{name}`", error)
