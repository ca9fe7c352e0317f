"""Charts as SVG, drawn by matplotlib; their colours are variables of the page's style."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

from faccel.errors import ConfigError
from faccel.report.words import number_text, percent_text
from faccel.tracking.progress_text import bytes_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LINES = 6  # the page has as many colours
# Colours that matplotlib draws, and what replaces them: a page is light or dark when it is read.
_LINE_COLOURS = tuple(f"#0000c{index}" for index in range(MAX_LINES))
_TEXT, _GRID, _FRAME, _MARK = "#0000d0", "#0000d1", "#0000d2", "#0000d3"
_VARIABLES: Mapping[str, str] = MappingProxyType(
    {colour: f"var(--c{index})" for index, colour in enumerate(_LINE_COLOURS)}
    | {_TEXT: "var(--soft)", _GRID: "var(--grid)", _FRAME: "var(--line)", _MARK: "var(--bad)"}
)
_STYLE: Mapping[str, object] = MappingProxyType(
    {
        "svg.fonttype": "none",  # text and not outlines: it can be selected, and is small
        "font.size": 8,
        "axes.edgecolor": _FRAME,
        "axes.labelcolor": _TEXT,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.grid": True,
        "axes.ymargin": 0.08,
        "grid.color": _GRID,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "lines.linewidth": 1.5,
    }
)
_SIZE_INCHES = (3.6, 2.2)
_NUM_TICKS = 4
_TICK_STEPS = (1, 2, 5, 10)
_MAX_VALUE = 1e300
# Above it, the low values of a linear axis would be one line.
_LOG_RATIO = 50.0
_MIN_SMOOTHED = 60
_MAX_BUCKETS = 300  # some points per pixel


@attrs.frozen
class Line:
    """What the legend of a chart has about a line.

    Args:
        label: Its name.
        num_missing: How many values are NaN or infinite.
        last: The last value as text.
        lowest: The lowest finite value as text.
        highest: The highest finite value as text.
    """

    label: str
    num_missing: int
    last: str
    lowest: str
    highest: str


@attrs.frozen
class Chart:
    """A chart.

    Args:
        title: What it shows.
        lines: Its lines.
        is_log: Whether the vertical axis is logarithmic.
        svg: The drawing, as an element of HTML without text of the user.
    """

    title: str
    lines: tuple[Line, ...]
    is_log: bool
    svg: str


@attrs.frozen(eq=False)
class Points:
    """What a line of a chart is drawn from.

    Args:
        label: Its name.
        x: `float64[n]`, increasing.
        y: `float64[n]`.
    """

    label: str
    x: np.ndarray
    y: np.ndarray


def require_matplotlib() -> None:
    """Raise if matplotlib is not installed.

    Effects: ambient. Imports it.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError(
            "the charts of a report need matplotlib, which is not installed",
            got=str(error),
            fix='run `pip install "faccel[report]"`',
        ) from error


def chart(
    title: str,
    points: Sequence[Points],
    *,
    x_label: str,
    marks: Sequence[float] = (),
    unit: str = "",
    starts_at_zero: bool = False,
) -> Chart:
    """Return a chart of at most `MAX_LINES` lines over one axis.

    Effects: ambient. Imports matplotlib, but not pyplot, whose state is global.

    Args:
        title: What it shows.
        points: One for each line.
        x_label: What the horizontal axis is.
        marks: Where vertical lines are on the horizontal axis, as for restarts.
        unit: "bytes" for ticks such as "2 GiB", "%" for parts between 0 and 1.
        starts_at_zero: Whether the vertical axis begins at 0, as for amounts.

    Examples:
        >>> line = Points("loss", np.array([0.0, 10.0, 20.0]), np.array([3.0, 1.0, math.nan]))
        >>> result = chart("loss", [line], x_label="step")
        >>> result.lines
        (Line(label='loss', num_missing=1, last='NaN', lowest='1', highest='3'),)
        >>> result.svg[:4], "var(--c0)" in result.svg
        ('<svg', True)
    """
    import matplotlib
    from matplotlib.figure import Figure

    is_log = not starts_at_zero and not unit and _is_log(points)
    # The configuration of the user's matplotlib must not change the page.
    style: dict[Any, Any] = {**matplotlib.rcParamsDefault, **_STYLE, "svg.hashsalt": title}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.add_subplot()
        for colour, line in zip(_LINE_COLOURS, points, strict=False):
            _draw(axes, line, colour, is_log=is_log)
        for x in marks:
            axes.axvline(x, color=_MARK, linestyle="--", linewidth=1)
        _format_axes(axes, points, unit, is_log=is_log, starts_at_zero=starts_at_zero)
        axes.set_xlabel(x_label)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    lines = tuple(_legend_line(line, unit) for line in points)
    return Chart(title, lines, is_log, _inlined(file.getvalue()))


