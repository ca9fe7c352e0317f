"""Waits for the ranks of a launch on a cluster, and starts all of them again after a failure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import attrs

from faccel.checkpoint.preemption import Preemption
from faccel.errors import RankFailedError
from faccel.launching.ray_rank import Outcome
from faccel.runtime.excepthook import GRACE_S

_logger = logging.getLogger(__name__)


class Ranks(Protocol):
    """The running ranks of one attempt."""

    def wait(self, timeout_s: float | None) -> tuple[int, Outcome] | None:
        """Return the next rank that has ended, and how; None after the timeout."""
        ...

    def end(self, rank: int) -> None:
        """End the process of a rank, so that others do not wait for it."""
        ...


StartRanks = Callable[[int], AbstractContextManager[Ranks]]
"""`start(attempt)` starts all ranks. The end of the block ends those that still run."""


@attrs.frozen
class _Ended:
    """How an attempt ended: by a failure, a preemption, or the results of all ranks."""

    outcomes: Mapping[int, Outcome]
    # The rank whose failure caused the others; None if no rank failed.
    failed_rank: int | None
    is_preempted: bool


def results_of(start: StartRanks, world_size: int, max_restarts: int) -> list[bytes]:
    """Run all ranks until they have returned, and return their pickled results by rank.

    After a preemption with a saved checkpoint all ranks start again, without a limit.

    Effects: ambient. Starts the ranks, and logs a failure that leads to a restart.

    Args:
        start: Starts the ranks of an attempt.
        world_size: Number of ranks.
        max_restarts: How often all ranks start again after a failure.

    Raises:
        RankFailedError: A rank failed, and no restart is left.
    """
    attempt, restarts_left = 0, max_restarts
    while True:
        with start(attempt) as ranks:
            ended = _wait_for_all(ranks, world_size)
        attempt += 1  # also after a preemption: it numbers the starts
        # A failure is stronger than a saved checkpoint, which is stronger than success.
        if ended.failed_rank is None and not ended.is_preempted:
            return _results(ended.outcomes, world_size)
        if ended.failed_rank is None:
            _logger.warning("preempted: a checkpoint is saved; starting all ranks again")
            continue
        error = RankFailedError(
            f"rank {ended.failed_rank} of {world_size} failed",
            got=ended.outcomes[ended.failed_rank].error,
            fix=f"fix this error, or pass `max_restarts={max_restarts + 1}` to start all ranks "
            "again",
        )
        if restarts_left == 0:
            raise error
        restarts_left -= 1
        _logger.warning(
            "%s. Got %s\nrestarting all ranks; restarts left: %d",
            error.problem,
            error.got,
            restarts_left,
        )


def _wait_for_all(ranks: Ranks, world_size: int) -> _Ended:
    """Wait until all ranks have ended, or until it is clear which one failed."""
    outcomes: dict[int, Outcome] = {}  # in the order in which the ranks ended
    timeout_s = None
    while len(outcomes) < world_size:
        ended = ranks.wait(timeout_s)
        if ended is None:  # no other rank has failed, so the consequence is all there is
            break
        rank, outcome = ended
        outcomes[rank] = outcome
        if outcome.exit_code == 0:
            continue
        # It would keep its connections open, as a process that has ended does not.
        ranks.end(rank)
        if outcome.is_consequence:
            timeout_s = GRACE_S
        # Ranks save for different times, so a saved checkpoint ends none of the others.
        elif outcome.exit_code != Preemption.exit_code:
            break
    return _summary(outcomes)


def _summary(outcomes: Mapping[int, Outcome]) -> _Ended:
    is_preempted = False
    # In the order of `outcomes`, the first failure first.
    failures: list[int] = []
    for rank, outcome in outcomes.items():
        if outcome.exit_code == Preemption.exit_code:
            is_preempted = True
        elif outcome.exit_code != 0:
            failures.append(rank)
    causes = [rank for rank in failures if not outcomes[rank].is_consequence]
    if causes:
        return _Ended(outcomes, causes[0], is_preempted=False)
    # Ranks that waited for one that had saved and ended have not failed.
    if failures and not is_preempted:
        return _Ended(outcomes, failures[0], is_preempted=False)
    return _Ended(outcomes, None, is_preempted)


def _results(outcomes: Mapping[int, Outcome], world_size: int) -> list[bytes]:
    results: list[bytes] = []
    for rank in range(world_size):
        result = outcomes[rank].result
        assert result is not None  # its exit code is 0
        results.append(result)
    return results
