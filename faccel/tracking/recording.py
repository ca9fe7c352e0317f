"""What rank 0 records with the trackers of a run: values, images, tables, figures and files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from faccel.checks import instance_of, local_path, one_of
from faccel.effects import AMBIENT, effectful, updates
from faccel.errors import FaccelError, short_repr, short_text
from faccel.tracking import media
from faccel.tracking.tracker import Tracker, Trackers, require_trackers
from faccel.tracking.values import plain_value

T = TypeVar("T")


@effectful(AMBIENT, updates("trackers"))
def log(values: Mapping[str, object], trackers: Trackers, *, step: int) -> None:
    """Record numbers, and values of other types with the trackers that can record them.

    `"jsonl"` and `"wandb"` record values of any type, the others numbers, and most of them text.

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
    # The test for a mapping of any type takes as long as the rest of the checks.
    if type(values) is not dict:
        fix = 'write `log({"loss": loss}, trackers, step=step)`'
        instance_of("values", values, Mapping, fix=fix)
    require_trackers(trackers, "log(values, trackers, step=step)")
    # Before the conversion, so that only rank 0 waits for its device.
    if not trackers.opened:
        return
    # Once for all trackers: each conversion waits for the device.
    plain = _converted(values, plain_value, trackers, "`log`")
    for name, tracker, state in trackers.opened:
        source = f"the tracker `{name}`"
        try:
            tracker.log(state, _supported(plain, tracker, trackers, source), step)
        except Exception as error:
            trackers.report_failure(source, error)


def _converted(
    values: Mapping[str, Any], convert: Callable[[Any], T], trackers: Trackers, source: str
) -> dict[str, T]:
    """Return the values that can be converted; one that cannot must not drop the others."""
    converted: dict[str, T] = {}
    for name, value in values.items():
        try:
            converted[str(name)] = convert(value)
        except Exception as error:
            trackers.report_omission(source, str(name), _reason(error))
    return converted


def _reason(error: Exception) -> str:
    # The message of an error of faccel has the fix.
    if isinstance(error, FaccelError):
        return str(error)
    return short_repr(error)


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


_Write = Callable[..., None]


def _record(
    trackers: Trackers, call: str, name: str, select: Callable[[Tracker], _Write | None], *args: Any
) -> None:
    """Call `write(state, name, *args)` for each tracker, where `write` is what `select` returns."""
    for tracker_name, tracker, state in trackers.opened:
        source = f"the tracker `{tracker_name}`"
        write = select(tracker)
        if write is None:
            trackers.report_omission(source, name, f"it has no `{call}`")
            continue
        try:
            write(state, name, *args)
        except FaccelError as error:  # about this value
            trackers.report_omission(source, name, str(error))
        except Exception as error:
            # Apart from `log`: a service may refuse images and record numbers.
            trackers.report_failure(f"`{call}` of {source}", error)


@effectful(AMBIENT, updates("trackers"))
def log_images(
    images: Mapping[str, object], trackers: Trackers, *, step: int, layout: str = "HWC"
) -> None:
    """Record images with the trackers that can record them.

    Effects: ambient, updates trackers. On rank 0 the host waits for tensors on a device. Images of
    an invalid shape or range are left out, and the logger `faccel` names them once.

    Args:
        images: Tensors or arrays `T[n, h, w, c]` by name: uint8, bool, or floats between 0 and 1,
            with 1, 3 or 4 channels.
        trackers: From `init_trackers`.
        step: The step that they belong to.
        layout: `"CHW"` for `T[n, c, h, w]`.

    Raises:
        ConfigError: `images` is not a mapping, `layout` is unknown, or `trackers` are not from
            `init_trackers`.

    Examples:
        >>> import torch
        >>> log_images({"samples": torch.rand(4, 3, 8, 8)}, Trackers(), step=1, layout="CHW")
    """
    fix = 'write `log_images({"samples": images}, trackers, step=step)`'
    instance_of("images", images, Mapping, fix=fix)
    one_of("layout", layout, media.LAYOUTS)
    require_trackers(trackers, "log_images(images, trackers, step=step)")
    if not trackers.opened:
        return

    def convert(value: object) -> Any:
        return media.image_array(value, layout)

    for name, array in _converted(images, convert, trackers, "`log_images`").items():
        _record(trackers, "log_images", name, lambda tracker: tracker.images, array, step)


