"""What a progress bar shows, as text: count, rate, time left, metrics and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import attrs
import torch

from faccel.errors import printable, short_text
from faccel.tracking.values import plain_value

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@attrs.frozen
class Status:
    """How far an iteration is.

    Args:
        description: Its label, or nothing.
        count: Items that are done, also those before this iteration.
        total: All items, None if unknown.
        unit: Name of an item.
        elapsed_s: Seconds since the iteration began.
        rate: Items per second lately, None if unknown.
        metrics: The text of each metric by name.
        peak_bytes: The most memory that this rank has used on its device, None if unknown.
    """

    description: str
    count: int
    total: int | None
    unit: str
    elapsed_s: float
    rate: float | None
    metrics: Mapping[str, str]
    peak_bytes: int | None

    @property
    def percent(self) -> int | None:
        """The part that is done, rounded down so that 100 is reached at the end only."""
        # An empty iteration has no parts.
        if not self.total:
            return None
        return min(100, 100 * self.count // self.total)


def count_text(status: Status) -> str:
    """Return the count, with the total if it is known.

    Effects: pure.
    """
    if status.total is None:
        return str(status.count)
    return f"{status.count}/{status.total}"


def details(status: Status) -> list[str]:
    """Return rate, time left, metrics and memory, as far as they are known.

    Effects: pure.

    Examples:
        >>> details(Status("", 30, 100, "it", 12.0, 2.5, {"loss": "0.5"}, 3 * 2**29))
        ['2.5 it/s', '0:28 left', 'loss 0.5', '1.5 GiB']
    """
    texts: list[str] = []
    if status.rate:
        texts.append(rate_text(status.rate, status.unit))
        # At the end, and after a total that was too small, no time is left.
        if status.total is not None and status.count < status.total:
            left_s = (status.total - status.count) / status.rate
            texts.append(f"{duration_text(left_s)} left")
    texts += [f"{name} {value}" for name, value in status.metrics.items()]
    if status.peak_bytes is not None:
        texts.append(bytes_text(status.peak_bytes))
    return texts


def line_of(status: Status) -> str:
    """Return the line of a log.

    Effects: pure.

    Examples:
        >>> line_of(Status("train", 3, 10, "it", 1.5, 2.0, {}, None))
        'train: 3/10 in 1.5 s, 2 it/s, 0:04 left'
    """
    prefix = ""
    if status.description:
        prefix = f"{one_line(str(status.description))}: "
    start = f"{prefix}{count_text(status)} in {status.elapsed_s:.1f} s"
    return ", ".join([start, *details(status)])


def rate_text(rate: float, unit: str) -> str:
    """Return items per second, or seconds per item if these are more.

    Effects: pure.

    Examples:
        >>> rate_text(2.5, "it"), rate_text(0.1, "epoch"), rate_text(123456.0, "it")
        ('2.5 it/s', '10 s/epoch', '123456 it/s')
    """
    # Epochs take minutes: 0.002 epochs per second is hard to read.
    if rate >= 1:
        return f"{_number_text(rate)} {unit}/s"
    return f"{_number_text(1 / rate)} s/{unit}"


def _number_text(value: float) -> str:
    # Three digits, and no exponent: `.3g` writes 1.23e+05.
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"


def duration_text(seconds: float) -> str:
    """Return seconds as minutes, hours and days.

    Effects: pure.

    Examples:
        >>> duration_text(7), duration_text(3723), duration_text(200_000)
        ('0:07', '1:02:03', '2 d 7:33:20')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours}:{minutes:02}:{rest_s:02}"
    if hours:
        return f"{hours}:{minutes:02}:{rest_s:02}"
    return f"{minutes}:{rest_s:02}"


def bytes_text(num_bytes: float) -> str:
    """Return bytes in the largest fitting unit.

    Effects: pure.

    Examples:
        >>> bytes_text(512), bytes_text(5 * 2**30)
        ('512 B', '5 GiB')
    """
    size, index = float(num_bytes), 0
    while size >= 1024 and index + 1 < len(_UNITS):
        size, index = size / 1024, index + 1
    return f"{_number_text(size)} {_UNITS[index]}"


def metric_texts(metrics: Mapping[str, object]) -> dict[str, str]:
    """Return each metric as a short text.

    Effects: ambient. Waits for the device of tensors of one element.

    Examples:
        >>> metric_texts({"loss": torch.tensor(0.123456), "epoch": 3, "x": torch.ones(2, 3)})
        {'loss': '0.1235', 'epoch': '3', 'x': 'float32[2, 3]'}
    """
    return {one_line(str(name)): _metric_text(value) for name, value in metrics.items()}


def one_line(text: str) -> str:
    r"""Return a text on one line: a bar is erased by its number of lines.

    Effects: pure.

    Examples:
        >>> one_line("a\nb\x1b[2J")
        'a\\nb\\x1b[2J'
    """
    return printable(text.replace("\n", "\\n").replace("\t", " "))


def _metric_text(value: object) -> str:
    # A metric that has no number, such as a tensor on `meta`, must not end the training.
    try:
        if isinstance(value, bool | int):  # exact, as a count
            return str(value)
        plain = plain_value(value)
    except Exception:
        plain = value
    if isinstance(plain, float):
        return f"{plain:.4g}"
    if isinstance(plain, torch.Tensor):
        return f"{str(plain.dtype).removeprefix('torch.')}{list(plain.shape)}"
    return short_text(plain, 30)
