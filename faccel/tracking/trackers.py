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

from faccel.checks import instance_of, local_path, one_of
from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, effectful, updates
from faccel.errors import ConfigError, FaccelError, short_repr, short_text
from faccel.tracking.values import plain_value, run_config, to_json

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

RunConfig = Mapping[str, object]


@attrs.frozen(eq=False)
class Tracker:
    """One way to record a run, as three functions.

    Args:
        open: `open(folder, config) -> state`: starts or continues a run in an existing folder.
        log: `log(state, values, step)`: records values. Numbers and tensors of one element are
            floats.
        close: `close(state)`: ends the run. Afterwards everything is on disk.
        types: The types of values that `log` records. A value of another type is left out, and the
            logger `faccel` names it once.
    """

    # The types of `state` and of values other than floats are known to the tracker only.
    open: Callable[[Path, RunConfig], Any]
    log: Callable[[Any, Mapping[str, Any], int], None]
    close: Callable[[Any], None]
    types: tuple[type, ...] = (float,)


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

    def report_omission(self, source: str, name: str, reason: str) -> None:
        """Log once that a source leaves out the values of a name.

        Effects: ambient. The other values are recorded.
        """
        key = f"{source}, {name}"
        if key in self._failed:
            return
        self._failed.add(key)
        logging.getLogger("faccel").error("%s leaves out `%s`: %s", source, name, reason)


def _open_jsonl(folder: Path, config: RunConfig) -> TextIO:
    (folder / "config.json").write_text(
        json.dumps(to_json(config), indent=2) + "\n", encoding="utf-8"
    )
    return (folder / "metrics.jsonl").open("a", encoding="utf-8")


def _log_jsonl(file: TextIO, values: Mapping[str, object], step: int) -> None:
    line = to_json({"step": step, "time": time.time(), **values})
    file.write(json.dumps(line) + "\n")
    file.flush()  # a killed run keeps all that it logged


def _open_csv(folder: Path, config: RunConfig) -> TextIO:
    path = folder / "metrics.csv"
    # a continued run has its header already
    is_new = not path.exists() or path.stat().st_size == 0
    # The csv module writes the ends of lines; text mode would translate them a second time.
    file = path.open("a", newline="", encoding="utf-8")
    # One row per number, because a column per name needs all names before the first row.
    if is_new:
        csv.writer(file).writerow(("step", "name", "value"))
    return file


def _log_csv(file: TextIO, values: Mapping[str, object], step: int) -> None:
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
    writer.add_text("config", json.dumps(to_json(config), indent=2))
    return writer


def _log_tensorboard(writer: SummaryWriter, values: Mapping[str, Any], step: int) -> None:
    for name, value in values.items():
        if isinstance(value, str):
            writer.add_text(name, value, step)
        else:
            writer.add_scalar(name, value, step)


def _close(file: TextIO | SummaryWriter) -> None:
    file.close()


TRACKERS: Mapping[str, Tracker] = MappingProxyType(
    {
        "csv": Tracker(_open_csv, _log_csv, _close, types=(float, str)),
        # JSON has lists and objects; what it has not is written as text
        "jsonl": Tracker(_open_jsonl, _log_jsonl, _close, types=(object,)),
        "tensorboard": Tracker(_open_tensorboard, _log_tensorboard, _close, types=(float, str)),
    }
)
"""The built-in trackers by name. For another service, pass a `Tracker` to `init_trackers`."""


