"""A run while it trains: what was added to its files, and what its ranks do."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from faccel.checks import is_finite
from faccel.report.findings import shares, time_sentence
from faccel.report.follower import Follower
from faccel.report.live_ranks import LiveRanks, RankRow, rank_rows
from faccel.report.metric_files import (
    add_csv_line,
    add_events,
    add_json_line,
    is_number,
    open_events,
)
from faccel.report.run_folder import find_run
from faccel.report.run_record import (
    RUNNING,
    rank_states,
    run_interval,
    state_of_run,
)
from faccel.report.run_times import rank_times, read_events
from faccel.report.words import number_text
from faccel.tracking.goodput_categories import Goodput
from faccel.tracking.journal import RATES_FILE

_COMMAND = "faccel watch"
_MAX_MEANS = 120
# Without a step for so long, ranks that wait for each other are a hang, and not a long step.
_HANG_S = 10.0
_HANG_STEPS = 5.0
_NUM_TIMES = 30


@attrs.frozen
class LiveMetric:
    """A metric.

    Args:
        name: Its name.
        step: The step of its last value.
        last: That value.
        means: Its curve, as means of successive values.
    """

    name: str
    step: float
    last: float
    means: tuple[float, ...]


@attrs.frozen
class Frame:
    """A run at one moment.

    Args:
        name: Its name.
        state: As in `RunRecord`.
        is_over: Whether no more will come.
        elapsed_s: Seconds since it began.
        step: How many steps it has trained; None if that is unknown.
        steps_s: Steps per second over the last frames; None if that is unknown.
        num_restarts: How often it was restarted.
        sentence: The verdict.
        next_step: What to do, may be empty.
        shares: The part of the time of each category.
        rates: The last result of `rates`.
        metrics: The last values of each metric.
        ranks: What the ranks do.
    """

    name: str
    state: str
    is_over: bool
    elapsed_s: float
    step: int | None
    steps_s: float | None
    num_restarts: int
    sentence: str
    next_step: str
    shares: Mapping[str, float]
    rates: Mapping[str, float]
    metrics: Sequence[LiveMetric]
    ranks: Sequence[RankRow]


class Curve:
    """The means of equally many successive values each, at most some hundred of them.

    Examples:
        >>> curve = Curve(max_means=2)
        >>> for value in (1.0, 3.0, 5.0, 7.0, 8.0):
        ...     curve.add(value)
        >>> curve.means, curve.last
        ([2.0, 6.0], 8.0)
    """

    def __init__(self, max_means: int = _MAX_MEANS) -> None:
        self.means: list[float] = []
        self.last = math.nan
        self._max_means = max_means
        self._size = 1
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """Add a value."""
        self.last = value
        self._pending.append(value)
        # Until it is complete, `last` alone shows the value.
        if len(self._pending) < self._size:
            return
        self.means.append(sum(self._pending) / self._size)
        self._pending.clear()
        if len(self.means) < 2 * self._max_means:
            return
        # Pairs of neighbours: the curve stays that of the full run.
        self.means = np.array(self.means).reshape(-1, 2).mean(1).tolist()
        self._size *= 2


class _Values:
    """The curve of each metric."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.steps: dict[str, float] = {}

    def add(self, name: str, step: float, value: object) -> None:
        """Add a value; text has no curve."""
        if is_number(value):
            self.curves.setdefault(name, Curve()).add(float(value))
            self.steps[name] = step

    def metrics(self) -> list[LiveMetric]:
        """Return the metrics, losses first."""
        metrics: list[LiveMetric] = []
        for name in sorted(self.curves, key=lambda name: ("loss" not in name.lower(), name)):
            curve = self.curves[name]
            metrics.append(LiveMetric(name, self.steps[name], curve.last, tuple(curve.means)))
        return metrics


class LiveMetrics:
    """Reads what was added to the files of trackers, and to that of `rates`."""

    def __init__(self) -> None:
        self.rates: Mapping[str, float] = {}
        self._values = _Values()
        self._followers: dict[str, Follower] = {}
        self._event_files: dict[Path, Any] = {}

    def read(self, folder: Path | None) -> list[LiveMetric]:
        """Return the last values of each metric, losses first.

        Effects: ambient. Reads files.

        Args:
            folder: The folder of the run; None has no metrics.
        """
        if folder is None:
            return []
        json_path, csv_path = folder / "metrics.jsonl", folder / "metrics.csv"
        for line in self._new(json_path).objects():
            add_json_line(line, self._values)
        for text in self._new(csv_path).texts():
            add_csv_line(text, self._values)
        for row in self._new(folder / "goodput" / RATES_FILE).objects():
            self.rates = {name: value for name, value in row.items() if is_finite(value)}
        # Only without another file: TensorBoard is slow to import.
        if not json_path.exists() and not csv_path.exists():
            self._read_event_files(folder)
        return self._values.metrics()

    def _new(self, path: Path) -> Follower:
        return self._followers.setdefault(path.name, Follower(path))

    def _read_event_files(self, folder: Path) -> None:
        for path in sorted(folder.glob("events.out.tfevents*")):
            if path not in self._event_files:
                self._event_files[path] = open_events(path)
            if self._event_files[path] is not None:
                add_events(self._event_files[path], self._values)


