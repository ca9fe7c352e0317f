"""What the folder of a run has, as one record: state, configuration, metrics, times, warnings."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import attrs

from faccel.checks import is_finite, parse_count
from faccel.errors import ConfigError
from faccel.observe import rank_file
from faccel.observe.ask import states
from faccel.observe.snapshot import ANSWERED, FINISHED, REMOTE, Snapshot
from faccel.observe.verdict import verdict
from faccel.report.metric_files import Metrics, json_objects, read_metrics
from faccel.report.run_folder import RunFolder
from faccel.report.run_times import (
    Checkpoint,
    checkpoints_of,
    process_starts,
    rank_times,
    read_events,
    read_rates,
)
from faccel.run_facts import HIDDEN, is_secret, without_passwords
from faccel.tracking.goodput_categories import Goodput
from faccel.tracking.journal import Event
from faccel.tracking.run_file import read_run_file

RUNNING = "running"
ENDED = "ended"
BROKEN = "failed"
STOPPED = "stopped"
"""Nothing was written for a while, and what the processes do is unknown."""

# Longer than most steps, checkpoints and compilations.
_SILENT_S = 600.0
_LEVELS = ("WARNING", "ERROR", "CRITICAL")
_MAX_WARNINGS = 200


@attrs.define
class Warnings:
    """Messages of one text in the logs.

    Args:
        level: Their level.
        message: The text.
        count: How many there are.
        ranks: Which ranks have logged them.
        first_s: When the first one was logged, in seconds since 1970.
        step: The step of the last one, None if it has none.
    """

    level: str
    message: str
    count: int = 0
    ranks: set[int] = attrs.field(factory=set)
    first_s: float = 0.0
    step: int | None = None


@attrs.frozen(eq=False)
class RunRecord:
    """A run.

    Args:
        name: Its name.
        folders: Where it is.
        state: `RUNNING`, `ENDED`, `BROKEN` or `STOPPED`.
        state_text: How it has ended, in a sentence; empty while it runs.
        next_step: What to do about that, may be empty.
        began_s: When it began, in seconds since 1970; 0 if that is unknown.
        ended_s: When it ended, or when it was last written.
        ranks: The state of each rank, empty for a run that is not observed.
        world_size: Number of ranks; 0 if that is unknown.
        facts: Command, versions and device of rank 0.
        fields: Each field of the configuration: its value and the source of it.
        config: The hyperparameters, by dotted name.
        metrics: Curves.
        times: How each rank has spent its time, by rank.
        checkpoints: Those of rank 0, oldest first.
        restarts_s: When processes of rank 0 started after the first one.
        rates: The results of `rates`, oldest first, each with "time" and "step".
        warnings: What was logged with the level WARNING or above.
    """

    name: str
    folders: RunFolder
    state: str
    state_text: str
    next_step: str
    began_s: float
    ended_s: float
    ranks: Sequence[Snapshot]
    world_size: int
    facts: Mapping[str, Any]
    fields: Mapping[str, tuple[str, str]]
    config: Mapping[str, str]
    metrics: Metrics
    times: Mapping[int, Goodput]
    checkpoints: Sequence[Checkpoint]
    restarts_s: Sequence[float]
    rates: Sequence[Mapping[str, float]]
    warnings: Sequence[Warnings]

    @property
    def duration_s(self) -> float:
        """Seconds from the start of the run to its end, or to the last sign of it."""
        return max(self.ended_s - self.began_s, 0.0)

    @property
    def last_step(self) -> int | None:
        """The largest step that is known."""
        steps: list[int] = []
        # Scripts number their steps, or epochs, and a meter counts what the run has kept.
        for series in self.metrics.series.values():
            steps += [int(series.steps[-1])]
        steps += map(attrgetter("num_steps"), self.times.values())
        return max(steps, default=None)


def read_record(folders: RunFolder, *, now_s: float | None = None) -> RunRecord:
    """Return all that the folder of a run has.

    Effects: ambient. Reads files, also those of a run that still trains.

    Args:
        folders: From `find_run`.
        now_s: The time of day; None reads the clock.
    """
    if now_s is None:
        now_s = time.time()
    events = read_events(folders.folder)
    ranks = rank_states(folders)
    facts = read_facts(folders)
    began_s, ended_s = run_interval(folders, events)
    state, state_text, next_step = state_of_run(ranks, events, now_s - ended_s)
    # Its last sign may be some seconds old, as in a long step.
    if state == RUNNING:
        ended_s = max(now_s, ended_s)
    times = rank_times(events)
    world_size = max(len(ranks), len(times))
    # Ranks that write neither a file nor a journal are counted by rank 0.
    if is_finite(facts.get("world_size")):
        world_size = max(world_size, int(facts["world_size"]))
    return RunRecord(
        name=folders.name,
        folders=folders,
        state=state,
        state_text=state_text,
        next_step=next_step,
        began_s=began_s,
        ended_s=ended_s,
        ranks=ranks,
        world_size=world_size,
        facts=facts,
        fields=_fields(facts),
        config=_flat(_hyperparameters(folders.folder, facts)),
        metrics=read_metrics(folders.folder),
        times=times,
        checkpoints=checkpoints_of(events),
        restarts_s=process_starts(events)[1:],
        rates=list(read_rates(folders.folder)),
        warnings=_warnings(folders.run_dir),
    )


def rank_states(folders: RunFolder) -> list[Snapshot]:
    """Return the state of each rank without asking it; none for a run that is not observed.

    Effects: ambient. Reads the run folder, and whether the processes of this node exist.
    """
    if not (folders.run_dir / rank_file.FOLDER).is_dir():
        return []
    try:
        ranks = states(str(folders.run_dir))
        _, documents = rank_file.read_run(str(folders.run_dir))
    except ConfigError:  # files of another program
        return []
    # The processes may be those of a later run in the same run folder.
    began_s = min(map(itemgetter("start_s"), documents))
    if folders.folder is not None and _last_written_s(folders.folder) < began_s:
        return []
    return ranks


def state_of_run(
    ranks: Sequence[Snapshot], events: Sequence[Event], silent_s: float
) -> tuple[str, str, str]:
    """Return the state of a run, how it has ended, and what to do about that.

    Effects: pure.

    Args:
        ranks: From `rank_states`.
        events: From `read_journal`.
        silent_s: Seconds since anything of the run was written.
    """
    statuses = set(map(attrgetter("status"), ranks))
    if ranks and not statuses <= {ANSWERED, FINISHED, REMOTE}:
        result = verdict(ranks)
        return BROKEN, result.sentence, result.next_step
    # Processes of this node that exist are not asked here.
    if ANSWERED in statuses:
        return RUNNING, "", ""
    if statuses == {FINISHED}:
        return ENDED, "", ""
    # Ranks of other nodes, and runs that are not observed: what they have written remains.
    last: dict[int, str] = {}
    for event in events:
        last[event["rank"]] = event["event"]
    if last and set(last.values()) == {"end"}:
        return ENDED, "", ""
    if silent_s < _SILENT_S:
        return RUNNING, "", ""
    return STOPPED, "", ""


def run_interval(folders: RunFolder, events: Sequence[Event]) -> tuple[float, float]:
    """Return when the run began, and when it last wrote anything.

    Effects: ambient. Reads files.
    """
    starts = process_starts(events)
    times: list[float] = list(map(itemgetter("time"), events))
    # The journals have the time of each process, also before a restart.
    if starts:
        return starts[0], max(times)
    try:
        _, documents = rank_file.read_run(str(folders.run_dir))
    except ConfigError:
        documents = []
    begins: list[float] = list(map(itemgetter("start_s"), documents))
    times += map(_last_time_s, documents)
    if folders.folder is not None:
        times.append(_last_written_s(folders.folder))
        begins.append(_first_written_s(folders.folder))
    return min(begins, default=0.0), max(times, default=0.0)


def _last_time_s(document: Mapping[str, Any]) -> float:
    """Return when a rank has ended, or has started if it has not."""
    end = document.get("end")
    if end is not None:
        return end["time_s"]
    return document["start_s"]


def _first_written_s(folder: Path) -> float:
    facts = read_run_file(folder)
    value = facts.get("time_s")
    if is_finite(value):
        return float(value)
    times = [path.stat().st_mtime for path in folder.iterdir() if path.is_file()]
    return min(times, default=0.0)


def _last_written_s(folder: Path) -> float:
    last_s = 0.0
    for path in (*folder.glob("*"), *folder.glob("goodput/*")):
        # The report of an older run would make that run the newest one.
        if path.is_file() and path.suffix != ".html":
            last_s = max(last_s, path.stat().st_mtime)
    return last_s


def read_facts(folders: RunFolder) -> dict[str, Any]:
    """Return command, versions and configuration of rank 0, empty if nothing was stored.

    Effects: ambient. Reads files.
    """
    facts: dict[str, Any] = {}
    if folders.folder is not None:
        facts = dict(read_run_file(folders.folder))
    # Both have the same fields. That of a run is the better one, if it has both.
    if not facts:
        for values in json_objects(rank_file.facts_path(str(folders.run_dir))):
            facts = values
    return facts


def _fields(facts: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    fields: dict[str, tuple[str, str]] = {}
    stored = facts.get("fields")
    # A file of another program, or of a later version.
    if not isinstance(stored, dict):
        return fields
    for name, entry in stored.items():
        if isinstance(entry, dict):
            fields[str(name)] = (str(entry.get("value")), str(entry.get("source")))
    return fields


def _hyperparameters(folder: Path | None, facts: Mapping[str, Any]) -> object:
    config = facts.get("config")
    if config or folder is None:
        return config
    # of a run that an older version, or the user's script, has recorded
    return read_run_file(folder, "config.json")


def _flat(value: object, prefix: str = "") -> dict[str, str]:
    """Return nested hyperparameters by dotted names, with hidden secrets."""
    if not isinstance(value, dict):
        return {}
    flat: dict[str, str] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        # An empty one is a value.
        if isinstance(item, dict) and item:
            flat |= _flat(item, f"{name}.")
            continue
        text = without_passwords(str(item))
        # A list, too; a number or a switch is no secret.
        if isinstance(item, str | list) and is_secret(name):
            text = HIDDEN
        flat[name] = text
    return flat


def _warnings(run_dir: Path) -> list[Warnings]:
    """Return the messages of all ranks with the level WARNING or above; equal ones once."""
    by_text: dict[tuple[str, str], Warnings] = {}
    for path in sorted((run_dir / "logs").glob("rank*.jsonl")):
        rank = parse_count(path.stem.removeprefix("rank"))
        for values in json_objects(path):
            level, message = str(values.get("level")), str(values.get("message"))
            # `logs/rank-old.jsonl` is not a rank's.
            if level not in _LEVELS or rank is None:
                continue
            # A message with a number in it is a new one in each step.
            if len(by_text) >= _MAX_WARNINGS and (level, message) not in by_text:
                continue
            entry = by_text.setdefault((level, message), Warnings(level, message))
            _count(entry, values, rank)
    return sorted(by_text.values(), key=lambda entry: entry.first_s)


def _count(entry: Warnings, values: Mapping[str, Any], rank: int) -> None:
    time_s, step = values.get("time"), values.get("step")
    if is_finite(time_s):
        entry.first_s = min(entry.first_s or time_s, time_s)
    if is_finite(step):
        entry.step = int(step)
    entry.count += 1
    entry.ranks.add(rank)
