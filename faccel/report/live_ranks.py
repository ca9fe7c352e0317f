"""What the ranks of a run do, asked every few seconds while it trains."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import attrs

from faccel.observe import rank_file
from faccel.observe.ask import ask
from faccel.observe.sentences import of_many, ranks_text, state_of
from faccel.observe.snapshot import ANSWERED, Snapshot
from faccel.observe.verdict import BROKEN as RANKS_BROKEN
from faccel.observe.verdict import HUNG, SLOW, Verdict, verdict
from faccel.observe.waits import scene_at
from faccel.report.run_record import BROKEN, RUNNING

WINDOW_S = 0.2
"""How long the ranks are watched at a time: a stack costs a rank some ten microseconds."""
_INTERVAL_S = 0.02
_ASK_EVERY_S = 4.0
_NUM_VERDICTS = 5
_MIN_EQUAL = 3
# A launcher that restarts the ranks needs some seconds.
_RESTART_S = 15.0


@attrs.frozen
class RankRow:
    """What some ranks do.

    Args:
        label: The ranks.
        step: How many updates they have finished; None if they have not answered.
        activity: What they do, in a clause.
    """

    label: str
    step: int | None
    activity: str


class LiveRanks:
    """What the ranks of this node do, asked every few seconds.

    Args:
        run_dir: The run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.snapshots: Sequence[Snapshot] = ()
        self._run_dir = run_dir
        self._verdicts: deque[Verdict] = deque(maxlen=_NUM_VERDICTS)
        self._asked_s = -math.inf
        self._broken_since_s: float | None = None

    def ask(self, ranks: Sequence[Snapshot], now_s: float) -> None:
        """Ask the ranks, unless that was a moment ago.

        Effects: ambient. Each rank samples its main thread for 0.2 s.
        """
        can_answer = ANSWERED in map(attrgetter("status"), ranks)
        if not can_answer or now_s - self._asked_s < _ASK_EVERY_S:
            return
        self.snapshots = ask(str(self._run_dir), duration_s=WINDOW_S, interval_s=_INTERVAL_S)
        self._verdicts.append(verdict(self.snapshots))
        self._asked_s = now_s

    def problem(self, *, is_silent: bool) -> tuple[str, str] | None:
        """Return what is wrong with the ranks, and what to do; None if nothing is.

        Args:
            is_silent: Whether there was no step for long.
        """
        if not self._verdicts:
            return None
        last = self._verdicts[-1]
        # A short window sees chance, too: the same ranks must be slow repeatedly.
        equal = [v for v in self._verdicts if v.kind == SLOW and v.ranks == last.ranks]
        is_slow = last.kind == SLOW and len(equal) >= _MIN_EQUAL
        # Ranks that wait within a long step are no hang.
        is_hung = last.kind == HUNG and is_silent
        if is_slow or is_hung or last.kind == RANKS_BROKEN:
            return last.sentence, last.next_step
        return None

    def is_over(self, state: str, ranks: Sequence[Snapshot], now_s: float) -> bool:
        """Return whether the run has ended, and no launcher restarts it.

        Effects: ambient. Reads a file.
        """
        if state != BROKEN:
            self._broken_since_s = None
            return state != RUNNING
        if self._broken_since_s is None:
            self._broken_since_s = now_s
        # The launcher writes it when it gives up.
        launch = rank_file.read_launch(self._run_dir)
        ended_s = max(map(attrgetter("time_s"), ranks), default=0.0)
        if launch and launch["time_s"] >= ended_s:
            return True
        return now_s - self._broken_since_s > _RESTART_S


def rank_rows(
    ranks: Sequence[Snapshot], snapshots: Sequence[Snapshot], *, is_running: bool
) -> list[RankRow]:
    """Return one row per rank: its step, and what it did at the end of the window.

    Effects: pure.

    Args:
        ranks: The states of all ranks.
        snapshots: The ranks when they were asked; empty if they were not.
        is_running: Whether the run trains, so that what a rank did may be shown.
    """
    by_rank = dict(zip(map(attrgetter("rank"), snapshots), snapshots, strict=True))
    answered = {s.rank: s for s in snapshots if s.status == ANSWERED and s.moments}
    scene = None
    # At one time for all ranks: what they do together explains who waits.
    if answered and is_running:
        scene = scene_at(answered, min(s.moments[-1].time_s for s in answered.values()))
    rows: list[RankRow] = []
    for snapshot in ranks:
        rank = snapshot.rank
        # A rank of another node has no other activity than where it runs.
        activity = snapshot.reason or "runs"
        if scene is not None and rank in scene.activities and snapshot.status == ANSWERED:
            # The load of one moment may be that of the sampling itself.
            moments = answered[rank].moments
            is_idle = 2 * sum(map(attrgetter("is_idle"), moments)) > len(moments)
            site = _short_site(scene.activities[rank].site)
            activity = state_of(attrs.evolve(scene.activities[rank], is_idle=is_idle, site=site))
        step = None
        if rank in by_rank and is_running:
            step = by_rank[rank].step
        rows.append(RankRow(f"rank {rank}", step, activity))
    return rows


def _short_site(site: str) -> str:
    """Return a site with the last folder of its path: a row has one line."""
    return "/".join(site.split("/")[-2:])


def grouped(rows: Sequence[RankRow]) -> list[RankRow]:
    """Return one row for all ranks that do the same, the largest group first.

    Effects: pure.

    Examples:
        >>> rows = [RankRow(f"rank {rank}", 7, "waits in reduce (a.py:5)") for rank in range(3)]
        >>> grouped([*rows, RankRow("rank 3", 6, "computes in forward (a.py:3)")])[0]
        RankRow(label='ranks 0-2', step=7, activity='wait in reduce (a.py:5)')
    """
    members: dict[str, list[RankRow]] = {}
    for row in rows:
        members.setdefault(row.activity, []).append(row)
    result: list[RankRow] = []
    for activity, same in sorted(members.items(), key=lambda item: -len(item[1])):
        numbers = [int(row.label.rpartition(" ")[2]) for row in same]
        steps = [row.step for row in same if row.step is not None]
        if len(same) > 1:
            activity = of_many(activity)
        result.append(RankRow(ranks_text(numbers, {}), min(steps, default=None), activity))
    return result
