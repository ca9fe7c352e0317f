"""Traces of ranks in Chrome's format, and one trace of all of them for Perfetto."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import attrs

from faccel.tracking.spans import SPANS, Interval, intervals_of

Event = dict[str, Any]
_GZIP_LEVEL = 6
# Flow events of all ranks have different identities, and fewer than this each.
_FLOWS_PER_RANK = 10**9
_NAME = re.compile(r'^( *"name": )"(.*)"(?=,$)', re.M)


@attrs.frozen(eq=False)
class RankTrace:
    """The trace of a rank.

    Args:
        rank: The rank.
        host: The name of its node.
        base_ns: The time on the clock of rank 0 to which the events refer.
        events: Events of Chrome's format; the process of each is the rank.
    """

    rank: int
    host: str
    base_ns: int
    events: Sequence[Event]


def rank_folder(path: Path) -> Path:
    """Return the folder of the traces of the ranks of a profile.

    Effects: pure.
    """
    return path.with_name(f"{path.name}.ranks")


def rank_file(path: Path, rank: int) -> Path:
    """Return the file of a rank.

    Effects: pure.
    """
    return rank_folder(path) / f"rank-{rank:05}.json.gz"


def read_torch(path: Path) -> dict[str, Any]:
    """Return a trace that torch.profiler has written.

    Effects: ambient. Reads the file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return json.loads(text, strict=False)
    except ValueError:
        # PyTorch 2.13 removes line breaks from names, but does not escape quotes.
        return json.loads(_NAME.sub(_with_escapes, text), strict=False)


def _with_escapes(match: re.Match[str]) -> str:
    return f"{match[1]}{json.dumps(match[2])}"


def from_torch(
    documents: Sequence[Mapping[str, Any]], rank: int, host: str, offset_ns: int
) -> tuple[RankTrace, dict[str, list[Interval]]]:
    """Return the trace of a rank from those that torch.profiler has written, and its spans.

    Effects: pure.

    Args:
        documents: One for each cycle of the schedule.
        rank: The rank.
        host: The name of its node.
        offset_ns: What is added to its clock for that of rank 0.
    """
    if not documents:
        return RankTrace(rank, host, 0, ()), {}
    base_ns = min(map(_start_ns, documents))
    tracks = _Tracks(rank)
    events: list[Event] = []
    for document in documents:
        shift_us = (document["baseTimeNanoseconds"] - base_ns) / 1000
        for event in document["traceEvents"]:
            moved = tracks.moved(event, shift_us)
            if moved is not None:
                events.append(moved)
    intervals = intervals_of(event for event in events if event["ph"] == "X")
    events += tracks.names()
    events += _span_events(intervals, rank)
    return RankTrace(rank, host, base_ns + offset_ns, events), intervals


def _start_ns(document: Mapping[str, Any]) -> int:
    """Return when the first event has begun."""
    # Relative times are small: torch's are microseconds since some weeks ago.
    starts_us = [event["ts"] for event in document["traceEvents"] if event["ph"] != "M"]
    return document["baseTimeNanoseconds"] + int(min(starts_us, default=0) * 1000)


