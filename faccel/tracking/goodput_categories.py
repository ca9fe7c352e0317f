"""Goodput: the part of the time of a run, restarts included, in which it trained what it kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from faccel.checks import integer
from faccel.errors import ConfigError

Event = Mapping[str, Any]
"""A line of the journal: the name of the event, its time, and all counts of the process so far."""

_COUNTS = ("num_steps", "num_skipped")
# The categories of a journal. The time of a lost step is one of the last three.
_TIMES = ("startup_s", "checkpoint_s", "evaluation_s", "useful_s", "data_wait_s", "skipped_s")
_LOSABLE = (*_COUNTS, "useful_s", "data_wait_s", "skipped_s")


@attrs.frozen
class Goodput:
    """How a rank has spent the time of a run; the categories add up to `wall_s`.

    Args:
        wall_s: Seconds from the first `init` to the last event of the run.
        useful_s: Steps whose results the run has kept.
        startup_s: From `init` to the end of the first step of each process, which compiles, and
            from its last step to its end.
        data_wait_s: Waits in `next` of the loaders of `shard`.
        checkpoint_s: `save` and `load`, as long as the loop waits for them.
        evaluation_s: Inside of `phase("evaluation", ctx)`.
        skipped_s: Steps whose update was skipped, as after an overflow in fp16.
        lost_s: Steps after the checkpoint from which the next process resumed, with their waits for
            data and their skips.
        down_s: From the last event of a process to the next `init`: the step in which it was
            killed, the restart, and imports.
        num_steps: Steps that the run has kept, skipped ones included.
        num_skipped: Skipped steps among them.
        num_lost: Steps that were lost.
        num_restarts: Number of processes after the first one.
    """

    wall_s: float
    useful_s: float
    startup_s: float
    data_wait_s: float
    checkpoint_s: float
    evaluation_s: float
    skipped_s: float
    lost_s: float
    down_s: float
    num_steps: int
    num_skipped: int
    num_lost: int
    num_restarts: int

    @property
    def fraction(self) -> float:
        """The useful part of the wall time, between 0 and 1."""
        if self.wall_s == 0:
            return 0.0
        return self.useful_s / self.wall_s


@attrs.define
class _Piece:
    """Successive steps of one process that the run has kept, as its counts before and after them.

    Args:
        process: Number of the process.
        first: The counts before the first step.
        last: The counts after the last step.
    """

    process: int
    first: Event
    last: Event


class _Timeline:
    """The events of one rank in order, and which of its steps the run has kept."""

    def __init__(self) -> None:
        self.num_processes = 0
        self.down_s = 0.0
        self.wall_s = 0.0
        self.process_began_s = self.ended_s = 0.0
        self.totals = dict.fromkeys((*_COUNTS, *_TIMES), 0.0)
        self.pieces: list[_Piece] = []
        # Where each checkpoint was saved: the process, and its counts at that time.
        self._saved: dict[int, tuple[int, Event]] = {}
        self._last: Event = {}
        # The step from which the next step continues; None for the one before it.
        self._resumed: int | None = None
        self._is_new = False

    def add(self, event: Event) -> None:
        """Add the next event."""
        # A file that has lost its beginning, as after a power failure: without the start of its
        # process an event has no time that could be counted.
        if not self.num_processes and event["event"] != "start":
            return
        # Steps first: a checkpoint is saved after the last step that it contains.
        if event["event"] == "start":
            self._start(event)
            self._last = event
        if event["num_steps"] > self._last["num_steps"]:
            self._add_steps(event)
        if event["event"] == "saved":
            self._saved[event["step"]] = (self.num_processes, event)
        if event["event"] == "loaded":
            # Only a load that is followed by a step continues from it: others evaluate.
            self._resumed = event["step"]
            self._is_new = True
        self._last = event
        self.ended_s = event["time"]

    def end_process(self) -> None:
        """Add the counts of the process whose last event was added."""
        if not self.num_processes:
            return
        # Each process counts from 0.
        for name in self.totals:
            self.totals[name] += self._last[name]
        process_s = self._last["time"] - self.process_began_s
        self.wall_s += process_s
        spent_s = sum(self._last[name] for name in _TIMES)
        # After the last step, or before the first one.
        self.totals["startup_s"] += process_s - spent_s

    def _start(self, event: Event) -> None:
        self.end_process()
        if self.num_processes:
            # The clock of a node may have been set back meanwhile.
            self.down_s += max(event["started"] - self.ended_s, 0.0)
        self.process_began_s = event["started"]
        self.num_processes += 1
        # Without a load, it starts from scratch.
        self._resumed = None
        self._is_new = True

    def _add_steps(self, event: Event) -> None:
        # Not at the load itself: a process may be killed before it trains, or only evaluate.
        if self._is_new:
            self._drop_lost_pieces()
            self.pieces.append(_Piece(self.num_processes, self._last, event))
            self._is_new = False
        self.pieces[-1].last = event

    def _drop_lost_pieces(self) -> None:
        """Keep the steps up to the checkpoint from which the next step continues."""
        # Processes count from 1: before process 0 there is nothing to keep.
        process, saved = 0, None
        if self._resumed is not None:
            process, saved = self._saved.get(self._resumed, (0, None))
        remaining: list[_Piece] = []
        # Pieces are in the order of time: a checkpoint cuts one of them, and later ones are lost.
        for piece in self.pieces:
            if piece.process < process:
                remaining.append(piece)
            if piece.process == process and saved is not None:
                remaining.extend(_up_to(saved, piece))
        self.pieces = remaining


def _up_to(saved: Event, piece: _Piece) -> list[_Piece]:
    """Return the steps of a piece before a checkpoint of its process: none, all, or a part."""
    if saved["num_steps"] >= piece.last["num_steps"]:
        return [piece]
    if saved["num_steps"] > piece.first["num_steps"]:
        return [_Piece(piece.process, piece.first, saved)]
    return []


def goodput(events: Sequence[Event], *, rank: int = 0) -> Goodput:
    """Return how a rank has spent the time of a run, over all of its restarts.

    Effects: pure.

    A process that starts without `load` has lost all steps before it. A `load` after which no step
    follows loses nothing. Events before the first "start" of the rank are left out.

    Args:
        events: From `read_journal`.
        rank: Whose time; ranks differ in their waits for data.

    Raises:
        ConfigError: The rank has no events.

    Examples:
        >>> counts = {"num_skipped": 0, "startup_s": 3.0, "skipped_s": 0.0, "data_wait_s": 1.0}
        >>> counts |= {"checkpoint_s": 0.0, "evaluation_s": 0.0, "rank": 0}
        >>> none = dict.fromkeys(counts, 0.0) | {"num_steps": 0, "useful_s": 0.0}
        >>> start = none | {"event": "start", "time": 10.0, "started": 10.0}
        >>> last = counts | {"event": "step", "time": 20.0, "num_steps": 7, "useful_s": 6.0}
        >>> result = goodput([start, last])
        >>> result.wall_s, result.fraction, result.num_steps
        (10.0, 0.6, 7)
    """
    integer("rank", rank, at_least=0)
    timeline = _Timeline()
    for event in events:
        if event["rank"] == rank:
            timeline.add(event)
    timeline.end_process()
    if not timeline.num_processes:
        raise ConfigError(
            "`events` has none of this rank",
            got=f"{len(events)} events, rank={rank}",
            fix='write `goodput(read_journal(f"{ctx.config.run_dir}/name"))`',
        )
    useful = dict.fromkeys(_LOSABLE, 0.0)
    for piece in timeline.pieces:
        for name in _LOSABLE:
            useful[name] += piece.last[name] - piece.first[name]
    totals = timeline.totals
    # What the pieces do not have is lost.
    lost_s = sum(totals[name] - useful[name] for name in ("useful_s", "data_wait_s", "skipped_s"))
    return Goodput(
        wall_s=timeline.wall_s + timeline.down_s,
        useful_s=useful["useful_s"],
        startup_s=totals["startup_s"],
        data_wait_s=useful["data_wait_s"],
        checkpoint_s=totals["checkpoint_s"],
        evaluation_s=totals["evaluation_s"],
        skipped_s=useful["skipped_s"],
        lost_s=lost_s,
        down_s=timeline.down_s,
        num_steps=int(useful["num_steps"]),
        num_skipped=int(useful["num_skipped"]),
        num_lost=int(totals["num_steps"] - useful["num_steps"]),
        num_restarts=timeline.num_processes - 1,
    )