def _is_log(points: Sequence[Points]) -> bool:
    """Return whether the values are positive and cover orders of magnitude."""
    values = np.concatenate([finite_or_nan(line.y) for line in points])
    values = values[np.isfinite(values)]
    if not len(values):
        return False
    low, high = float(values.min()), float(values.max())
    return low > 1 / _MAX_VALUE and high / low > _LOG_RATIO


def _draw(axes: Axes, points: Points, colour: str, *, is_log: bool) -> None:
    x, y = sampled(points.x, finite_or_nan(points.y))
    if np.isfinite(points.y).sum() < _MIN_SMOOTHED:
        axes.plot(x, y, color=colour)
        # A point without a neighbour is not a line.
        has_gap = np.concatenate(([True], np.isnan(y), [True]))
        is_alone = has_gap[:-2] & has_gap[2:]
        axes.plot(x[is_alone], y[is_alone], ".", color=colour)
        return
    axes.plot(x, y, color=colour, alpha=0.28, linewidth=0.8)
    axes.plot(*sampled(points.x, smoothed(points.y, is_log=is_log)), color=colour)


def finite_or_nan(values: np.ndarray) -> np.ndarray:
    """Return values that can be drawn: NaN is a gap, and differences of huge values overflow.

    Effects: pure.
    """
    return np.where(abs(values) < _MAX_VALUE, values, math.nan)


def smoothed(values: np.ndarray, *, is_log: bool) -> np.ndarray:
    """Return the running mean over a twentieth of the values, with their gaps.

    Effects: pure.

    Args:
        values: `float64[n]`.
        is_log: Whether to return the mean of the logarithms, as for a logarithmic axis, on which
            peaks would draw the line upwards.
    """
    result = finite_or_nan(values)
    is_drawn = np.isfinite(result)
    if is_log:
        result[is_drawn] = 10 ** _running_mean(np.log10(result[is_drawn]))
    else:
        result[is_drawn] = _running_mean(result[is_drawn])
    return result


def _running_mean(values: np.ndarray) -> np.ndarray:
    half = max(len(values) // 40, 1)
    sums = np.concatenate(([0.0], values.cumsum()))
    index = np.arange(len(values))
    # Equally far to both sides at the start, where curves are steep; at the end a mean over one
    # side only, because a single value there would look like a jump.
    left = np.minimum(index, half)
    right = np.minimum(left, len(values) - 1 - index)
    return (sums[index + right + 1] - sums[index - left]) / (left + right + 1)


def sampled(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest point of each of some hundred buckets, in order.

    Effects: pure.

    A peak of one step in a million stays visible, and the page stays small.
    """
    if len(x) <= 2 * _MAX_BUCKETS:
        return x, y
    indices: list[int] = []
    for bucket in np.array_split(np.arange(len(x)), _MAX_BUCKETS):
        # A bucket of NaN is one gap.
        if np.isnan(y[bucket]).all():
            indices.append(int(bucket[0]))
            continue
        low, high = np.nanargmin(y[bucket]), np.nanargmax(y[bucket])
        # In order of time, or the line would run backwards.
        indices += sorted({int(bucket[low]), int(bucket[high])})
    return x[indices], y[indices]


def _format_axes(
    axes: Axes, points: Sequence[Points], unit: str, *, is_log: bool, starts_at_zero: bool
) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator, NullFormatter

    axes.margins(x=0)
    axes.xaxis.set_major_locator(MaxNLocator(_NUM_TICKS, steps=_TICK_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_text(value)))
    if starts_at_zero:
        highest = max(float(np.nanmax(finite_or_nan(line.y), initial=0.0)) for line in points)
        axes.set_ylim(bottom=0, top=1.1 * highest or 1.0)
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(_NUM_TICKS, steps=_TICK_STEPS))
    if unit == "bytes":
        # Powers of two: 1.5 GiB is rounder than 1.6e9 bytes.
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(MultipleLocator(2.0 ** round(math.log2((high - low) / 4))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: value_text(value, unit)))


def _inlined(svg: str) -> str:
    """Return the SVG element for a page: with the colours and the fonts of its style."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    # HTML needs no namespaces, and the groups of all charts have the same ids.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'font-family: [^;"]*;? ?', "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg


def _legend_line(points: Points, unit: str) -> Line:
    finite = points.y[np.isfinite(points.y)]
    last = lowest = highest = "NaN"
    if len(points.y):
        last = value_text(float(points.y[-1]), unit)
    if len(finite):
        lowest = value_text(float(finite.min()), unit)
        highest = value_text(float(finite.max()), unit)
    return Line(points.label, len(points.y) - len(finite), last, lowest, highest)


def value_text(value: float, unit: str) -> str:
    """Return a value with its unit.

    Effects: pure.

    Examples:
        >>> value_text(2.0**31, "bytes"), value_text(0.5, "%"), value_text(0.5, "")
        ('2 GiB', '50 %', '0.5')
    """
    if unit == "bytes" and math.isfinite(value):
        return bytes_text(value)
    if unit == "%" and math.isfinite(value):
        return percent_text(value)
    return number_text(value)
