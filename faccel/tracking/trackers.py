"""Experiment trackers: what a run tells the outside, written once, by rank 0."""

from __future__ import annotations

import csv
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import attrs
import torch

from faccel.context import DistContext
from faccel.effects import AMBIENT, effectful, updates
from faccel.errors import ConfigError, FaccelError, nearest


@attrs.frozen(eq=False)
class Tracker:
    """One way to record a run, as three functions.

    Args:
        open: `open(folder, config) -> state`: begins a run in a folder that is there.
        log: `log(state, values, step)`: records numbers.
        close: `close(state)`: ends the run; everything is on disk afterwards.
    """

    open: Callable[[Path, Mapping[str, Any]], Any]
    log: Callable[[Any, Mapping[str, float], int], None]
    close: Callable[[Any], None]


@attrs.frozen(eq=False)
class Trackers:
    """The trackers of a run; empty on every rank but 0.

    Args:
        opened: Name, tracker and state of each.
    """

    opened: Sequence[tuple[str, Tracker, Any]] = ()
    _silent: set[str] = attrs.field(
        factory=set, init=False, repr=False
    )  # those that have failed, and said so


def _open_jsonl(folder: Path, config: Mapping[str, Any]) -> Any:
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, default=str) + "\n")
    return (folder / "metrics.jsonl").open("a")


def _log_jsonl(file: Any, values: Mapping[str, float], step: int) -> None:
    file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
    file.flush()


def _open_csv(folder: Path, config: Mapping[str, Any]) -> Any:
    file = (folder / "metrics.csv").open("a", newline="")
    if not file.tell():
        csv.writer(file).writerow(("step", "name", "value"))
    return file


def _log_csv(file: Any, values: Mapping[str, float], step: int) -> None:
    csv.writer(file).writerows((step, name, value) for name, value in values.items())
    file.flush()


def _open_tensorboard(folder: Path, config: Mapping[str, Any]) -> Any:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "the tracker `tensorboard` is not installed",
            got=str(error),
            fix='run `pip install "faccel[track]"`',
        ) from None
    writer = SummaryWriter(str(folder))
    writer.add_text("config", json.dumps(dict(config), indent=2, default=str))
    return writer


def _log_tensorboard(writer: Any, values: Mapping[str, float], step: int) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)


def _close(file: Any) -> None:
    file.close()


TRACKERS: Mapping[str, Tracker] = MappingProxyType(
    {
        "csv": Tracker(_open_csv, _log_csv, _close),
        "jsonl": Tracker(_open_jsonl, _log_jsonl, _close),
        "tensorboard": Tracker(_open_tensorboard, _log_tensorboard, _close),
    }
)
"""Those that faccel has; a `Tracker` of your own goes beside their names."""


@effectful(AMBIENT)
def init_trackers(
    run: str,
    ctx: DistContext,
    *,
    trackers: Sequence[str | Tracker] = ("jsonl",),
    config: Mapping[str, Any] | None = None,
) -> Trackers:
    """Begin to record a run in `ctx.config.run_dir / run`.

    Effects: ambient. Rank 0 makes the folder and opens the trackers; a run that is there already is gone on with.

    Args:
        run: Name of the run.
        ctx: The world.
        trackers: `"jsonl"`, `"csv"`, `"tensorboard"`, or a `Tracker` of your own.
        config: What to remember about the run.

    Returns:
        For `log` and `finish`.

    Raises:
        ConfigError: An unknown tracker, or one that is not installed.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1, config={"run_dir": tempfile.mkdtemp()})
        >>> trackers = init_trackers("a", ctx, config={"lr": 0.1})
        >>> log({"loss": 2.5}, trackers, step=1)
        >>> finish(trackers)
    """
    chosen: list[tuple[str, Tracker]] = []
    for each in trackers:
        if isinstance(each, str) and each not in TRACKERS:
            raise ConfigError(f"`{each}` is not a tracker", fix=nearest(each, TRACKERS))
        chosen.append(
            (each, TRACKERS[each]) if isinstance(each, str) else (type(each).__name__, each)
        )
    if not ctx.is_main:
        return Trackers()
    folder = Path(ctx.config.run_dir) / run
    folder.mkdir(parents=True, exist_ok=True)
    opened: list[tuple[str, Tracker, Any]] = []
    for name, tracker in chosen:
        try:
            opened.append((name, tracker, tracker.open(folder, config or {})))
        except FaccelError:  # it was asked for by name and is not there
            raise
        except Exception as error:
            _say_once(Trackers(), name, error)
    return Trackers(opened)


@effectful(AMBIENT, updates("trackers"))
def log(values: Mapping[str, float | torch.Tensor], trackers: Trackers, *, step: int) -> None:
    """Record numbers. A tracker that fails says so once, in the log of `faccel`, and never stops the training.

    Effects: ambient, updates trackers. On rank 0 the host waits for tensors on a device.

    Args:
        values: Name to number or 0-d tensor.
        trackers: From `init_trackers`.
        step: Which step they belong to.

    Examples:
        >>> log({"loss": 2.5}, Trackers(), step=1)
    """
    if not trackers.opened:
        return
    try:
        numbers = {name: float(value) for name, value in values.items()}
    except (TypeError, ValueError) as error:
        _say_once(trackers, "of values that are no numbers", error)
        return
    for name, tracker, state in trackers.opened:
        _guarded(trackers, name, tracker.log, state, numbers, step)


@effectful(AMBIENT, updates("trackers"))
def finish(trackers: Trackers) -> None:
    """End the recording; everything is on disk afterwards.

    Effects: ambient, updates trackers.

    Examples:
        >>> finish(Trackers())
    """
    for name, tracker, state in trackers.opened:
        _guarded(trackers, name, tracker.close, state)


def _guarded(trackers: Trackers, name: str, call: Callable[..., None], *args: Any) -> None:
    try:
        call(*args)
    except Exception as error:
        _say_once(trackers, name, error)


def _say_once(trackers: Trackers, name: str, error: Exception) -> None:
    silent = trackers._silent  # pyright: ignore[reportPrivateUsage]
    if name not in silent:
        silent.add(name)
        logging.getLogger("faccel").error(
            "the tracker `%s` failed, and will not say so again: %r", name, error
        )
