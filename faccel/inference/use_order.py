"""Predicts which units of a model run next, from the order in which they ran before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence


class UseOrder:
    """The order of use of units: at first that of their definition, then the observed one.

    Args:
        names: The units in the order of their definition.
    """

    def __init__(self, names: Sequence[str]) -> None:
        # After the last unit, the next forward begins with the first.
        self._next = dict(zip(names, [*names[1:], *names[:1]], strict=True))
        self._current = names[-1]

    def use(self, name: str) -> None:
        """Record that a unit runs."""
        if name != self._current:  # a unit that runs twice in a row is in memory already
            self._next[self._current] = name
        self._current = name

    def upcoming(self) -> Iterator[str]:
        """Yield the units that are expected after the current one, each once."""
        # The chain may end in a loop that does not contain the current unit, as after an encoder.
        visited = {self._current}
        name = self._next[self._current]
        while name not in visited:
            yield name
            visited.add(name)
            name = self._next[name]

    def distances(self) -> dict[str, float]:
        """Return how many other units run before each unit; infinity for those not expected."""
        distances = dict.fromkeys(self._next, math.inf)
        distances[self._current] = 0
        for distance, name in enumerate(self.upcoming(), 1):
            distances[name] = distance
        return distances