class LiveSpeed:
    """The speed of a run over its last frames, and how long it has had no step."""

    def __init__(self) -> None:
        self._times: deque[tuple[float, int]] = deque(maxlen=_NUM_TIMES)
        self._last_step_s = -math.inf

    def add(self, step: int, now_s: float) -> None:
        """Note the step at a time."""
        # A restart continues from an earlier step.
        if self._times and step < self._times[-1][1]:
            self._times.clear()
        if not self._times or step != self._times[-1][1]:
            self._last_step_s = now_s
        self._times.append((now_s, step))

    @property
    def steps_s(self) -> float | None:
        """Steps per second, None if that is unknown."""
        if not self._times:
            return None
        (first_s, first), (last_s, last) = self._times[0], self._times[-1]
        # Two frames of one moment have no speed.
        if last_s - first_s < 1.0 or last == first:
            return None
        return (last - first) / (last_s - first_s)

    @property
    def is_silent(self) -> bool:
        """Whether there was no step for much longer than a step takes."""
        if not self._times:
            return True
        limit_s = _HANG_S
        # Steps may take minutes.
        if self.steps_s is not None:
            limit_s = max(limit_s, _HANG_STEPS / self.steps_s)
        return self._times[-1][0] - self._last_step_s > limit_s


class LiveRun:
    """Reads what is new in the folder of a run.

    Args:
        run: What the user has named.
        clock: Returns the time of day, in seconds.

    Raises:
        ConfigError: There is no run, or there are several.
    """

    def __init__(self, run: str, clock: Callable[[], float] = time.time) -> None:
        self._run = run
        self._folders = find_run(run, _COMMAND)
        self._clock = clock
        self._metrics = LiveMetrics()
        self._ranks = LiveRanks(self._folders.run_dir)
        self._speed = LiveSpeed()

    def frame(self) -> Frame:
        """Return the run as it is now.

        Effects: ambient. Reads files. Every few seconds it also asks the ranks of this node what
        they do, for which this call takes 0.2 s longer.
        """
        now_s = self._clock()
        # The ranks of a run that starts exist before its tracker does.
        if self._folders.folder is None:
            self._folders = find_run(self._run, _COMMAND)
        metrics = self._metrics.read(self._folders.folder)
        events = read_events(self._folders.folder)
        ranks = rank_states(self._folders)
        began_s, ended_s = run_interval(self._folders, events)
        state, state_text, next_step = state_of_run(ranks, events, now_s - ended_s)
        if state == RUNNING:
            ended_s = now_s
            self._ranks.ask(ranks, now_s)
        times = rank_times(events)
        step = self._step(times)
        # A script without a meter whose ranks are on other nodes has no step here.
        if step is not None:
            self._speed.add(step, now_s)
        values = shares(times)
        sentence = time_sentence(max(ended_s - began_s, 0.0), values, step)
        if state == RUNNING:
            problem = _loss_problem(metrics) or self._ranks.problem(is_silent=self._speed.is_silent)
            # Without a problem, where the time goes.
            sentence, next_step = problem or (sentence, "")
        return Frame(
            name=self._folders.name,
            state=state,
            is_over=self._ranks.is_over(state, ranks, now_s),
            elapsed_s=max(ended_s - began_s, 0.0),
            step=step,
            steps_s=self._speed.steps_s,
            num_restarts=max(map(attrgetter("num_restarts"), times.values()), default=0),
            sentence=state_text or sentence,
            next_step=next_step,
            shares=values,
            rates=self._metrics.rates,
            metrics=metrics,
            ranks=rank_rows(ranks, self._ranks.snapshots, is_running=state == RUNNING),
        )

    def _step(self, times: Mapping[int, Goodput]) -> int | None:
        # Without a meter, the ranks have counted their updates.
        steps = list(map(attrgetter("num_steps"), times.values()))
        if not steps:
            steps = list(map(attrgetter("step"), self._ranks.snapshots))
        return max(steps, default=None)


def _loss_problem(metrics: Sequence[LiveMetric]) -> tuple[str, str] | None:
    """Return which loss is not finite, and what to do; None if there is none."""
    # Other metrics may be NaN on purpose, such as a precision without positives.
    for metric in metrics:
        if "loss" in metric.name.lower() and not math.isfinite(metric.last):
            text = f"`{metric.name}` is {number_text(metric.last)}"
            next_step = "lower the learning rate, and resume from an earlier checkpoint"
            return f"{text} at step {metric.step:.0f}", next_step
    return None
