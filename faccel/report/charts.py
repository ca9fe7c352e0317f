"""Charts as data: paths of SVG in a square of 1000 x 1000, and ticks in percent.

A page stretches the square to its place, so that text and lines keep their sizes on any screen.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from itertools import pairwise, starmap

import attrs
import numpy as np

from faccel.report.words import bytes_text, number_text, percent_text

_SIZE = 1000.0
# Some points per pixel: more would only make the page larger.
_MAX_BUCKETS = 300
_NUM_TICKS = 4
_MAX_VALUE = 1e300
# Above it, the low values of a linear axis would be one line.
_LOG_RATIO = 50.0
_MIN_SMOOTHED = 60


@attrs.frozen
class Line:
    """A line of a chart.

    Args:
        label: Its name.
        path: The commands of SVG.
        smooth_path: The same, smoothed; empty for few points.
        dots: Where it has single points, which a path does not draw.
        num_missing: How many values are NaN or infinite.
        last: The last value as text.
        best: The lowest and the highest value as text.
    """

    label: str
    path: str
    smooth_path: str
    dots: tuple[tuple[float, float], ...]
    num_missing: int
    last: str
    lowest: str
    highest: str


@attrs.frozen
class Tick:
    """A mark of an axis.

    Args:
        percent: Its distance from the left, or from the top.
        label: Its text.
    """

    percent: float
    label: str


@attrs.frozen
class Chart:
    """A chart.

    Args:
        title: What it shows.
        lines: Its lines.
        x_ticks: Marks of the horizontal axis.
        y_ticks: Marks of the vertical axis.
        x_label: What the horizontal axis is.
        is_log: Whether the vertical axis is logarithmic.
        marks: Vertical lines, such as restarts.
    """

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    x_label: str
    is_log: bool
    marks: tuple[Tick, ...] = ()


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


def chart(
    title: str,
    points: Sequence[Points],
    *,
    x_label: str,
    marks: Sequence[tuple[float, str]] = (),
    unit: str = "",
    starts_at_zero: bool = False,
) -> Chart:
    """Return a chart of lines over one axis.

    Effects: pure.

    Args:
        title: What it shows.
        points: One for each line.
        x_label: What the horizontal axis is.
        marks: Where vertical lines are, on the horizontal axis, and their texts.
        unit: "bytes" for ticks such as "2 GiB", "%" for parts between 0 and 1.
        starts_at_zero: Whether the vertical axis begins at 0, as for amounts.

    Examples:
        >>> line = Points("loss", np.array([0.0, 10.0]), np.array([3.0, 1.0]))
        >>> result = chart("loss", [line], x_label="step")
        >>> [(tick.percent, tick.label) for tick in result.y_ticks]
        [(95.65, '1'), (73.91, '1.5'), (52.17, '2'), (30.43, '2.5'), (8.7, '3')]
        >>> result.lines[0].path
        'M0 87L1000 957'
    """
    points = list(map(_limited, points))
    x_low, x_high = _bounds([line.x for line in points])
    y_values = [line.y[np.isfinite(line.y)] for line in points]
    is_log = not starts_at_zero and not unit and _is_log(y_values)
    y_low, y_high = _bounds(y_values)
    if starts_at_zero:
        y_low = min(y_low, 0.0)
    if is_log:
        y_low, y_high = math.log10(y_low), math.log10(y_high)
    # Room above and below, so that a line does not run on the frame.
    pad = (y_high - y_low) * 0.1 or abs(y_high) * 0.1 or 1.0
    bottom = y_low - pad / 2
    if starts_at_zero and not y_low:
        bottom = 0.0
    scale = _Scale(x_low, x_high or 1.0, bottom, y_high + pad, is_log=is_log)
    return Chart(
        title=title,
        lines=tuple(_line(line, scale, unit) for line in points),
        x_ticks=_x_ticks(scale),
        y_ticks=_y_ticks(scale, unit),
        x_label=x_label,
        is_log=is_log,
        marks=tuple(
            Tick(round(scale.x(x) / 10, 2), text) for x, text in marks if x_low <= x <= x_high
        ),
    )


@attrs.frozen
class _Scale:
    """From values to the square."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    is_log: bool = attrs.field(kw_only=True)

    def x(self, value: float) -> float:
        if self.x_high == self.x_low:
            return _SIZE / 2
        return (value - self.x_low) / (self.x_high - self.x_low) * _SIZE

    def y(self, value: float) -> float:
        # Everything but the values is in logarithms already.
        if self.is_log:
            value = math.log10(value)
        return (self.y_high - value) / (self.y_high - self.y_low) * _SIZE


def _limited(points: Points) -> Points:
    """Return points whose values are infinite where differences of them would overflow."""
    return attrs.evolve(points, y=np.where(abs(points.y) < _MAX_VALUE, points.y, np.inf))


