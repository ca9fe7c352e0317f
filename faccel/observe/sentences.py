"""The words of a verdict: places, ranks with their mesh axis, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from faccel.observe.phases import (
    BACKWARD,
    CHECKPOINT,
    COLLECTOR,
    DATA,
    FORWARD,
    OPTIMIZER,
    SCRIPT,
    START,
)
from faccel.observe.snapshot import (
    CONSEQUENCE,
    DEAD,
    FAILED,
    FOREIGN,
    MISSING,
    REMOTE,
    SILENT,
    Snapshot,
)
from faccel.observe.waits import Activity

_PLACES = {
    DATA: "the DataLoader",
    FORWARD: "forward",
    BACKWARD: "backward",
    OPTIMIZER: "the optimizer",
    CHECKPOINT: "the checkpoint",
    COLLECTOR: "the garbage collection",
    START: "faccel.init",
    SCRIPT: "the script",
}
_VERBS_OF_MANY = {
    "waits": "wait",
    "computes": "compute",
    "is": "are",
    "has": "have",
    "does": "do",
    "runs": "run",
    "was": "were",
}
NEXT_STEPS = {
    DATA: "read less on that rank, or give the DataLoader more workers (`num_workers`)",
    FORWARD: "look at that line: ranks must do equal work in forward; compare batch shapes",
    BACKWARD: "look at that line: a hook or a `Function` of this rank does more than the others'",
    OPTIMIZER: "look at that line: every rank must do equal work in an update",
    CHECKPOINT: "check the disk of that rank, or save in the background with "
    "`faccel.save(..., wait=False)`",
    COLLECTOR: "call `gc.freeze()` before the loop, or `gc.disable()` in it and `gc.collect()` "
    "on all ranks at the same step",
    START: "check that the launcher has started every rank, and that they reach `faccel.init`",
    SCRIPT: "look at that line: it runs on that rank, or takes longer there",
    DEAD: "read the output of that rank; a process without an error was killed, often for memory "
    "(`dmesg -T | grep -i kill`)",
    FAILED: "fix that error",
    CONSEQUENCE: "read the output of the other ranks",
    SILENT: "run `py-spy dump --native --pid PID` with its pid",
    FOREIGN: "run `faccel why` as the user of the run",
    MISSING: "check that the launcher has started it, and that its script reaches `faccel.init`",
    REMOTE: "run `faccel why` on that node",
    "disagree": "call the same collectives on every rank; look for an `if ctx.is_main` around the "
    "line",
    "network": "check the network between the ranks, and `faccel test`",
}


def ranks_text(ranks: Sequence[int], by_rank: Mapping[int, Snapshot]) -> str:
    """Return ranks as text, with the index of the mesh that only they have.

    Effects: pure.

    Examples:
        >>> four = {rank: Snapshot(rank, coordinates={"tp": rank // 2}) for rank in range(4)}
        >>> ranks_text([2, 3], four), ranks_text([0], four), ranks_text([0, 2, 3], four)
        ('ranks 2-3 (tp=1)', 'rank 0', 'ranks 0, 2-3')
    """
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    text = f"ranks {_runs(sorted(ranks))}"
    axis = _common_index(set(ranks), by_rank)
    if axis:
        text = f"{text} ({axis})"
    return text


def _runs(ranks: Sequence[int]) -> str:
    """Return sorted numbers with runs of them as `first-last`."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words: list[str] = []
    for run in runs:
        word = str(run[0])
        if len(run) > 1:
            word = f"{run[0]}-{run[-1]}"
        words.append(word)
    return ", ".join(words)


def _common_index(ranks: set[int], by_rank: Mapping[int, Snapshot]) -> str:
    """Return `axis=index` if exactly these ranks have that index, else nothing."""
    # An index that all ranks have explains nothing.
    if ranks == set(by_rank):
        return ""
    first = by_rank.get(min(ranks))
    if first is None:
        return ""
    for axis, index in first.coordinates.items():
        having = {s.rank for s in by_rank.values() if s.coordinates.get(axis) == index}
        if having == ranks:
            return f"{axis}={index}"
    return ""


def place_of(activity: Activity) -> str:
    """Return where a rank is, as the end of a clause: `"backward (train.py:41)"`.

    Effects: pure.
    """
    return f"{_PLACES[activity.phase]} ({activity.site})"


def state_of(activity: Activity) -> str:
    """Return a clause about what a rank does: waiting, computing, or in a collective.

    Effects: pure.
    """
    if activity.call:
        return f"waits in {activity.call} ({activity.site})"
    # The collector computes, but the reason is that it runs at all.
    verb = "computes"
    if activity.phase == COLLECTOR:
        verb = "is"
    elif activity.is_idle:
        verb = "waits"
    return f"{verb} in {place_of(activity)}"


def of_many(clause: str) -> str:
    """Return a clause about one rank as one about several.

    Effects: pure.

    Examples:
        >>> of_many("waits in reduce (train.py:5)"), of_many("failed: ValueError")
        ('wait in reduce (train.py:5)', 'failed: ValueError')
    """
    verb, _, words = clause.partition(" ")
    return f"{_VERBS_OF_MANY.get(verb, verb)} {words}"
