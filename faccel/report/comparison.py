"""What differs between two runs: configuration, speed and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any

import attrs
import numpy as np

from faccel.report.findings import CATEGORIES, shares
from faccel.report.metric_files import Series
from faccel.report.run_record import RunRecord
from faccel.report.run_times import column
from faccel.report.words import number_text

# Paths and commands differ between any two runs.
_OF_ANY_RUN = ("run_dir",)
_SPEEDS = ("steps_s", "samples_s", "tokens_s", "mfu", "peak_bytes", "data_wait", "comm_wait")
_HYPERPARAMETER = "config."
MISSING = "-"
_NUM_NAMED = 5


@attrs.frozen
class Setting:
    """A setting that differs.

    Args:
        name: Its name.
        values: Its value in each run, "-" where it has none.
        sources: Where the values come from; empty for hyperparameters.
    """

    name: str
    values: tuple[str, str]
    sources: tuple[str, str] = ("", "")


@attrs.frozen
class Measure:
    """A number that both runs have, or one of them.

    Args:
        name: Its name.
        values: Its value in each run, None where it has none.
    """

    name: str
    values: tuple[float | None, float | None]

    @property
    def ratio(self) -> float | None:
        """The second value in parts of the first one; None without it."""
        first, second = self.values
        if first is None or second is None or not first or not math.isfinite(second / first):
            return None
        return second / first


@attrs.frozen
class Curve:
    """A metric of both runs.

    Args:
        name: Its name.
        last: Its last value in each run.
        lowest: Its lowest finite value in each run; None without one.
        highest: Its highest finite value in each run; None without one.
        common_step: The last step that both runs have recorded, None if there is none.
        at_common_step: Its values there.
    """

    name: str
    last: tuple[float, float]
    lowest: tuple[float | None, float | None]
    highest: tuple[float | None, float | None]
    common_step: int | None
    at_common_step: tuple[float | None, float | None]


@attrs.frozen
class Comparison:
    """What differs between two runs.

    Args:
        names: Their names.
        sentence: The most important of it.
        settings: Fields of the configuration and hyperparameters that differ.
        num_equal: How many are equal.
        speeds: Throughput, waits and memory: medians over the run, of memory the peak.
        times: The part of the time of each category.
        curves: The metrics of both runs.
        only: The metrics that only the first, and only the second run has.
    """

    names: tuple[str, str]
    sentence: str
    settings: tuple[Setting, ...]
    num_equal: int
    speeds: tuple[Measure, ...]
    times: tuple[Measure, ...]
    curves: tuple[Curve, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]

    def document(self) -> dict[str, Any]:
        """Return it as values of JSON, with the ratio of each speed."""
        values = attrs.asdict(self)
        values["speeds"] = [{**attrs.asdict(s), "ratio": s.ratio} for s in self.speeds]
        return values


def compare(first: RunRecord, second: RunRecord) -> Comparison:
    """Return what differs between two runs.

    Effects: pure.
    """
    settings, num_equal = _settings(first, second)
    speeds = _speeds(first, second)
    curves, only = _curves(first.metrics.series, second.metrics.series)
    return Comparison(
        names=(first.name, second.name),
        sentence=_sentence(settings, speeds, curves),
        settings=settings,
        num_equal=num_equal,
        speeds=speeds,
        times=_times(first, second),
        curves=curves,
        only=only,
    )


def _settings(first: RunRecord, second: RunRecord) -> tuple[tuple[Setting, ...], int]:
    """Return what differs, and how many settings are equal."""
    settings: list[Setting] = []
    before, after = _all_settings(first), _all_settings(second)
    # Hyperparameters first, each in the order of the runs.
    names = list(dict.fromkeys((*before, *after)))
    names.sort(key=lambda name: not name.startswith(_HYPERPARAMETER))
    for name in names:
        values, sources = zip(
            before.get(name, (MISSING, "")), after.get(name, (MISSING, "")), strict=True
        )
        if values[0] != values[1] and name not in _OF_ANY_RUN:
            settings.append(Setting(name, values, sources))
    num_differing = len(settings) + len(set(_OF_ANY_RUN).intersection(names))
    return tuple(settings), max(len(names) - num_differing, 0)


def _all_settings(record: RunRecord) -> dict[str, tuple[str, str]]:
    """Return hyperparameters, fields of the configuration, and facts, each with its source."""
    settings = {f"{_HYPERPARAMETER}{name}": (value, "") for name, value in record.config.items()}
    settings |= record.fields
    versions = record.facts.get("versions")
    if isinstance(versions, dict):
        settings |= {str(name): (str(version), "installed") for name, version in versions.items()}
    if record.world_size:
        settings["ranks"] = (str(record.world_size), "")
    # The device that was chosen; that of the configuration may be None.
    if "device" in record.facts:
        settings["device type"] = (str(record.facts["device"]), "")
    return settings


def _speeds(first: RunRecord, second: RunRecord) -> tuple[Measure, ...]:
    before, after = _medians(first), _medians(second)
    names = [name for name in _SPEEDS if name in before or name in after]
    measures = [Measure(name, (before.get(name), after.get(name))) for name in names]
    durations = (first.duration_s, second.duration_s)
    return (*measures, Measure("duration_s", durations))


def _medians(record: RunRecord) -> dict[str, float]:
    """Return the median of each rate over the run; of memory the largest value."""
    values: dict[str, float] = {}
    for name in _SPEEDS:
        rates = column(record.rates, name)
        # Tokens of a loop that counts none are 0.
        if not any(rates):
            continue
        values[name] = float(np.median(rates))
        if name == "peak_bytes":
            values[name] = float(max(rates))
    # Without `rates`, the meter has counted steps and their time.
    if "steps_s" not in values and record.times:
        result = record.times[min(record.times)]
        step_time_s = result.useful_s + result.data_wait_s
        if step_time_s:
            values["steps_s"] = result.num_steps / step_time_s
    return values


def _times(first: RunRecord, second: RunRecord) -> tuple[Measure, ...]:
    before, after = shares(first.times), shares(second.times)
    measures: list[Measure] = []
    for category, name in CATEGORIES.items():
        # A category that neither run has explains nothing.
        if before.get(category) or after.get(category):
            measures.append(Measure(name, (before.get(category), after.get(category))))
    return tuple(measures)


def _curves(
    first: Mapping[str, Series], second: Mapping[str, Series]
) -> tuple[tuple[Curve, ...], tuple[tuple[str, ...], tuple[str, ...]]]:
    common = sorted(first.keys() & second.keys(), key=lambda name: ("loss" not in name, name))
    curves = tuple(map(_curve, map(first.__getitem__, common), map(second.__getitem__, common)))
    only_first, only_second = first.keys() - second.keys(), second.keys() - first.keys()
    return curves, (tuple(sorted(only_first)), tuple(sorted(only_second)))


def _curve(first: Series, second: Series) -> Curve:
    steps = np.intersect1d(first.steps, second.steps)
    common_step = None
    at_common_step: tuple[float | None, float | None] = (None, None)
    # Runs that record at different intervals may have none.
    if len(steps):
        common_step = int(steps[-1])
        at_common_step = (_value_at(first, steps[-1]), _value_at(second, steps[-1]))
    return Curve(
        name=first.name,
        last=(first.last, second.last),
        lowest=(_extreme(first, min), _extreme(second, min)),
        highest=(_extreme(first, max), _extreme(second, max)),
        common_step=common_step,
        at_common_step=at_common_step,
    )


def _extreme(series: Series, choose: Any) -> float | None:
    values = series.finite().tolist()
    return choose(values, default=None)


def _value_at(series: Series, step: float) -> float:
    return float(series.values[np.searchsorted(series.steps, step)])


def _sentence(
    settings: Sequence[Setting], speeds: Sequence[Measure], curves: Sequence[Curve]
) -> str:
    clauses = [_speed_clause(speeds), _loss_clause(curves)]
    names = list(map(attrgetter("name"), settings))
    text = f"{len(names)} settings differ: {', '.join(names[:_NUM_NAMED])}"
    if len(names) == 1:
        text = f"one setting differs: {names[0]}"
    if len(names) > _NUM_NAMED:
        text += ", ..."
    if not names:
        text = "no setting differs"
    clauses.append(text)
    return "; ".join(filter(None, clauses))


def _speed_clause(speeds: Sequence[Measure]) -> str:
    for measure in speeds:
        ratio = measure.ratio
        if measure.name != "steps_s" or ratio is None:
            continue
        first, second = measure.values
        assert first is not None and second is not None  # or there is no ratio
        numbers = f"{number_text(first)} and {number_text(second)} steps/s"
        # Less is noise.
        if abs(ratio - 1) < 0.02:
            return f"both runs are equally fast ({numbers})"
        return f"the second run has {ratio:.3g} times the speed of the first ({numbers})"
    return ""


def _loss_clause(curves: Sequence[Curve]) -> str:
    for curve in curves:
        first, second = curve.at_common_step
        if "loss" in curve.name.lower() and first is not None and second is not None:
            numbers = f"{number_text(first)} and {number_text(second)}"
            return f"`{curve.name}` at step {curve.common_step} is {numbers}"
    return ""