class _Tracks:
    """Numbers the threads of a process and the streams of its devices."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._number_of: dict[tuple[object, object], int] = {}
        self._names: dict[tuple[object, object], str] = {}

    def moved(self, event: Event, shift_us: float) -> Event | None:
        """Return an event in the process of the rank; None for one that only names something."""
        key = (event.get("pid"), event.get("tid"))
        if event["ph"] == "M":
            if event["name"] == "thread_name":
                self._names[key] = event["args"]["name"]
            return None
        # The profiler's marks are on processes that are no numbers.
        if not isinstance(key[0], int):
            return None
        # The first numbers are those of the spans.
        track = self._number_of.setdefault(key, len(SPANS) + 1 + len(self._number_of))
        moved = {**event, "pid": self._rank, "tid": track, "ts": event["ts"] + shift_us}
        if "id" in moved and isinstance(moved["id"], int):
            moved["id"] += self._rank * _FLOWS_PER_RANK
        return moved

    def names(self) -> Iterator[Event]:
        """Yield the events that name the tracks."""
        for key, number in self._number_of.items():
            name = self._names.get(key, f"thread {key[1]}")
            yield from _track(self._rank, number, name)


def _track(rank: int, number: int, name: str) -> Iterator[Event]:
    place = {"ph": "M", "ts": 0, "pid": rank, "tid": number}
    yield {**place, "name": "thread_name", "args": {"name": name}}
    yield {**place, "name": "thread_sort_index", "args": {"sort_index": number}}


def _span_events(intervals: Mapping[str, Sequence[Interval]], rank: int) -> Iterator[Event]:
    """Yield a track for each span: ranges of one track must not overlap, and spans do."""
    # Perfetto takes the track 0 of a process for the one with the number of the process.
    for number, span in enumerate(SPANS, start=1):
        if span not in intervals:
            continue
        yield from _track(rank, number, span)
        for start, end in intervals[span]:
            duration = round(end - start, 3)
            place = {"pid": rank, "tid": number, "ts": start, "dur": duration}
            yield {"ph": "X", "cat": "faccel", "name": span, **place}


def write_rank(trace: RankTrace, path: Path) -> None:
    """Write the trace of a rank.

    Effects: ambient. Writes the file.

    Raises:
        OSError: It cannot be written.
    """
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=_GZIP_LEVEL) as file:
        json.dump(attrs.asdict(trace, recurse=False), file)


def read_rank(path: Path) -> RankTrace:
    """Read the trace of a rank.

    Effects: ambient. Reads the file.

    Raises:
        OSError: It is missing or incomplete.
        ValueError: It is not such a file.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return RankTrace(**json.load(file))
    except (TypeError, EOFError) as error:
        raise ValueError(f"{path} is not the complete trace of a rank") from error


def merge(path: Path, ranks: Sequence[int], start_ns: int) -> dict[int, str]:
    """Write one trace from the files of some ranks, and remove them if none is missing.

    Effects: ambient. Writes the file.

    Args:
        path: The file that is written, compressed if its name ends in `.gz`.
        ranks: The ranks.
        start_ns: The time of the first event of all ranks, which is 0 in the file: Perfetto drops
            events before 0. Absolute microseconds have too many digits for a float.

    Returns:
        Why the trace of a rank is missing, by rank.

    Raises:
        OSError: The file cannot be written.
    """
    missing: dict[int, str] = {}
    temporary = path.with_name(f"{path.name}.new")
    with _open_text(temporary, is_compressed=path.suffix == ".gz") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        separator = "\n"
        # One rank at a time: the events of all of them may not fit into the memory.
        for rank in ranks:
            try:
                trace = read_rank(rank_file(path, rank))
            except (OSError, ValueError) as error:
                missing[rank] = str(error)
                continue
            for event in _events_of(trace, start_ns):
                file.write(separator + json.dumps(event))
                separator = ",\n"
        file.write("\n]}\n")
    os.replace(temporary, path)
    if not missing:
        _remove(path, ranks)
    return missing


def _open_text(path: Path, *, is_compressed: bool) -> TextIO:
    if is_compressed:
        return gzip.open(path, "wt", encoding="utf-8", compresslevel=_GZIP_LEVEL)
    return path.open("w", encoding="utf-8")


def _events_of(trace: RankTrace, start_ns: int) -> Iterator[Event]:
    place = {"ph": "M", "ts": 0, "pid": trace.rank, "tid": 0}
    name = f"rank {trace.rank} ({trace.host})"
    yield {**place, "name": "process_name", "args": {"name": name}}
    yield {**place, "name": "process_sort_index", "args": {"sort_index": trace.rank}}
    shift_us = (trace.base_ns - start_ns) / 1000
    for event in trace.events:
        if event["ph"] == "M":
            yield event
        else:
            yield {**event, "ts": round(event["ts"] + shift_us, 3)}


def _remove(path: Path, ranks: Sequence[int]) -> None:
    for rank in ranks:
        rank_file(path, rank).unlink(missing_ok=True)
    folder = rank_folder(path)
    if not any(folder.iterdir()):
        folder.rmdir()
