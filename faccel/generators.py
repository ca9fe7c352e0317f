"""The process-wide generators of torch (CPU), numpy and python: taken, seeded and put back together."""

from __future__ import annotations

import random
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class Generators:
    """A state of all three."""

    __slots__ = ("numpy", "python", "torch")

    def __init__(self, torch_state: torch.Tensor, numpy_state: Any, python_state: Any) -> None:
        self.torch = torch_state
        self.numpy = numpy_state
        self.python = python_state

    @classmethod
    def current(cls) -> Generators:
        """Return those of the process as they are now."""
        return cls(torch.default_generator.get_state(), np.random.get_state(), random.getstate())

    @classmethod
    def seeded(cls, seed: int) -> Generators:
        """Return those of a process that has seeded each with `seed`."""
        numpy_state = np.random.RandomState(seed % 2**32).get_state()
        return cls(torch.Generator().manual_seed(seed).get_state(), numpy_state, random.Random(seed).getstate())

    def restore(self) -> None:
        """Make them the process's own."""
        torch.default_generator.set_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


@contextmanager
def under(state: Generators) -> Generator[None]:
    """Run the body with the process's generators in `state`, which it moves on; put the process's own back."""
    own = Generators.current()
    state.restore()
    try:
        yield
    finally:
        moved = Generators.current()
        state.torch, state.numpy, state.python = moved.torch, moved.numpy, moved.python
        own.restore()


def seed_all(seed: int) -> None:
    """Seed all three in place, in microseconds; for worker processes and inside of `under`."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
