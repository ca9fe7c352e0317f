"""Lets all ranks of a simulation leave their collectives together, and communicate again."""

from __future__ import annotations

from faccel.testing.world import World


class SimulatedRecovery:
    """The `Recovery` of a rank of a simulation.

    Args:
        world: The simulation.
        rank: The rank.
        num_ranks: Ranks of the world.
    """

    def __init__(self, world: World, rank: int, num_ranks: int) -> None:
        self._world = world
        self._rank = rank
        self._num_ranks = num_ranks
        self._num_rounds = 0
        self.is_active = False

    def interrupt(self) -> None:
        """Leave all collectives: those that wait for this rank raise."""
        self._world.interrupted.add(self._rank)

    def exchange(self, report: str) -> list[str | None]:
        """Return the report of each rank; None for one whose function has ended."""
        reports = self._world.reports.setdefault(self._num_rounds, {})
        self._num_rounds += 1
        reports[self._rank] = report
        scheduler = self._world.scheduler

        def has_all() -> bool:
            missing = set(range(self._num_ranks)) - reports.keys()
            return all(scheduler.is_done(rank) for rank in missing)

        scheduler.wait(self._rank, has_all, "agreeing on a failure")
        return [reports.get(rank) for rank in range(self._num_ranks)]

    def renew(self) -> bool:
        """Let all ranks communicate again; True."""
        self._world.renew(self._num_rounds)
        return True
