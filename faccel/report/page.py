"""The page of `faccel report`: what a run has, as values for the template."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import numpy as np

from faccel.report.charts import MAX_LINES, Chart, Points, chart
from faccel.report.findings import CATEGORIES, finding, shares
from faccel.report.metric_files import Series
from faccel.report.run_record import RunRecord, Warnings
from faccel.report.run_times import column
from faccel.report.words import (
    count_text,
    duration_text,
    number_text,
    percent_text,
)
from faccel.tracking.goodput_categories import Goodput
from faccel.tracking.progress_text import bytes_text

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_CODE = re.compile("`([^`]+)`")
_MAX_CHARTS = 60
_MAX_RANKS = 64
_MAX_ROWS = 100
_RATE_TITLES: Mapping[str, tuple[str, str]] = {
    "samples_s": ("samples per second", ""),
    "tokens_s": ("tokens per second", ""),
    "steps_s": ("steps per second", ""),
    "mfu": ("model FLOPs utilization", "%"),
    "data_wait": ("wait for data, part of the time", "%"),
    "comm_wait": ("wait for other ranks, part of the time", "%"),
}
_SPEEDS = {"steps_s": "steps/s", "samples_s": "samples/s", "tokens_s": "tokens/s"}
_TIMES = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


@attrs.frozen
class Tile:
    """A number at the top of the page."""

    label: str
    value: str


@attrs.frozen
class Bar:
    """A bar of the time of a rank.

    Args:
        label: Whose time.
        total: It as text.
        segments: Category, percent, and text of each.
    """

    label: str
    total: str
    segments: tuple[tuple[str, float, str], ...]


def page(record: RunRecord) -> str:
    """Return the page as HTML, with all that it needs inside of it.

    Effects: ambient. Reads the template and the clock. Imports jinja2, which PyTorch requires.
    """
    # Only this command needs it.
    from jinja2 import Environment, StrictUndefined

    # Names and values come from the user's script: each is text and not HTML.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["code"] = _with_code
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page_values(record))


def _with_code(text: str) -> Markup:
    """Return a sentence as HTML, with its names in backticks as code."""
    from markupsafe import Markup, escape

    # Escaped before: a name may have tags in it.
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))


def page_values(record: RunRecord) -> dict[str, object]:
    """Return the values of the template.

    Effects: ambient. Reads the clock and the zone of its time.
    """
    rates = list(record.rates)
    metrics, logged_rates = _split(record.metrics.series, has_rates=bool(rates))
    curves, num_hidden = _curves([series for series in metrics.values() if len(series.steps) > 1])
    changed, defaults = _fields(record.fields)
    return {
        "record": record,
        "finding": finding(record),
        "facts": _facts(record),
        "tiles": _tiles(record),
        "categories": _present(record.times),
        "bars": _bars(record.times),
        "num_hidden_ranks": max(len(record.times) - _MAX_RANKS, 0),
        "curves": curves,
        "num_hidden_curves": num_hidden,
        "values": _single_values(metrics, record.metrics.texts)[:_MAX_ROWS],
        "throughput": _throughput_charts(record) + _logged_charts(logged_rates),
        "memory": _memory_charts(record),
        "memory_rows": _memory_rows(rates),
        "checkpoints": _checkpoint_rows(record),
        "restarts": list(map(_clock_text, record.restarts_s)),
        "goodput": record.times.get(min(record.times, default=0)),
        "warnings": list(map(_warning_row, record.warnings)),
        "changed": changed,
        "defaults": defaults,
        "written": _clock_text(time.time()),
        "duration_text": duration_text,
        "count_text": count_text,
    }


def _clock_text(time_s: float) -> str:
    # A file of another program may have any number.
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
    except (OverflowError, ValueError, OSError):
        return "?"


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """Return the facts in the head of the page, as names and values."""
    facts: list[tuple[str, str]] = []
    if record.began_s:
        facts.append(("started", _clock_text(record.began_s)))
    if record.world_size:
        facts.append(("ranks", str(record.world_size)))
    if "device" in record.facts:
        facts.append(("device", str(record.facts["device"])))
    versions = record.facts.get("versions")
    if isinstance(versions, dict):
        for name, version in versions.items():
            facts.append((str(name), str(version)))
    command = record.facts.get("command")
    # Without the interpreter, whose path explains nothing.
    if isinstance(command, list):
        facts.append(("command", " ".join(map(str, command))))
    return facts


def _tiles(record: RunRecord) -> list[Tile]:
    tiles = [Tile("duration", duration_text(record.duration_s))]
    values = shares(record.times)
    if values:
        tiles.append(Tile("training", percent_text(values["useful_s"])))
    if record.last_step is not None:
        tiles.append(Tile("steps", f"{record.last_step:,}"))
    for name, label in (
        ("steps_s", "steps/s"),
        ("samples_s", "samples/s"),
        ("tokens_s", "tokens/s"),
    ):
        values = _column(record.rates, name)
        # Tokens of a loop that counts none are 0.
        if len(values) and values.max() > 0:
            tiles.append(Tile(f"{label}, median", number_text(float(np.median(values)))))
    mfu = _column(record.rates, "mfu")
    if len(mfu):
        tiles.append(Tile("MFU, median", percent_text(float(np.median(mfu)))))
    peak = _column(record.rates, "peak_bytes")
    if len(peak):
        tiles.append(Tile("peak memory", bytes_text(float(peak.max()))))
    if record.restarts_s:
        tiles.append(Tile("restarts", str(len(record.restarts_s))))
    return tiles


def _column(rates: Sequence[Mapping[str, float]], name: str) -> np.ndarray:
    return np.array(column(rates, name), dtype=np.float64)


def _present(times: Mapping[int, Goodput]) -> list[tuple[str, str, str]]:
    """Return key, name and part of each category that some rank has spent time in."""
    rows: list[tuple[str, str, str]] = []
    for category, share in shares(times).items():
        if share > 0:
            rows.append((category, CATEGORIES[category], percent_text(share)))
    return rows


def _bars(times: Mapping[int, Goodput]) -> list[Bar]:
    """Return one bar per rank, all on the scale of the longest one."""
    longest_s = max(map(attrgetter("wall_s"), times.values()), default=0.0)
    bars: list[Bar] = []
    # The first ranks stand for thousands: the sentence names the one that differs.
    for rank, result in list(times.items())[:_MAX_RANKS]:
        segments: list[tuple[str, float, str]] = []
        for category, name in CATEGORIES.items():
            seconds = getattr(result, category)
            if seconds > 0 and result.wall_s > 0:
                share = percent_text(seconds / result.wall_s)
                text = f"{name}: {duration_text(seconds)} ({share})"
                segments.append((category, round(100 * seconds / longest_s, 3), text))
        bars.append(Bar(f"rank {rank}", duration_text(result.wall_s), tuple(segments)))
    return bars


def _is_rate(name: str) -> bool:
    return name in _RATE_TITLES or name == "peak_bytes"


def _split(
    series: Mapping[str, Series], *, has_rates: bool
) -> tuple[dict[str, Series], dict[str, Series]]:
    """Return the curves, and the logged results of `rates`; the latter without their own file."""
    curves: dict[str, Series] = {}
    logged: dict[str, Series] = {}
    for name, values in sorted(series.items()):
        if not _is_rate(name):
            curves[name] = values
        elif not has_rates:
            logged[name] = values
    return curves, logged


def _single_values(
    series: Mapping[str, Series], texts: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """Return name, value and step of metrics with one value, such as a final one, and of texts."""
    rows: list[tuple[str, str, str]] = []
    for name, values in series.items():
        if len(values.steps) == 1:
            rows.append((name, number_text(values.last), f"{values.steps[0]:,.0f}"))
    for name, text in sorted(texts.items()):
        rows.append((name, text, ""))
    return rows


def _curves(series: Sequence[Series]) -> tuple[list[Chart], int]:
    """Return a chart for each metric, and how many were left out.

    Metrics such as `train/loss` and `val/loss` have one chart.
    """
    groups: dict[str, list[Series]] = {}
    for values in series:
        groups.setdefault(values.name.rpartition("/")[2] or values.name, []).append(values)
    parts: list[tuple[str, list[Series]]] = []
    for title, members in groups.items():
        # As many lines as colours.
        for begin in range(0, len(members), MAX_LINES):
            some = members[begin : begin + MAX_LINES]
            name = title
            if len(some) == 1:
                name = some[0].name
            parts.append((name, some))
    # The loss is what people look at first.
    parts.sort(key=lambda part: "loss" not in part[0].lower())
    charts: list[Chart] = []
    # A chart takes 50 ms: of thousands only those of the page are drawn.
    for title, members in parts[:_MAX_CHARTS]:
        points = [Points(values.name, values.steps, values.values) for values in members]
        charts.append(chart(title, points, x_label="step"))
    return charts, len(parts) - len(charts)


def _logged_charts(series: Mapping[str, Series]) -> list[Chart]:
    charts: list[Chart] = []
    for name, values in series.items():
        title, unit = _RATE_TITLES.get(name, (name, "bytes"))
        points = [Points(name, values.steps, values.values)]
        charts.append(chart(title, points, x_label="step", unit=unit, starts_at_zero=True))
    return charts


def _throughput_charts(record: RunRecord) -> list[Chart]:
    charts: list[Chart] = []
    for name, (title, unit) in _RATE_TITLES.items():
        charts += _rate_chart(record, title, [name], unit)
    return charts


def _memory_charts(record: RunRecord) -> list[Chart]:
    names = _memory_names(record.rates)
    title = "peak of the largest rank"
    if len(names) > 1:
        title += ", by category"
    return _rate_chart(record, title, names, "bytes")


def _rate_chart(record: RunRecord, title: str, names: Sequence[str], unit: str) -> list[Chart]:
    """Return a chart of results of `rates` over the time of the run; none without values."""
    scale_s, x_label = _time_scale(record.duration_s)
    marks = [(restart_s - record.began_s) / scale_s for restart_s in record.restarts_s]
    points = _rate_points(record, names, scale_s)
    if not points:
        return []
    return [chart(title, points, x_label=x_label, marks=marks, unit=unit, starts_at_zero=True)]


def _rate_points(record: RunRecord, names: Sequence[str], scale_s: float) -> list[Points]:
    points: list[Points] = []
    for name in names:
        rows = [row for row in record.rates if name in row]
        y = _column(rows, name)
        # A loop that counts no tokens has none.
        if not len(rows) or not np.any(y):
            continue
        x = (_column(rows, "time") - record.began_s) / scale_s
        # The clock of a node may be set back.
        order = np.argsort(x, kind="stable")
        points.append(Points(_label(name), x[order], y[order]))
    return points


def _time_scale(duration_s: float) -> tuple[float, str]:
    for scale_s, label in _TIMES:
        if duration_s >= 2 * scale_s:
            return scale_s, label
    return 1.0, "seconds"


def _memory_names(rates: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the names of amounts of memory, the peak first, then its categories."""
    names = {name for row in rates for name in row if name.startswith("memory_")}
    # The peak of the same rank is among the categories, if it is known.
    names = {"peak_bytes", *names} - {"memory_peak"}
    return sorted(names, key=lambda name: (name != "peak_bytes", name))[:MAX_LINES]


