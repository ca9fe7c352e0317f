"""Schedules: functions of the number of completed updates that return a factor or a rate.

A schedule takes an int and returns a float. Under a PyTorch transform it takes and returns a
float64 0-d tensor, because the number of updates is not known while tracing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from faccel.checks import positive
from faccel.errors import ConfigError
from faccel.tree import Tree

Schedule = Callable[[Tree], Tree]
"""`schedule(count) -> value`: int -> float, or float64[] -> float64[] under a transform."""


def _where(condition: Tree, if_true: Tree, if_false: Tree) -> Tree:
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, if_true, if_false)
    return if_true if condition else if_false


def _clamp(x: Tree) -> Tree:
    """Return `x` limited to [0, 1]."""
    if isinstance(x, torch.Tensor):
        return x.clamp(0.0, 1.0)
    return min(max(x, 0.0), 1.0)


def _cos(x: Tree) -> Tree:
    if isinstance(x, torch.Tensor):
        return torch.cos(x)
    return math.cos(x)


def linear(start: float, end: float, num_updates: int) -> Schedule:
    """Return a schedule from `start` to `end` in `num_updates` updates, `end` from then on.

    Effects: pure.

    Args:
        start: Value at the first update.
        end: Value after `num_updates` updates.
        num_updates: At least 1.

    Raises:
        ConfigError: `num_updates` is not positive.

    Examples:
        >>> from faccel.func import linear
        >>> [linear(0.0, 1.0, 4)(count) for count in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    positive("num_updates", num_updates)
    return lambda count: start + (end - start) * _clamp(count / num_updates)


def cosine(num_updates: int, *, warmup: int = 0, start: float = 1.0, end: float = 0.0) -> Schedule:
    """Return a schedule from `start` to `end` along half a cosine, after a linear warm-up from 0.

    Loshchilov and Hutter, 2017 (arXiv:1608.03983), without restarts.

    Effects: pure.

    Args:
        num_updates: Updates until `end` is reached, the warm-up included.
        warmup: Updates of the warm-up. Update `n` has the value `start * (n + 1) / warmup`, so
            that the first update has a rate above 0.
        start: The highest value.
        end: The last value.

    Raises:
        ConfigError: `warmup` is not below `num_updates`.

    Examples:
        >>> from faccel.func import cosine
        >>> [round(cosine(10, warmup=2)(count), 3) for count in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    num_decay = num_updates - warmup
    if num_decay < 1:
        raise ConfigError(
            "`num_updates` must be larger than `warmup`",
            got=f"num_updates={num_updates}, warmup={warmup}",
            fix=f"use `num_updates={warmup + 1}` or more",
        )

    def schedule(count: Tree) -> Tree:
        # end + (start - end) * (1 + cos(pi * progress)) / 2
        progress = _clamp((count - warmup) / num_decay)
        decayed = end + (start - end) * (1 + _cos(progress * math.pi)) / 2
        # max(): without a warm-up this branch is not selected, but is still computed.
        rising = start * (count + 1) / max(warmup, 1)
        return _where(count < warmup, rising, decayed)

    return schedule


def exponential(rate: float, num_updates: int = 1) -> Schedule:
    """Return a schedule that is multiplied by `rate` every `num_updates` updates, smoothly.

    Effects: pure.

    Args:
        rate: Factor, such as 0.5.
        num_updates: At least 1.

    Raises:
        ConfigError: `num_updates` is not positive.

    Examples:
        >>> from faccel.func import exponential
        >>> [exponential(0.5, 2)(count) for count in (0, 2, 4)]
        [1.0, 0.5, 0.25]
    """
    positive("num_updates", num_updates)
    return lambda count: rate ** (count / num_updates)


def join_schedules(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """Return one schedule after the other; each counts updates from its own start.

    Effects: pure.

    Args:
        schedules: Schedules in order, one more than boundaries.
        boundaries: The update at which each schedule but the first starts, increasing.

    Raises:
        ConfigError: The boundaries do not increase, or their number does not fit.

    Examples:
        >>> from faccel.func import join_schedules, linear
        >>> joined = join_schedules([linear(0.0, 1.0, 10), lambda count: 0.5], [10])
        >>> joined(5), joined(10)
        (0.5, 0.5)
    """
    # sorted(set()) also rejects equal boundaries: a schedule of 0 updates.
    if len(schedules) != len(boundaries) + 1 or sorted(set(boundaries)) != list(boundaries):
        raise ConfigError(
            "`boundaries` must increase, and there must be one fewer than `schedules`",
            got=f"{len(schedules)} schedules, boundaries {list(boundaries)}",
            fix="write `join_schedules([first, second], [1000])`",
        )

    def schedule(count: Tree) -> Tree:
        value = schedules[0](count)
        # All are evaluated: a traced count has no value to choose by.
        for successor, start in zip(schedules[1:], boundaries, strict=True):
            value = _where(count >= start, successor(count - start), value)
        return value

    return schedule