@effectful(AMBIENT)
def init_trackers(
    run: str,
    ctx: DistContext,
    *,
    trackers: Sequence[str | Tracker] = ("jsonl",),
    config: object = None,
) -> Trackers:
    """Start to record a run in the folder `ctx.config.run_dir / run`.

    Effects: ambient. Rank 0 creates the folder and opens the trackers. A run that exists continues.

    Args:
        run: Name of the run.
        ctx: The context.
        trackers: `"jsonl"`, `"csv"`, `"tensorboard"`, or a `Tracker`.
        config: What to store about the run: a mapping, a dataclass or attrs record, a `Namespace`
            of argparse, or another object with attributes.

    Returns:
        The trackers, for `log` and `finish`.

    Raises:
        ConfigError: A tracker is unknown, not installed or named twice, `config` has no fields,
            `run` is a URL, or its folder cannot be created.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1, config={"run_dir": tempfile.mkdtemp()})
        >>> trackers = init_trackers("a", ctx, config={"lr": 0.1})
        >>> log({"loss": 2.5}, trackers, step=1)
        >>> finish(trackers)
    """
    require_context(ctx, "faccel.tracking.init_trackers(run, ctx)")
    # Every rank raises on a wrong argument, although only rank 0 records.
    local_path("run", run)
    by_name = _named_trackers(trackers)
    fields = run_config(config)
    if not ctx.is_main:
        return Trackers()
    folder = _new_folder(Path(ctx.config.run_dir) / run)
    opened: list[tuple[str, Tracker, object]] = []
    for name, tracker in by_name.items():
        try:
            opened.append((name, tracker, tracker.open(folder, fields)))
        except FaccelError:  # a requested tracker is not installed
            raise
        except Exception as error:
            # A service that is unreachable must not stop the training. The other trackers open.
            Trackers().report_failure(f"the tracker `{name}`", error)
    return Trackers(opened)


def _new_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # read-only, full, or a file is in the way
        raise ConfigError(
            "the folder of the run cannot be created in `run_dir`",
            got=f"{short_text(str(folder))}: {error.strerror}",
            fix='name a folder in a writable place, as in `run_dir="/tmp/runs"`',
        ) from error
    return folder


def _named_trackers(trackers: Sequence[str | Tracker]) -> dict[str, Tracker]:
    """Return the trackers by name: that of a built-in one, or the position of a custom one."""
    fix = 'write `trackers=("jsonl",)`'
    # A str is a sequence of letters.
    if isinstance(trackers, str):
        raise ConfigError(
            "`trackers` must be a list of trackers", got=short_repr(trackers), fix=fix
        )
    by_name: dict[str, Tracker] = {}
    for index, tracker in enumerate(trackers):
        if isinstance(tracker, Tracker):
            by_name[f"trackers[{index}]"] = tracker
            continue
        one_of("trackers", tracker, TRACKERS)
        if tracker in by_name:  # it would write each value twice into one file
            raise ConfigError(
                f"`trackers` has `{tracker}` twice", got=short_repr(trackers), fix=fix
            )
        by_name[tracker] = TRACKERS[tracker]
    return by_name


@effectful(AMBIENT, updates("trackers"))
def log(values: Mapping[str, object], trackers: Trackers, *, step: int) -> None:
    """Record numbers, and values of other types with the trackers that can record them.

    `"jsonl"` records every value, `"csv"` and `"tensorboard"` record numbers and text.

    Effects: ambient, updates trackers. On rank 0 the host waits for tensors on a device. A tracker
    that fails never stops the training: its first failure is logged by the logger `faccel`. A value
    that a tracker cannot record is left out; the logger names it once.

    Args:
        values: Numbers, tensors of one element or other values, by name.
        trackers: From `init_trackers`.
        step: The step that they belong to.

    Raises:
        ConfigError: `values` is not a mapping, or `trackers` are not from `init_trackers`.

    Examples:
        >>> log({"loss": 2.5, "phase": "warm-up"}, Trackers(), step=1)
    """
    instance_of("values", values, Mapping, fix='write `log({"loss": loss}, trackers, step=step)`')
    fix = "write `trackers = init_trackers(run, ctx)`, then `log(values, trackers, step=step)`"
    instance_of("trackers", trackers, Trackers, fix=fix)
    # Before the conversion, so that only rank 0 waits for its device.
    if not trackers.opened:
        return
    # Once for all trackers: each conversion waits for the device.
    plain: dict[str, object] = {}
    for name, value in values.items():
        try:
            plain[str(name)] = plain_value(value)
        # One value of an unexpected type must not drop the others.
        except Exception as error:
            trackers.report_omission("`log`", str(name), short_repr(error))
    for name, tracker, state in trackers.opened:
        source = f"the tracker `{name}`"
        try:
            tracker.log(state, _supported(plain, tracker, trackers, source), step)
        except Exception as error:
            trackers.report_failure(source, error)


def _supported(
    values: Mapping[str, object], tracker: Tracker, trackers: Trackers, source: str
) -> dict[str, object]:
    """Return the values of types that a tracker records."""
    supported: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, tracker.types):
            supported[name] = value
        else:
            reason = f"it records no values of type {type(value).__name__}"
            trackers.report_omission(source, name, reason)
    return supported


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
