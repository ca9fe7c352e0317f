"""The verdict about a run that does not move, or that is slow: which rank, phase and line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import attrs

from faccel.observe.arrivals import delays_of, num_repeated
from faccel.observe.phases import phase_of, site_of
from faccel.observe.sentences import NEXT_STEPS, of_many, place_of, ranks_text, state_of
from faccel.observe.snapshot import (
    ANSWERED,
    CONSEQUENCE,
    DEAD,
    FAILED,
    FINISHED,
    FOREIGN,
    MISSING,
    REMOTE,
    SILENT,
    Snapshot,
)
from faccel.observe.waits import Activity, Scene, scene_at

_NUM_SCENES = 200
# A rank is slow if the others wait for it for this part of the time, and much less for other ranks:
# of ranks that are equally fast, each is the last one now and then.
_MIN_SHARE = 0.1
_MIN_RATIO = 3.0

HUNG = "hung"
SLOW = "slow"
EVEN = "even"
ENDED = "ended"
BROKEN = "broken"


@attrs.frozen
class Verdict:
    """Why a run does not move, or why it is slow.

    Args:
        kind: `HUNG`, `SLOW`, `EVEN` (no rank is slower than the others), `BROKEN` (a rank has
            died, failed, or does not answer) or `ENDED`.
        ranks: The ranks that the others wait for.
        phase: The phase in which they are, empty if that is unknown.
        site: Their line, empty if that is unknown.
        sentence: All of that in one sentence.
        evidence: What it follows from.
        next_step: What to do.
    """

    kind: str
    ranks: tuple[int, ...]
    phase: str
    site: str
    sentence: str
    evidence: tuple[str, ...] = ()
    next_step: str = ""

    @property
    def rank(self) -> int | None:
        """The first rank that the others wait for, None without one."""
        if self.ranks:
            return self.ranks[0]
        return None


def verdict(snapshots: Sequence[Snapshot]) -> Verdict:
    """Return why a run does not move, or why it is slow.

    Effects: pure.

    Args:
        snapshots: One of each rank of the run.
    """
    by_rank = {snapshot.rank: snapshot for snapshot in snapshots}
    answered = {s.rank: s for s in snapshots if s.status == ANSWERED and s.moments}
    scenes = _scenes(answered)
    result = _of_broken(by_rank, scenes)
    if result is None:
        has_moved = any(snapshot.has_moved for snapshot in answered.values())
        if has_moved:
            result = _of_moving(answered, by_rank, scenes)
        else:
            result = _of_hang(answered, by_rank, scenes)
    evidence = result.evidence + _evidence(by_rank, scenes)
    return attrs.evolve(result, evidence=evidence)


def _scenes(answered: Mapping[int, Snapshot]) -> list[Scene]:
    """Return what the ranks do, at equal distances over the time that all of them cover."""
    # Each rank has its times. Between two moments it does what it did at the first one.
    if not answered:
        return []
    start_s = max(snapshot.moments[0].time_s for snapshot in answered.values())
    end_s = min(snapshot.moments[-1].time_s for snapshot in answered.values())
    step_s = max(end_s - start_s, 0.0) / _NUM_SCENES
    scenes: list[Scene] = []
    for number in range(_NUM_SCENES + 1):
        scene = scene_at(answered, start_s + number * step_s)
        if scene is not None:
            scenes.append(scene)
    return scenes


# The first status that a rank has is the cause: a rank fails because another one has died.
_CAUSES = (FAILED, DEAD, CONSEQUENCE, SILENT, FOREIGN, MISSING)


def _of_broken(by_rank: Mapping[int, Snapshot], scenes: Sequence[Scene]) -> Verdict | None:
    """Return the verdict about ranks that have not answered, None if all have."""
    for status in _CAUSES:
        snapshots = [snapshot for snapshot in by_rank.values() if snapshot.status == status]
        if snapshots:
            return _of_cause(snapshots, by_rank, scenes)
    statuses = {snapshot.status for snapshot in by_rank.values()}
    if statuses == {FINISHED}:
        return Verdict(ENDED, (), "", "", "the run has ended: every rank has closed its context")
    return None


def _of_cause(
    snapshots: Sequence[Snapshot], by_rank: Mapping[int, Snapshot], scenes: Sequence[Scene]
) -> Verdict:
    """Return the verdict about ranks of one status that is the cause."""
    in_order = sorted(snapshots, key=lambda snapshot: (snapshot.time_s, snapshot.rank))
    first = in_order[0]
    phase = site = ""
    if first.moments:  # of a process that has not answered: from its signal handler
        stack = first.moments[-1].stack
        phase, site = phase_of(stack), site_of(stack)
    # Ranks that are missing or silent are equal, but of those that failed the first is the cause.
    ranks = tuple(snapshot.rank for snapshot in in_order)
    if first.status in (FAILED, CONSEQUENCE):
        ranks = (first.rank,)
    reason = first.reason
    if len(ranks) > 1:
        reason = of_many(reason)
    sentence = f"{ranks_text(ranks, by_rank)} {reason}"
    if scenes:
        sentence += _waiting_clause(scenes[-1], ranks, by_rank)
    return Verdict(BROKEN, ranks, phase, site, sentence, (), NEXT_STEPS[first.status])


def _waiting_clause(
    scene: Scene, causes: Iterable[int], by_rank: Mapping[int, Snapshot], *, pronoun: str = "it"
) -> str:
    """Return which ranks wait, as the second half of a sentence, or nothing."""
    ranks = sorted(scene.waiting - set(causes))
    if not ranks:
        return ""
    # They may wait at several lines; the sentence has room for one call.
    calls = Counter(scene.activities[rank].call for rank in ranks)
    call = calls.most_common(1)[0][0]
    clause = f"waits for {pronoun} in {call} of step {by_rank[ranks[0]].step + 1}"
    if len(ranks) > 1:
        clause = of_many(clause)
    return f", {ranks_text(ranks, by_rank)} {clause}"


def _of_hang(
    answered: Mapping[int, Snapshot], by_rank: Mapping[int, Snapshot], scenes: Sequence[Scene]
) -> Verdict:
    """Return the verdict about ranks of which none has begun a collective in the window."""
    if not scenes:
        remote = [snapshot for snapshot in by_rank.values() if snapshot.status == REMOTE]
        hosts = sorted({snapshot.host for snapshot in remote})
        sentence = f"no rank runs on this node; its ranks are on {', '.join(hosts)}"
        return Verdict(BROKEN, (), "", "", sentence, (), NEXT_STEPS[REMOTE])
    scene = scenes[-1]
    is_computing = any(not activity.is_idle for activity in scene.activities.values())
    # One process, or a step that is longer than the window: no rank keeps another one.
    if is_computing and not scene.waiting:
        return _of_even(scenes)
    # Without a late rank the others wait in the store, as in the body of `main_first`.
    causes = scene.causes or frozenset(scene.activities) - scene.waiting
    if causes:
        return _of_causes(sorted(causes), scene, scenes, by_rank)
    if any(snapshot.status == REMOTE for snapshot in by_rank.values()):
        sentence = "every rank of this node waits for a rank of another one"
        sentence += _waiting_clause(scene, (), by_rank).replace(",", ":", 1)
        return Verdict(HUNG, (), "", "", sentence, (), NEXT_STEPS[REMOTE])
    return _of_disagreement(answered, by_rank, scene)


def _of_causes(
    causes: Sequence[int],
    scene: Scene,
    scenes: Sequence[Scene],
    by_rank: Mapping[int, Snapshot],
) -> Verdict:
    # The load of one moment may be that of the sampling itself.
    num_idle = sum(other.activities[causes[0]].is_idle for other in scenes)
    is_idle = 2 * num_idle > len(scenes)
    activity = attrs.evolve(scene.activities[causes[0]], is_idle=is_idle)
    clause, pronoun = state_of(activity), "it"
    if len(causes) > 1:
        clause, pronoun = of_many(clause), "them"
    sentence = f"{ranks_text(causes, by_rank)} {clause}"
    sentence += _waiting_clause(scene, causes, by_rank, pronoun=pronoun)
    next_step = NEXT_STEPS[activity.phase]
    return Verdict(HUNG, tuple(causes), activity.phase, activity.site, sentence, (), next_step)


def _of_disagreement(
    answered: Mapping[int, Snapshot], by_rank: Mapping[int, Snapshot], scene: Scene
) -> Verdict:
    """Return the verdict about ranks that all wait in collectives."""
    ranks_of: dict[tuple[str, str], list[int]] = {}
    for rank, activity in sorted(scene.activities.items()):
        ranks_of.setdefault((activity.call, activity.site), []).append(rank)
    # Equal calls of different lines are one collective: `if` and `else` may both have it.
    if len(ranks_of) == 1 or (len(_calls(scene)) == 1 and not any(scene.waits_for.values())):
        activity = scene.activities[min(scene.activities)]
        sentence = f"every rank waits in {activity.call} ({activity.site}), which does not end"
        return Verdict(HUNG, (), activity.phase, activity.site, sentence, (), NEXT_STEPS["network"])
    # The fewest ranks make another call than the others. Of equally many, those that break the
    # order of the steps before, and else those that came last.
    odd = min(
        ranks_of.values(),
        key=lambda ranks: (
            len(ranks),
            num_repeated(answered[ranks[0]]),
            -_arrival(answered[ranks[0]]),
        ),
    )
    activity = scene.activities[odd[0]]
    others = scene.activities[min(set(scene.activities) - set(odd))]
    clause = f"waits in {activity.call} ({activity.site}) and did not call"
    if len(odd) > 1:
        clause = of_many(clause)
    sentence = f"{ranks_text(odd, by_rank)} {clause} {others.call} ({others.site})"
    sentence += _waiting_clause(scene, odd, by_rank)
    return Verdict(
        HUNG,
        tuple(odd),
        activity.phase,
        activity.site,
        sentence,
        (),
        NEXT_STEPS["disagree"],
    )


def _calls(scene: Scene) -> set[str]:
    return {activity.call for activity in scene.activities.values()}


def _arrival(snapshot: Snapshot) -> float:
    """Return when a rank began its last collective, 0 if that was not recorded."""
    times = [max(group.arrivals.values(), default=0.0) for group in snapshot.groups.values()]
    return max(times, default=0.0)


def _of_moving(
    answered: Mapping[int, Snapshot], by_rank: Mapping[int, Snapshot], scenes: Sequence[Scene]
) -> Verdict:
    """Return the verdict about a run that moves: the rank that the others wait for the most."""
    # A rank on which no other one waits costs no time, however long its phases take.
    counts: Counter[int] = Counter()
    for scene in scenes:
        counts.update(scene.causes)
    shares = {rank: counts[rank] / len(scenes) for rank in sorted(answered)}
    slowest = max(shares, key=lambda rank: shares[rank])
    others = [share for rank, share in shares.items() if rank != slowest]
    limit = max(_MIN_SHARE, _MIN_RATIO * max(others, default=0.0))
    if len(answered) < 2 or shares[slowest] < limit:
        return _of_even(scenes)
    activity = _usual_activity(slowest, scenes)
    sentence = (
        f"rank {slowest} is slow in {place_of(activity)}: the others wait for it "
        f"{shares[slowest]:.0%} of the time"
    )
    evidence: list[str] = []
    delays = delays_of(slowest, answered)
    if delays.num_collectives:
        evidence.append(
            f"rank {slowest} began the {delays.num_collectives} collectives of "
            f"{_seconds(answered)} {delays.total_s * 1e3:.0f} ms after the first rank, in total"
        )
    return Verdict(
        SLOW,
        (slowest,),
        activity.phase,
        activity.site,
        sentence,
        tuple(evidence),
        NEXT_STEPS[activity.phase],
    )


def _usual_activity(rank: int, scenes: Sequence[Scene]) -> Activity:
    """Return what a rank does most of the time in which other ranks wait for it."""
    phases: Counter[str] = Counter()
    activities: Counter[Activity] = Counter()
    for scene in scenes:
        if rank in scene.causes:
            activity = scene.activities[rank]
            phases[activity.phase] += 1
            activities[activity] += 1
    # First the phase: many lines of one phase may be the reason together.
    phase = phases.most_common(1)[0][0]
    return next(a for a, _ in activities.most_common() if a.phase == phase)


def _of_even(scenes: Sequence[Scene]) -> Verdict:
    """Return the verdict about ranks that are equally fast: where they spend their time."""
    phases: Counter[str] = Counter()
    for scene in scenes:
        phases.update(activity.phase for activity in scene.activities.values())
    shares = [f"{phase} {count / phases.total():.0%}" for phase, count in phases.most_common()]
    phase = phases.most_common(1)[0][0]
    sentence = f"the run moves, and no rank is slower than the others: {', '.join(shares)}"
    return Verdict(EVEN, (), phase, "", sentence)


def _seconds(answered: Mapping[int, Snapshot]) -> str:
    moments = answered[min(answered)].moments
    return f"{moments[-1].time_s - moments[0].time_s:.1f} s"


def _evidence(by_rank: Mapping[int, Snapshot], scenes: Sequence[Scene]) -> tuple[str, ...]:
    """Return one line for each group of ranks that do the same, with the most common first."""
    ranks_of: dict[str, list[int]] = {}
    for rank, snapshot in sorted(by_rank.items()):
        clause = snapshot.reason or snapshot.status
        if scenes and rank in scenes[-1].activities:
            clause = _usual_clause(rank, scenes)
        if snapshot.loader:
            clause += f"; {snapshot.loader}"
        ranks_of.setdefault(clause, []).append(rank)
    lines: list[str] = []
    for clause, ranks in sorted(ranks_of.items(), key=lambda item: (-len(item[1]), item[1])):
        if len(ranks) > 1:
            clause = of_many(clause)
        lines.append(f"{ranks_text(ranks, by_rank)}: {clause}")
    return tuple(lines)


def _usual_clause(rank: int, scenes: Sequence[Scene]) -> str:
    """Return what a rank does most of the time, with its part of the time."""
    counts: Counter[str] = Counter()
    for scene in scenes:
        activity = scene.activities[rank]
        # Of lines of one phase, the load at a moment is chance.
        counts[state_of(attrs.evolve(activity, is_idle=False))] += 1
    clause, count = counts.most_common(1)[0]
    clause = clause.replace("computes in", "is in", 1)
    if count < len(scenes):
        clause += f" {count / len(scenes):.0%} of the time"
    return clause