def _bounds(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([np.empty(0), *arrays])
    # A chart of no values has axes, too.
    if not len(values):
        return 0.0, 1.0
    return float(values.min()), float(values.max())


def _is_log(arrays: Sequence[np.ndarray]) -> bool:
    """Return whether the values are positive and cover orders of magnitude."""
    low, high = _bounds(arrays)
    return low > 1 / _MAX_VALUE and high / low > _LOG_RATIO


def _line(points: Points, scale: _Scale, unit: str) -> Line:
    is_finite = np.isfinite(points.y)
    finite = points.y[is_finite]
    smooth_path = ""
    if len(finite) >= _MIN_SMOOTHED:
        smooth = points.y.copy()  # with its gaps
        # On a logarithmic axis the mean of the logarithms: peaks would draw the line upwards.
        if scale.is_log:
            smooth[is_finite] = 10 ** _smoothed(np.log10(finite))
        else:
            smooth[is_finite] = _smoothed(finite)
        x, y = _sampled(points.x, smooth)
        smooth_path, _ = _path(x, y, scale)
    # Gaps before the sampling: NaN would be hidden in a bucket.
    x, y = _sampled(points.x, points.y)
    path, dots = _path(x, y, scale)
    last = lowest = highest = "NaN"
    if len(points.y):
        last = value_text(float(points.y[-1]), unit)
    if len(finite):
        lowest, highest = value_text(finite.min(), unit), value_text(finite.max(), unit)
    num_missing = len(points.y) - len(finite)
    return Line(points.label, path, smooth_path, tuple(dots), num_missing, last, lowest, highest)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Return the running mean over a twentieth of the values."""
    half = max(len(values) // 40, 1)
    sums = np.concatenate(([0.0], values.cumsum()))
    index = np.arange(len(values))
    # Equally far to both sides at the start, where curves are steep; at the end a mean over one
    # side only, because a single value there would look like a jump.
    left = np.minimum(index, half)
    right = np.minimum(left, len(values) - 1 - index)
    return (sums[index + right + 1] - sums[index - left]) / (left + right + 1)


def _sampled(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest point of each of some hundred buckets, in order.

    A peak of one step in a million stays visible.
    """
    if len(x) <= 2 * _MAX_BUCKETS:
        return x, y
    edges = np.linspace(0, len(x), _MAX_BUCKETS + 1).astype(int)
    indices: list[int] = []
    for begin, end in pairwise(edges.tolist()):
        bucket = y[begin:end]
        is_finite = np.isfinite(bucket)
        # A bucket of NaN is one gap.
        if not is_finite.any():
            indices.append(begin)
            continue
        low = int(np.where(is_finite, bucket, np.inf).argmin())
        high = int(np.where(is_finite, bucket, -np.inf).argmax())
        # In order of time, or the line would run backwards.
        indices += sorted({begin + low, begin + high})
    return x[indices], y[indices]


def _path(x: np.ndarray, y: np.ndarray, scale: _Scale) -> tuple[str, list[tuple[float, float]]]:
    """Return the commands of a path with gaps, and the points without a neighbour."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x_value, y_value in zip(x.tolist(), y.tolist(), strict=True):
        if math.isfinite(y_value):
            runs[-1].append((round(scale.x(x_value)), round(scale.y(y_value))))
        elif runs[-1]:
            runs.append([])
    commands: list[str] = []
    dots: list[tuple[float, float]] = []
    for run in runs:
        if len(run) == 1:
            dots.append((run[0][0] / 10, run[0][1] / 10))
        if len(run) > 1:
            commands.append("M" + "L".join(starmap("{} {}".format, run)))
    return "".join(commands), dots


def value_text(value: float, unit: str) -> str:
    """Return a value with its unit.

    Effects: pure.
    """
    if unit == "bytes" and math.isfinite(value):
        return bytes_text(value)
    if unit == "%" and math.isfinite(value):
        return percent_text(value)
    return number_text(value)


def _x_ticks(scale: _Scale) -> tuple[Tick, ...]:
    ticks: list[Tick] = []
    for value in nice_values(scale.x_low, scale.x_high):
        ticks += [Tick(round(scale.x(value) / 10, 2), number_text(value))]
    return tuple(ticks)


def _y_ticks(scale: _Scale, unit: str) -> tuple[Tick, ...]:
    values = nice_values(scale.y_low, scale.y_high, base=1024 if unit == "bytes" else 1000)
    # Powers of ten, and not all of them over many orders of magnitude.
    if scale.is_log:
        low, high = math.ceil(scale.y_low), math.floor(scale.y_high)
        step = max(math.ceil((high - low) / _NUM_TICKS), 1)
        values = [10.0**exponent for exponent in range(low, high + 1, step)]
    return tuple(Tick(round(scale.y(value) / 10, 2), value_text(value, unit)) for value in values)


def nice_values(low: float, high: float, *, base: int = 1000) -> list[float]:
    """Return three to six values between two others, with few digits.

    Effects: pure.

    Examples:
        >>> nice_values(0.0, 1234.0), nice_values(-0.1, 0.45)
        ([0.0, 500.0, 1000.0], [0.0, 0.2, 0.4])
        >>> [value / 2**30 for value in nice_values(0.0, 9e9, base=1024)]
        [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    span = high - low
    # One value, or one that is not finite, has one tick.
    if not span > 0 or not math.isfinite(span):
        return [low]
    # Multiples of a unit, so that ticks of bytes are round, too.
    unit = 1.0
    if base == 1024:
        unit = 1024.0 ** max(math.floor(math.log(max(abs(high), 1.0), 1024)), 0)
    rough = span / unit / _NUM_TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    # The smallest of 1, 2, 5 and 10 times a power of 10 that gives few enough ticks.
    factors = (1, 2, 5, 10)
    step = factors[bisect.bisect_left(factors, rough * 0.8 / magnitude)] * magnitude * unit
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    # Multiplied, because repeated addition gives 0.30000000000000004.
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]
