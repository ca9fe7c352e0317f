"""The command `faccel compare RUN RUN`."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import attrs
import click

from faccel.cli.output import json_option, present

if TYPE_CHECKING:
    from faccel.report.comparison import Comparison

_Row = tuple[str, ...]


@click.command()
@click.argument("first", type=click.Path(), metavar="RUN")
@click.argument("second", type=click.Path(), metavar="RUN")
@json_option
def compare(first: str, second: str, *, as_json: bool) -> None:
    """Print what differs between two runs: configuration, speed and curves.

    RUN is the folder of `faccel launch --run-dir RUN`, or one run in it. The second run is compared
    with the first one.
    """
    from faccel.report.comparison import compare as compare_records
    from faccel.report.run_folder import find_run
    from faccel.report.run_record import read_record

    records = [read_record(find_run(run, "faccel compare")) for run in (first, second)]
    # Runs of one name in two run folders have the names that the user has written.
    if records[0].name == records[1].name:
        records = [attrs.evolve(records[0], name=first), attrs.evolve(records[1], name=second)]
    result = compare_records(records[0], records[1])
    if as_json:
        present(_finite(result.document()), (), as_json=True)
        return
    # Here, because it imports torch, which the help of a command needs not.
    from faccel.tracking.progress_text import one_line

    # Names of metrics and settings may have line breaks, and sequences that a terminal executes.
    click.secho(one_line(result.sentence), bold=True)
    for title, rows in _sections(result):
        click.echo()
        rows = [("", *result.names, *_more_columns(title)), *rows]
        _print_table(title, [tuple(map(one_line, row)) for row in rows])
    for name, metrics in zip(result.names, result.only, strict=True):
        # Nothing is printed where both have the same.
        if metrics:
            click.echo(f"\nonly {one_line(name)} has {one_line(', '.join(metrics))}")


def _finite(value: object) -> object:
    """Return a document whose numbers other programs can read: JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_finite, value))
    return value


def _more_columns(title: str) -> _Row:
    if title == "configuration":
        return ("source", "source")
    if title == "speed":
        return ("ratio",)
    return ()


def _sections(result: Comparison) -> list[tuple[str, list[_Row]]]:
    from faccel.report.words import count_text, percent_text

    settings: list[_Row] = [(s.name, *s.values, *s.sources) for s in result.settings]
    # A number, because the names would hide those that differ.
    if result.num_equal:
        settings.append((f"{count_text(result.num_equal, 'setting')} equal", "", "", "", ""))
    speeds: list[_Row] = []
    for measure in result.speeds:
        ratio = ""
        # A run without a number has no ratio.
        if measure.ratio is not None:
            ratio = f"{measure.ratio:.3g}"
        to_text = _speed_format(measure.name)
        texts = (_text(measure.values[0], to_text), _text(measure.values[1], to_text))
        speeds.append((measure.name, *texts, ratio))
    times: list[_Row] = []
    for measure in result.times:
        first, second = measure.values
        times.append((measure.name, _text(first, percent_text), _text(second, percent_text)))
    sections = [("configuration", settings), ("speed", speeds), ("time", times)]
    sections.append(("curves", _curve_rows(result)))
    return [(title, rows) for title, rows in sections if rows]


def _curve_rows(result: Comparison) -> list[_Row]:
    from faccel.report.words import number_text

    rows: list[_Row] = []
    for curve in result.curves:
        pairs: dict[str, Sequence[float | None]] = {"last": curve.last, "lowest": curve.lowest}
        pairs["highest"] = curve.highest
        # One value is all of them.
        if curve.lowest == curve.highest:
            pairs = {"last": curve.last}
        if curve.common_step is not None:
            pairs[f"at step {curve.common_step}"] = curve.at_common_step
        for label, values in pairs.items():
            texts = (_text(values[0], number_text), _text(values[1], number_text))
            rows.append((f"{curve.name}, {label}", *texts))
    return rows


def _speed_format(name: str) -> Callable[[float], str]:
    from faccel.report.words import duration_text, number_text, percent_text
    from faccel.tracking.progress_text import bytes_text

    formats: dict[str, Callable[[float], str]] = {
        "duration_s": duration_text,
        "peak_bytes": bytes_text,
        "mfu": percent_text,
        "data_wait": percent_text,
        "comm_wait": percent_text,
    }
    return formats.get(name, number_text)


def _text(value: float | None, to_text: Callable[[float], str]) -> str:
    if value is None:
        return "-"
    return to_text(value)


def _print_table(title: str, rows: Sequence[_Row]) -> None:
    """Print a table of printable lines; in a pipe with spaces between columns, and no wrapping."""
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        click.echo(title)
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            click.echo(f"  {'  '.join(cells).rstrip()}")
        return
    # Imported late: rich is slow to import, and pipes do not need it.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for header in rows[0]:
        table.add_column(Text(header), overflow="fold")
    for row in rows[1:]:
        # `Text`, not `str`: rich would read square brackets in a name as markup.
        table.add_row(*map(Text, row))
    Console().print(table)
