"""The process-wide generators of torch (CPU), numpy and python: taken, seeded and put back together."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

A = TypeVar("A")
R = TypeVar("R")


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


class _PythonAside:
    """python's generator, put aside without copying its 625 words (13 us) each time.

    It is kept as a state and the number that this state draws next: as long as the generator draws that number, nobody
    has used it since it was put back, and the state still holds.
    """

    def __init__(self) -> None:
        self.state: Any = None
        self.draws = -1

    def take(self) -> Any:
        """Return the state in which the generator stands, for `random.setstate`."""
        if random.getrandbits(32) == self.draws:
            return self.state
        version, words, gauss = random.getstate()
        self.state = (version, (*words[:-1], words[-1] - 1), gauss)  # one draw back: the last word counts them
        random.setstate(self.state)
        self.draws = random.getrandbits(32)
        return self.state


_python_aside = _PythonAside()
_numpy_bits: Any = np.random.MT19937()  # swapped in: copying numpy's state takes 50 us


def seeded(fn: Callable[[A], R], argument: A, seed: int) -> R:
    """Call `fn(argument)` under seeded generators and put the process's own back, in a few microseconds.

    numpy's drops the second half of a pair of normals that it may have kept.
    """
    torch_state = torch.default_generator.get_state()
    numpy_bits = np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue]
    python_state = _python_aside.take()
    np.random.set_bit_generator(_numpy_bits)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        seed_all(seed)
        return fn(argument)
    finally:
        torch.default_generator.set_state(torch_state)
        np.random.set_bit_generator(numpy_bits)  # pyright: ignore[reportAttributeAccessIssue]
        random.setstate(python_state)
