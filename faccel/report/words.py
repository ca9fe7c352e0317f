"""Numbers as people read them: durations, bytes, rates, and values of metrics."""

from __future__ import annotations

import math

_UNITS = ("", "k", "M", "G", "T", "P")


def duration_text(seconds: float) -> str:
    """Return a duration with its two largest units.

    Effects: pure.

    Examples:
        >>> [duration_text(s) for s in (0.0042, 2.5, 59.96, 723, 7500, 200000)]
        ['4 ms', '2.5 s', '1 min 0 s', '12 min 3 s', '2 h 5 min', '2 d 7 h']
    """
    if not math.isfinite(seconds):
        return "?"
    if seconds < 0.1:
        return f"{max(seconds, 0.0) * 1000:.0f} ms"
    # Rounded first: 59.96 s is a minute, and not 60.0 s.
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def number_text(value: float) -> str:
    """Return a number with four digits.

    Effects: pure.

    Examples:
        >>> [number_text(v) for v in (0.0, 3, 0.123456, 1234.5, 12345, 2.5e7, 3e-5, float("nan"))]
        ['0', '3', '0.1235', '1234', '12.3k', '25M', '3e-05', 'NaN']
    """
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    # Letters instead of exponents: people read 12.3k faster than 1.23e+04.
    magnitude = abs(value)
    if magnitude >= 1e4:
        return _large_text(value)
    if magnitude >= 1000:
        return f"{value:.0f}"
    return f"{value:.4g}"


def _large_text(value: float) -> str:
    exponent = min(int(math.log10(abs(value)) // 3), len(_UNITS) - 1)
    scaled = value / 1000**exponent
    if abs(scaled) >= 1e4:  # beyond the largest unit
        return f"{value:.3g}"
    return f"{scaled:.3g}{_UNITS[exponent]}"


def percent_text(fraction: float) -> str:
    """Return a part as a percentage; a part that is not zero is not printed as 0 %.

    Effects: pure.

    Examples:
        >>> percent_text(0.843), percent_text(0.004), percent_text(0.0), percent_text(0.996)
        ('84 %', '<1 %', '0 %', '99.6 %')
    """
    if 0 < fraction < 0.005:
        return "<1 %"
    # "100 %" would deny the rest.
    if 0.995 <= fraction < 1:
        return f"{math.floor(fraction * 1000) / 10:.1f} %"
    return f"{fraction * 100:.0f} %"


def count_text(count: int, noun: str) -> str:
    """Return a count with its noun.

    Effects: pure.

    Examples:
        >>> count_text(1, "restart"), count_text(2, "restart"), count_text(12345, "step")
        ('1 restart', '2 restarts', '12,345 steps')
    """
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}s"
