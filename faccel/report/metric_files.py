"""Reads the metrics of a run from the files of its trackers."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import attrs
import numpy as np

from faccel.checks import is_finite

_FLOATS = (1, 2)  # of TensorFlow's numbers of dtypes
_RESERVED = ("step", "time")


@attrs.frozen(eq=False)
class Series:
    """The values of one metric, by step.

    Args:
        name: Its name.
        steps: `float64[n]`, increasing.
        values: `float64[n]`; NaN and infinities are values, too.
    """

    name: str
    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        """The value of the last step."""
        return float(self.values[-1])

    def finite(self) -> np.ndarray:
        """Return the values that are neither NaN nor infinite."""
        return self.values[np.isfinite(self.values)]


@attrs.frozen(eq=False)
class Metrics:
    """The metrics of a run.

    Args:
        series: Numbers, by name.
        texts: The last text of each name that is text.
        notes: What could not be read, as sentences.
    """

    series: Mapping[str, Series]
    texts: Mapping[str, str]
    notes: tuple[str, ...] = ()


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether a value of JSON is a number of a curve: also NaN and infinity, but no bool.

    Effects: pure.
    """
    return isinstance(value, float) or is_finite(value)


class _Table:
    """Collects values: of a step that is logged twice, as after a resume, the last one."""

    def __init__(self) -> None:
        self.values: dict[str, dict[float, float]] = {}
        self.texts: dict[str, str] = {}

    def add(self, name: str, step: float, value: object) -> None:
        """Add a value; one that is neither a number nor text is left out."""
        if isinstance(value, str):
            self.texts[name] = value
            return
        if is_number(value):
            self.values.setdefault(name, {})[step] = float(value)

    def metrics(self, notes: tuple[str, ...]) -> Metrics:
        """Return what was collected."""
        series: dict[str, Series] = {}
        for name, values in self.values.items():
            steps = np.array(list(values), dtype=np.float64)
            order = np.argsort(steps)
            numbers = np.array(list(values.values()), dtype=np.float64)
            series[name] = Series(name, steps[order], numbers[order])
        return Metrics(series, self.texts, notes)


def read_metrics(folder: Path | None) -> Metrics:
    """Return the metrics in the folder of a run.

    Effects: ambient. Reads files, also those of a run that still trains. Lines that a kill has cut,
    or that another program has written, are left out.

    Args:
        folder: The folder; None has no metrics.
    """
    table = _Table()
    if folder is None:
        return table.metrics(())
    # TensorBoard rounds to 32 bits and is slow to import, so the others are read first.
    if (folder / "metrics.jsonl").is_file():
        _read_json_lines(folder / "metrics.jsonl", table)
    if (folder / "metrics.csv").is_file():
        _read_csv(folder / "metrics.csv", table)
    notes: tuple[str, ...] = ()
    paths = sorted(folder.glob("events.out.tfevents*"))
    if paths and not table.values:
        notes = _read_events(paths, table)
    return table.metrics(notes)


def json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines, without lines that are anything else.

    Effects: ambient. Reads the file.
    """
    try:
        file = path.open("rb")
    except OSError:  # deleted meanwhile, or of another user
        return
    with file:
        for line in file:
            # Bytes may be anything, also invalid UTF-8, which is a ValueError, too.
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(values, dict):
                yield values


def _read_json_lines(path: Path, table: _Table) -> None:
    for values in json_objects(path):
        add_json_line(values, table)


class Adds(Protocol):
    """Where values are collected."""

    def add(self, name: str, step: float, value: object) -> None: ...


def add_json_line(values: Mapping[str, Any], table: Adds) -> None:
    """Add the values of a line of `metrics.jsonl`.

    Effects: ambient. Changes the table.
    """
    step = values.get("step")
    if not is_finite(step):
        return
    for name, value in values.items():
        if name not in _RESERVED:
            table.add(name, step, value)


def _read_csv(path: Path, table: _Table) -> None:
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for line in file:
                add_csv_line(line, table)
    except OSError:  # deleted meanwhile, or of another user
        return


def add_csv_line(line: str, table: Adds) -> None:
    """Add the value of a line of `metrics.csv`.

    Effects: ambient. Changes the table.
    """
    # Line by line: a quote that a kill has cut would take all lines after it into one cell.
    try:
        rows = list(csv.reader([line]))
    except csv.Error:
        return
    # A cut line and the next one are one line of more cells.
    if len(rows) != 1 or len(rows[0]) != 3:
        return
    step_text, name, text = rows[0]
    try:
        step = float(step_text)
    except ValueError:  # the header
        return
    if not is_finite(step):  # a line of another program
        return
    try:
        value: float | str = float(text)
    except ValueError:
        value = text
    table.add(name, step, value)


def _read_events(paths: list[Path], table: _Table) -> tuple[str, ...]:
    """Read event files of TensorBoard; return why that was impossible."""
    for path in paths:
        loader = open_events(path)
        if loader is None:
            return (
                "the metrics are in event files of TensorBoard, which is not installed here; "
                'to show them, run `pip install "faccel[track]"`',
            )
        add_events(loader, table)
    return ()


def open_events(path: Path) -> Any:
    """Return a reader of an event file for `add_events`, None if TensorBoard is not installed.

    Effects: ambient. Imports TensorBoard.
    """
    try:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    except ImportError:
        return None
    return LegacyEventFileLoader(str(path))


def add_events(loader: Any, table: Adds) -> None:
    """Add the scalars of an event file, from where the last call has ended.

    Effects: ambient. Reads the file, changes the table.
    """
    from tensorboard.util.tensor_util import make_ndarray

    for event in loader.Load():
        for value in event.summary.value:
            number: object = None
            if value.HasField("simple_value"):
                number = value.simple_value
            # The newer form of a scalar; images and texts are tensors of other types.
            if value.HasField("tensor") and value.tensor.dtype in _FLOATS:
                array = make_ndarray(value.tensor)
                if array.size == 1:
                    number = float(array.reshape(()))
            table.add(value.tag, event.step, number)
