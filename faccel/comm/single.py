"""`Collectives` for one process, which are copies; importing them imports nothing of c10d."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import attrs
import torch
from torch import nn

from faccel.errors import ConfigError, nearest, short_repr
from faccel.lifetime import WaitTimes
from faccel.mesh import AXES, VIEWS, WORLD
from faccel.tree import Tree


def axis_error(axis: str, allowed: Iterable[str]) -> ConfigError:
    """Return the error for a name that is not an axis of the mesh."""
    return ConfigError(
        "`axis` must be an axis of the mesh", got=short_repr(axis), fix=nearest(axis, allowed)
    )


@attrs.frozen
class NoTurn:
    """The `Turn` of one process, and of a simulation, whose scheduler finds ranks that wait."""

    def working(self) -> AbstractContextManager[None]:
        """Run the body."""
        return nullcontext()

    def wait(self, *, went_first: bool) -> None:
        """Return at once."""


class FixedCounter:
    """The `Counter` of one process, and of a simulation: each rank gets every `size`-th number."""

    def __init__(self, rank: int, size: int) -> None:
        self._number, self._size = rank - size, size

    def next(self) -> int:
        """Return the next number of this rank."""
        self._number += self._size
        return self._number


@attrs.frozen
class SingleCollectives:
    """The collectives of a single process: copies."""

    # Results are copies for any number of ranks, so that writing into one is always safe. An
    # unknown axis raises here, too: a script that runs on one process also runs on several.
    axes: tuple[str, ...] = (WORLD, *VIEWS, *AXES, "ep", "ep_storage")

    @property
    def recovery(self) -> None:
        """None: there are no other ranks."""

    def _check(self, axis: str) -> None:
        if axis not in self.axes:
            raise axis_error(axis, self.axes)

    def size(self, axis: str) -> int:
        """Return 1."""
        self._check(axis)
        return 1

    def rank(self, axis: str) -> int:
        """Return 0."""
        self._check(axis)
        return 0

    def group(self, axis: str) -> None:
        """Return None: a single process has no process group."""
        self._check(axis)

    def set_call_label(self, call: str, x: Tree) -> None:
        """Do nothing: there are no other ranks to compare with."""

    def name_model(self, model: nn.Module) -> None:
        """Do nothing: there are no other ranks to compare with."""

    def count_waits(self, waits: WaitTimes) -> None:
        """Do nothing: there are no other ranks to wait for."""

    def begin_call(self, call: str) -> None:
        """Return at once: there are no other ranks."""

    def as_rank_error(self, error: RuntimeError, doing: str, axis: str) -> None:
        """Return None: there are no other ranks that could have failed."""

    def new_turn(self, *, local: bool, timeout_s: float) -> NoTurn:
        """Return a turn without waiting: there are no other ranks."""
        return NoTurn()

    def new_counter(self) -> FixedCounter:
        """Return a counter of this process."""
        return FixedCounter(0, 1)

    def all_reduce(self, x: torch.Tensor, op: str, axis: str) -> torch.Tensor:
        """Return a copy of `x`."""
        self._check(axis)
        return x.clone()

    def all_gather(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return a copy of `x` as the only row."""
        self._check(axis)
        return x.clone()[None]

    def broadcast(self, x: torch.Tensor, src: int, axis: str) -> torch.Tensor:
        """Return a copy of `x`."""
        self._check(axis)
        return x.clone()

    def all_to_all(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return a copy of `x`."""
        self._check(axis)
        return x.clone()

    def scatter(
        self, rows: torch.Tensor | None, like: torch.Tensor, src: int, axis: str
    ) -> torch.Tensor:
        """Return a copy of the only row."""
        self._check(axis)
        assert rows is not None
        return rows[0].clone()

    def barrier(self, axis: str) -> None:
        """Return at once."""
        self._check(axis)