@effectful(AMBIENT, updates("trackers"))
def log_table(tables: Mapping[str, object], trackers: Trackers, *, step: int) -> None:
    """Record tables with the trackers that can record them.

    Effects: ambient, updates trackers. On rank 0 the host waits for tensors on a device. An invalid
    table is left out, and the logger `faccel` names it once.

    Args:
        tables: By name: a mapping from columns to lists of values, a list of rows that are
            mappings, or a `DataFrame`.
        trackers: From `init_trackers`.
        step: The step that they belong to.

    Raises:
        ConfigError: `tables` is not a mapping, or `trackers` are not from `init_trackers`.

    Examples:
        >>> log_table({"answers": {"text": ["yes"], "score": [0.5]}}, Trackers(), step=1)
    """
    fix = 'write `log_table({"answers": {"text": texts, "score": scores}}, trackers, step=step)`'
    instance_of("tables", tables, Mapping, fix=fix)
    require_trackers(trackers, "log_table(tables, trackers, step=step)")
    if not trackers.opened:
        return
    converted = _converted(tables, media.table_rows, trackers, "`log_table`")
    for name, (columns, rows) in converted.items():
        _record(trackers, "log_table", name, lambda tracker: tracker.table, columns, rows, step)


@effectful(AMBIENT, updates("trackers"))
def log_figure(figures: Mapping[str, object], trackers: Trackers, *, step: int) -> None:
    """Record figures of matplotlib or plotly with the trackers that can record them.

    Effects: ambient, updates trackers. Trackers that have images, but no figures, record an image
    of a figure of matplotlib.

    Args:
        figures: Figures by name.
        trackers: From `init_trackers`.
        step: The step that they belong to.

    Raises:
        ConfigError: `figures` is not a mapping, or `trackers` are not from `init_trackers`.

    Examples:
        >>> log_figure({"confusion": object()}, Trackers(), step=1)
    """
    fix = 'write `log_figure({"confusion": figure}, trackers, step=step)`'
    instance_of("figures", figures, Mapping, fix=fix)
    require_trackers(trackers, "log_figure(figures, trackers, step=step)")
    for name, figure in figures.items():
        _record(trackers, "log_figure", str(name), _figure_writer, figure, step)


def _figure_writer(tracker: Tracker) -> _Write | None:
    """Return how a tracker records a figure: as it is, as an image, or not at all."""
    write_images = tracker.images
    # A figure with axes that can be zoomed is better than an image of it.
    if tracker.figure is not None or write_images is None:
        return tracker.figure

    def write(state: object, name: str, figure: object, step: int) -> None:
        write_images(state, name, media.figure_array(figure), step)

    return write


@effectful(AMBIENT, updates("trackers"))
def log_file(path: str | os.PathLike[str], trackers: Trackers, *, name: str | None = None) -> None:
    """Record a copy of a file with the trackers that can record files.

    Effects: ambient, updates trackers. Rank 0 reads the file. A missing file is left out, and the
    logger `faccel` names it once.

    Args:
        path: A local file.
        trackers: From `init_trackers`.
        name: What the service calls it; None takes the name of the file.

    Raises:
        ConfigError: `path` is no path or a URL, or `trackers` are not from `init_trackers`.

    Examples:
        >>> log_file("train.py", Trackers())
    """
    local_path("path", path)
    require_trackers(trackers, "log_file(path, trackers)")
    if not trackers.opened:
        return
    # Absolute, because a service may copy it later, from another working folder.
    file = Path(path).resolve()
    label = name or file.name
    if not file.is_file():
        trackers.report_omission("`log_file`", label, _why_no_file(file))
        return
    _record(trackers, "log_file", label, lambda tracker: tracker.file, file)


def _why_no_file(path: Path) -> str:
    if path.is_dir():
        return f"{short_text(str(path))} is a folder; record its files one by one"
    return f"{short_text(str(path))} does not exist"
