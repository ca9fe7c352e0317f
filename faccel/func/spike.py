"""Detection of loss spikes: a pure function over the mean and the variance of recent losses."""

from __future__ import annotations

import math

import attrs
import torch

from faccel.checks import in_range, integer, positive, shown
from faccel.errors import ModelError

# Two losses that differ by less than this part of the mean differ by rounding.
_ROUNDING = 1e-6


@attrs.frozen
class SpikeState:
    """Statistics of the losses of a run, for `detect_spike`. Plain numbers, equal on all ranks.

    Args:
        threshold: A loss above `mean + threshold * standard deviation` is a spike.
        decay: Weight of the old statistics; see `init_spike`.
        warmup: Number of losses before the first one that can be a spike.
        num_losses: Number of losses in the statistics.
        mean: Exponential moving mean.
        variance: Exponential moving variance.
        num_spikes: Number of spikes so far.
        num_consecutive: Number of spikes since the last loss that was none.
    """

    threshold: float
    decay: float
    warmup: int
    num_losses: int = 0
    mean: float = 0.0
    variance: float = 0.0
    num_spikes: int = 0
    num_consecutive: int = 0


def init_spike(*, threshold: float = 7.0, decay: float = 0.99, warmup: int = 100) -> SpikeState:
    """Return the state before the first loss.

    Effects: pure.

    Args:
        threshold: How many standard deviations above the mean a spike is. The default comes from
            the spike score of OLMo 2 (arXiv:2501.00656).
        decay: A loss moves the mean by `1 - decay` of its distance, so that about
            `2 / (1 - decay)` losses count. Until there are enough, all have equal weights.
        warmup: Number of losses before the first one that can be a spike. The loss falls steeply at
            the start of a run, and statistics of few losses mean little.

    Raises:
        ConfigError: A number is out of range.

    Examples:
        >>> from faccel.func import init_spike
        >>> init_spike(threshold=6.0).threshold
        6.0
    """
    positive("threshold", threshold)
    in_range("decay", decay, 0.0, 1.0)
    integer("warmup", warmup, at_least=1)
    return SpikeState(threshold, decay, warmup)


def detect_spike(state: SpikeState, loss: float | torch.Tensor) -> tuple[bool, SpikeState]:
    """Return whether `loss` is a spike, and the state after it.

    A spike is a loss that is not finite, or one above `mean + threshold * standard deviation` of
    the losses before it. It does not enter the statistics, so that a second one is found, too. A
    low loss is no spike.

    Mean and variance are those of T. Finch, "Incremental calculation of weighted mean and
    variance" (2009), section 9: `d = x - mean`, `mean += w * d`,
    `variance = (1 - w) * (variance + w * d^2)`.

    Effects: pure. Waits for the device if `loss` is on one.

    Args:
        state: From `init_spike` or `detect_spike`.
        loss: A number or a scalar. All ranks decide the same only if it is equal on them, as
            `faccel.reduce(loss, ctx, op="mean")` and the losses of `make_step` are.

    Raises:
        ModelError: `loss` is not a scalar.

    Examples:
        >>> from faccel.func import detect_spike, init_spike
        >>> spikes = init_spike(warmup=3)
        >>> for loss in (2.0, 2.1, 1.9, 50.0, 2.0):
        ...     is_spike, spikes = detect_spike(spikes, loss)
        ...     print(is_spike)
        False
        False
        False
        True
        False
        >>> spikes.num_losses, spikes.num_spikes, round(spikes.mean, 3)
        (4, 1, 2.0)
    """
    value = _number(loss)
    if _is_spike(state, value):
        return True, attrs.evolve(
            state,
            num_spikes=state.num_spikes + 1,
            num_consecutive=state.num_consecutive + 1,
        )
    # `1 / n` until `1 - decay` is larger: the plain mean and variance of the first losses.
    weight = max(1.0 - state.decay, 1.0 / (state.num_losses + 1))
    distance = value - state.mean
    new_state = attrs.evolve(
        state,
        num_losses=state.num_losses + 1,
        mean=state.mean + weight * distance,
        variance=(1.0 - weight) * (state.variance + weight * distance * distance),
        num_consecutive=0,
    )
    return False, new_state


def _is_spike(state: SpikeState, value: float) -> bool:
    if not math.isfinite(value):
        return True
    if state.num_losses < state.warmup:
        return False
    # Equal losses have no variance: rounding is no spike.
    deviation = max(math.sqrt(state.variance), _ROUNDING * abs(state.mean))
    return value - state.mean > state.threshold * deviation


def _number(loss: object) -> float:
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return float(loss.detach())
    if isinstance(loss, (int, float)):
        return float(loss)
    raise ModelError(
        "`loss` must be a number or a scalar tensor",
        got=shown(loss),
        fix="reduce it, as in `loss.mean()`",
    )
