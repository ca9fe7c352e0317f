"""What the journals of a run have: times, checkpoints, restarts, and rates over time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

import attrs

from faccel.checks import is_finite
from faccel.errors import ConfigError
from faccel.report.metric_files import json_objects
from faccel.tracking.goodput_categories import Goodput, goodput
from faccel.tracking.journal import RATES_FILE, Event, read_journal


@attrs.frozen
class Checkpoint:
    """A checkpoint that rank 0 has saved, or loaded.

    Args:
        event: "saved" or "loaded".
        step: Its step.
        time_s: When, in seconds since 1970.
        wait_s: How long the loop waited for it.
    """

    event: str
    step: int
    time_s: float
    wait_s: float


def read_events(folder: Path | None) -> list[Event]:
    """Return the events of the journals of a run, none without a meter.

    Effects: ambient. Reads files.
    """
    if folder is None:
        return []
    try:
        events = read_journal(folder)
    except ConfigError:  # no meter
        return []
    # A rank whose file has lost its beginning has no time that could be counted.
    started = {event["rank"] for event in events if event["event"] == "start"}
    return [event for event in events if event["rank"] in started]


def rank_times(events: Sequence[Event]) -> dict[int, Goodput]:
    """Return how each rank has spent its time, in the order of the ranks.

    Effects: pure.
    """
    times: dict[int, Goodput] = {}
    for rank in sorted(set(map(itemgetter("rank"), events))):
        times[rank] = goodput(events, rank=rank)
    return times


def process_starts(events: Sequence[Event]) -> list[float]:
    """Return when the processes of the first rank of the journals began.

    Effects: pure.
    """
    first = min(map(itemgetter("rank"), events), default=0)
    starts = [event for event in events if event["rank"] == first and event["event"] == "start"]
    return list(map(itemgetter("started"), starts))


def checkpoints_of(events: Sequence[Event]) -> list[Checkpoint]:
    """Return the checkpoints that the first rank of the journals has saved and loaded.

    Effects: pure.
    """
    first = min(map(itemgetter("rank"), events), default=0)
    checkpoints: list[Checkpoint] = []
    wait_s = 0.0
    for event in events:
        if event["rank"] != first:
            continue
        if event["event"] == "start":  # each process counts from 0
            wait_s = 0.0
        # The event is written after its wait was counted.
        if event["event"] in ("saved", "loaded"):
            added_s = max(event["checkpoint_s"] - wait_s, 0.0)
            wait_s = event["checkpoint_s"]
            checkpoints.append(Checkpoint(event["event"], event["step"], event["time"], added_s))
    return checkpoints


def read_rates(folder: Path | None) -> list[dict[str, float]]:
    """Return the results of `rates` of a run, oldest first.

    Effects: ambient. Reads a file.
    """
    if folder is None:
        return []
    rows: list[dict[str, float]] = []
    for values in json_objects(folder / "goodput" / RATES_FILE):
        row = {name: value for name, value in values.items() if is_finite(value)}
        # Without them it has no place on an axis.
        if {"time", "step"} <= row.keys():
            rows.append(row)
    return rows


def column(rows: Iterable[Mapping[str, float]], name: str) -> list[float]:
    """Return the values of one name, without the rows that do not have it.

    Effects: pure.

    Examples:
        >>> column([{"steps_s": 2.0}, {"mfu": 0.4}, {"steps_s": 3.0}], "steps_s")
        [2.0, 3.0]
    """
    return [row[name] for row in rows if name in row]
