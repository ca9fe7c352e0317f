"""Schedules: functions of the number of updates that are done, for a host that knows it, and for tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from faccel.errors import ConfigError


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, yes, no)
    return yes if condition else no


def _clamped(x: Any) -> Any:
    return x.clamp(0.0, 1.0) if isinstance(x, torch.Tensor) else min(max(x, 0.0), 1.0)


def linear(start: float, end: float, num_updates: int) -> Callable[[Any], Any]:
    """Return a schedule from `start` to `end` in `num_updates` updates, `end` from then on.

    Effects: pure.

    Examples:
        >>> from faccel.func import linear
        >>> [linear(0.0, 1.0, 4)(count) for count in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    _check(num_updates)
    return lambda count: start + (end - start) * _clamped(count / num_updates)


def cosine(
    num_updates: int, *, warmup: int = 0, start: float = 1.0, end: float = 0.0
) -> Callable[[Any], Any]:
    """Return a schedule that falls from `start` to `end` along half a cosine, behind a linear rise from 0.

    Loshchilov and Hutter, 2017 (arXiv:1608.03983), without restarts. With `warmup` update `n` of it has
    `start * (n + 1) / warmup`, so that the first one is not lost.

    Effects: pure.

    Args:
        num_updates: Until `end` is reached, the warm-up included.
        warmup: Updates of the linear rise.
        start: The highest value.
        end: The last one.

    Examples:
        >>> from faccel.func import cosine
        >>> [round(cosine(10, warmup=2)(count), 3) for count in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    _check(num_updates - warmup)

    def schedule(count: Any) -> Any:
        x = _clamped((count - warmup) / (num_updates - warmup)) * math.pi
        falling = (
            end
            + (start - end)
            * (1 + (torch.cos(x) if isinstance(x, torch.Tensor) else math.cos(x)))
            / 2
        )
        return _where(count < warmup, start * (count + 1) / max(warmup, 1), falling)

    return schedule


def exponential(rate: float, num_updates: int = 1) -> Callable[[Any], Any]:
    """Return a schedule that is multiplied by `rate` every `num_updates` updates, smoothly.

    Effects: pure.

    Examples:
        >>> from faccel.func import exponential
        >>> [exponential(0.5, 2)(count) for count in (0, 2, 4)]
        [1.0, 0.5, 0.25]
    """
    _check(num_updates)
    return lambda count: rate ** (count / num_updates)


def join_schedules(
    schedules: Sequence[Callable[[Any], Any]], boundaries: Sequence[int]
) -> Callable[[Any], Any]:
    """Return one schedule after the other; each counts from where it begins.

    Effects: pure.

    Args:
        schedules: One more than boundaries.
        boundaries: The update at which each but the first begins, rising.

    Examples:
        >>> from faccel.func import join_schedules, linear
        >>> both = join_schedules([linear(0.0, 1.0, 10), lambda count: 0.5], [10])
        >>> both(5), both(10)
        (0.5, 0.5)
    """
    if len(schedules) != len(boundaries) + 1 or sorted(set(boundaries)) != list(boundaries):
        raise ConfigError(
            "schedules are joined at rising boundaries, one fewer than schedules",
            got=f"{len(schedules)} schedules, boundaries {list(boundaries)}",
            fix="write `join([first, second], [1000])`",
        )

    def schedule(count: Any) -> Any:
        value = schedules[0](count)
        for each, begin in zip(schedules[1:], boundaries, strict=True):
            value = _where(count >= begin, each(count - begin), value)
        return value

    return schedule


def _check(num_updates: int) -> None:
    if num_updates < 1:
        raise ConfigError(
            "a schedule takes at least one update", got=str(num_updates), fix="use 1 or more"
        )