def _label(name: str) -> str:
    return name.removesuffix("_bytes").removeprefix("memory_")


def _memory_rows(rates: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    names = _memory_names(rates)
    if len(names) == 1:  # the tile has it
        return rows
    for name in names:
        text = bytes_text(float(_column(rates, name).max()))
        rows.append((_label(name), text))
    return rows


def _checkpoint_rows(record: RunRecord) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    for checkpoint in record.checkpoints[-_MAX_ROWS:]:
        after = duration_text(checkpoint.time_s - record.began_s)
        wait = duration_text(checkpoint.wait_s)
        rows.append((checkpoint.event, f"{checkpoint.step:,}", after, wait))
    return rows


def _warning_row(entry: Warnings) -> Mapping[str, str]:
    ranks = ", ".join(map(str, sorted(entry.ranks)))
    step = first = ""
    if entry.step is not None:
        step = f"{entry.step:,}"
    if entry.first_s:
        first = _clock_text(entry.first_s)
    return {
        "level": entry.level.lower(),
        "message": entry.message,
        "count": f"{entry.count:,}",
        "ranks": ranks,
        "step": step,
        "first": first,
    }


def _fields(
    fields: Mapping[str, tuple[str, str]],
) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str]]]:
    """Return the fields that something has set, and those with their default."""
    changed: list[tuple[str, str, str]] = []
    defaults: list[tuple[str, str, str]] = []
    for name, (value, source) in fields.items():
        rows = changed
        if source == "default":
            rows = defaults
        rows.append((name, value, source))
    return changed, defaults
