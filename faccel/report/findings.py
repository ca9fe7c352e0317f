"""The verdict about a run: one sentence, what it follows from, and what to do next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import attrgetter

import attrs
import numpy as np

from faccel.report.metric_files import Series
from faccel.report.run_record import BROKEN, ENDED, RUNNING, RunRecord
from faccel.report.run_times import column
from faccel.report.words import count_text, duration_text, number_text, percent_text
from faccel.tracking.goodput_categories import Goodput

CATEGORIES: Mapping[str, str] = {
    "useful_s": "training",
    "data_wait_s": "data wait",
    "checkpoint_s": "checkpoints",
    "evaluation_s": "evaluation",
    "startup_s": "start-up",
    "skipped_s": "skipped steps",
    "lost_s": "lost steps",
    "down_s": "restarts",
}
"""The fields of `Goodput` that add up to the time of a run, and their names in a report."""

_NEXT_STEPS = {
    "data_wait_s": "give the DataLoader more workers (`num_workers`), or move work out of the "
    "dataset; `faccel why RUN` names the rank and the line while it runs",
    "checkpoint_s": "save in the background with `faccel.save(..., wait=False)`, or less often",
    "evaluation_s": "evaluate less often, or on fewer batches",
    "startup_s": "look at what runs before the first step and after the last one; compilation and "
    "the first batch belong to it",
    "skipped_s": "look for overflows: lower the learning rate, or use bf16 instead of fp16",
    "lost_s": "save more often: a restart repeats the steps since the last checkpoint",
    "down_s": "find out why processes ended: read the output of the ranks before each restart",
}
_GOOD_FRACTION = 0.9
_SLOWER = 0.8  # of the median throughput at the start
_MIN_RATES = 6
_MIN_POINTS = 20
_RISEN = 1.5  # times the lowest loss
_UNEVEN_S = 0.05  # of the time of the run


@attrs.frozen
class Finding:
    """What a report begins with.

    Args:
        kind: "good", "running", "warning" or "bad".
        sentence: The verdict.
        evidence: What it follows from, a sentence each.
        next_step: What to do, may be empty.
    """

    kind: str
    sentence: str
    evidence: tuple[str, ...] = ()
    next_step: str = ""


def finding(record: RunRecord) -> Finding:
    """Return the verdict about a run: first how it ended, then its loss, then its time.

    Effects: pure.
    """
    evidence = _evidence(record)
    time_text = time_sentence(record.duration_s, shares(record.times), record.last_step)
    # A run that has failed has no other problem that matters more.
    if record.state == BROKEN:
        sentence = (
            f"failed after {_length(record.duration_s, record.last_step)}: {record.state_text}"
        )
        return Finding("bad", sentence, (time_text, *evidence), record.next_step)
    loss = _loss_problem(record.metrics.series)
    if loss is not None:
        sentence, next_step = loss
        return Finding("bad", sentence, (time_text, *evidence), next_step)
    if record.state == RUNNING:
        return Finding("running", f"running: {time_text}", evidence, _next_step(record))
    if record.state != ENDED:
        sentence = f"stopped without an end: {time_text}"
        next_step = "read the output of the launcher; the processes were killed, or run elsewhere"
        return Finding("bad", sentence, evidence, next_step)
    kind = "good"
    if _fraction(record) < _GOOD_FRACTION and _is_long(record):
        kind = "warning"
    return Finding(kind, time_text, evidence, _next_step(record))


def shares(times: Mapping[int, Goodput]) -> dict[str, float]:
    """Return the part of the time of each category, as the mean of the ranks; empty without time.

    Effects: pure.
    """
    # Together, so that a rank that has started later counts less.
    wall_s = sum(map(attrgetter("wall_s"), times.values()))
    if not wall_s:
        return {}
    values: dict[str, float] = {}
    for category in CATEGORIES:
        values[category] = sum(map(attrgetter(category), times.values())) / wall_s
    return values


def _fraction(record: RunRecord) -> float:
    return shares(record.times).get("useful_s", 1.0)


def _is_long(record: RunRecord) -> bool:
    # Most of a run of seconds is start-up, which is no problem.
    return record.duration_s > 60


def _length(duration_s: float, step: int | None) -> str:
    text = duration_text(duration_s)
    if step is not None:
        text += f" and {count_text(step, 'step')}"
    return text


def time_sentence(duration_s: float, values: Mapping[str, float], step: int | None) -> str:
    """Return how long a run took, how much of that was training, and the largest loss of time.

    Effects: pure.

    Args:
        duration_s: How long it took.
        values: From `shares`.
        step: Its last step, None if that is unknown.
    """
    if not values:
        return f"{_length(duration_s, step)}; nothing has measured how the time was spent"
    text = f"{duration_text(duration_s)}, {percent_text(values['useful_s'])} of it training"
    category = _largest_loss(values)
    if category is None:
        return text
    return (
        f"{text}; the largest loss of time is {CATEGORIES[category]}, "
        f"{percent_text(values[category])}"
    )


def _largest_loss(values: Mapping[str, float]) -> str | None:
    losses = dict(values)
    del losses["useful_s"]
    largest = max(losses, key=losses.__getitem__)
    # It would be printed as 0 %.
    if losses[largest] < 0.005:
        return None
    return largest


def _next_step(record: RunRecord) -> str:
    values = shares(record.times)
    if not values:
        return (
            "measure the time: `meter = init_meter(ctx, run=name)` before the loop, and "
            "`meter = tick(meter, samples=n)` after each step"
        )
    category = _largest_loss(values)
    # Of a run that mostly trains there is little to win.
    if category is None or values["useful_s"] >= _GOOD_FRACTION:
        return ""
    if category == "startup_s" and not _is_long(record):
        return "measure a longer run: in one of seconds most of the time is start-up"
    return _NEXT_STEPS[category]


def _loss_problem(series_by_name: Mapping[str, Series]) -> tuple[str, str] | None:
    """Return what is wrong with the curves, and what to do; None if nothing is."""
    # The loss first: gradient norms and others follow it.
    names = sorted(series_by_name, key=lambda name: ("loss" not in name.lower(), name))
    for name in names:
        series = series_by_name[name]
        if math.isfinite(series.last) or "loss" not in name.lower():
            continue
        bad = np.flatnonzero(~np.isfinite(series.values))
        # The first of the values at the end: a spike before them has passed.
        finite = np.flatnonzero(np.isfinite(series.values))
        begin = int(bad[0])
        if len(finite):
            begin = int(finite[-1]) + 1
        step = int(series.steps[begin])
        sentence = f"diverged: `{name}` is {number_text(series.last)} since step {step}"
        return sentence, (
            "lower the learning rate or clip gradients with `optimizer_step(..., clip_norm=1.0)`, "
            "and resume from a checkpoint before that step"
        )
    for name in names:
        if "loss" in name.lower():
            sentence = _risen(series_by_name[name])
            if sentence:
                return sentence, "lower the learning rate, or stop at the lowest loss"
    return None


def _risen(series: Series) -> str:
    """Return a sentence about a loss that has risen far above its lowest value, else nothing."""
    values = series.finite()
    if len(values) < _MIN_POINTS or values.min() < 0:  # of negative losses a ratio has no sense
        return ""
    # Means of a tenth: single steps scatter.
    size = len(values) // 10
    means = values[: size * 10].reshape(10, size).mean(1)
    lowest = int(means.argmin())
    if means[-1] < _RISEN * means[lowest] or means[-1] < means[0]:
        return ""
    return (
        f"`{series.name}` has risen from {number_text(means[lowest])} to "
        f"{number_text(means[-1])}, above its start"
    )


def _evidence(record: RunRecord) -> tuple[str, ...]:
    lines = [
        *_time_lines(record),
        *_uneven_lines(record.times),
        *_rate_lines(record.rates),
        *_loss_lines(record.metrics.series),
    ]
    num_warnings = sum(map(attrgetter("count"), record.warnings))
    if num_warnings:
        lines.append(f"{count_text(num_warnings, 'warning')} in the logs")
    lines += record.metrics.notes
    return tuple(lines)


def _time_lines(record: RunRecord) -> list[str]:
    lines: list[str] = []
    if not record.times:
        return lines
    rank = min(record.times)
    result = record.times[rank]
    seconds = f"{duration_text(result.useful_s)} of {duration_text(result.wall_s)}"
    lines.append(f"rank {rank} trained {count_text(result.num_steps, 'step')}: {seconds}")
    if result.num_restarts:
        text = count_text(result.num_restarts, "restart")
        # A restart from the last step loses none.
        if result.num_lost:
            text += f", after which {count_text(result.num_lost, 'step')} were repeated"
        lines.append(f"{text}; {duration_text(result.lost_s + result.down_s)} lost")
    if result.num_skipped:
        lines.append(f"{count_text(result.num_skipped, 'update')} skipped, as after an overflow")
    return lines


def _uneven_lines(times: Mapping[int, Goodput]) -> list[str]:
    """Return a sentence about a rank that waits for data longer than the others."""
    if len(times) < 2:
        return []
    longest = max(times, key=lambda rank: times[rank].data_wait_s)
    wait_s = times[longest].data_wait_s
    sum_s = sum(map(attrgetter("data_wait_s"), times.values()))
    mean_s = (sum_s - wait_s) / (len(times) - 1)
    if wait_s - mean_s < _UNEVEN_S * times[longest].wall_s:
        return []
    texts = duration_text(wait_s), duration_text(mean_s)
    return [f"rank {longest} waited {texts[0]} for data, the others {texts[1]}"]


def _loss_lines(series_by_name: Mapping[str, Series]) -> list[str]:
    """Return a sentence about the first curve that is a loss."""
    for name, series in sorted(series_by_name.items()):
        values = series.finite()
        if "loss" not in name.lower() or len(values) < 2:
            continue
        text = f"`{name}` from {number_text(values[0])} to {number_text(values[-1])}"
        step = int(series.steps[np.isfinite(series.values)][values.argmin()])
        return [f"{text}; the lowest is {number_text(values.min())} at step {step}"]
    return []


def _rate_lines(rates: Sequence[Mapping[str, float]]) -> list[str]:
    lines: list[str] = []
    slowest = Counter(map(int, column(rates, "slowest_rank")))
    if slowest:
        rank, count = slowest.most_common(1)[0]
        # Each rank is the last one now and then.
        if count > len(rates) / 2 and count >= 3:
            lines.append(f"rank {rank} was the slowest in {count} of {len(rates)} measurements")
    speeds = column(rates, "steps_s")
    # Medians of thirds: one slow checkpoint is no trend.
    if len(speeds) >= _MIN_RATES:
        third = len(speeds) // 3
        first, last = float(np.median(speeds[:third])), float(np.median(speeds[-third:]))
        if last < _SLOWER * first:
            lines.append(
                f"the run has slowed down from {number_text(first)} to {number_text(last)} steps/s"
            )
    return lines
