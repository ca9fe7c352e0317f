"""The process-wide generators of torch (CPU), numpy and python: taken, seeded and put back together."""

from __future__ import annotations

import ctypes
import random
import struct
import sys
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
        return cls(
            torch.Generator().manual_seed(seed).get_state(),
            numpy_state,
            random.Random(seed).getstate(),
        )

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


class _Aside:
    """One generator of the process as it was when it was last put back; its state is copied only after somebody drew.

    Whether somebody has is seen in a window of a few bytes of its memory, the place in its 624 words and one or two of
    them, which change together with every draw. Copying all of them for each batch would cost a tenth of a small step.

    Args:
        window: Those bytes; None where this interpreter keeps them elsewhere: then somebody has always drawn.
        copy: Returns the state.
        put: Sets it.
    """

    def __init__(self, window: Any, copy: Callable[[], Any], put: Callable[[Any], None]) -> None:
        self.window, self.copy, self.put = window, copy, put
        self.state: Any = None
        self.seen: bytes | None = None

    def take(self) -> Any:
        """Return the state in which the generator stands."""
        if self.window is None or self.window.raw != self.seen:
            self.state = self.copy()
            self.seen = None if self.window is None else self.window.raw
        return self.state

    def is_untouched(self) -> bool:
        """Whether nobody has drawn since it was taken."""
        return self.window is not None and self.window.raw == self.seen


def _window_of_python(generator: random.Random) -> Any:
    """Return the bytes in which CPython keeps the number of the next word and the first two words."""
    if sys.implementation.name != "cpython":
        return None
    window = (ctypes.c_char * 12).from_address(id(generator) + object.__basicsize__)
    words = generator.getstate()[1]
    return window if window.raw == struct.pack("=iII", words[-1], *words[:2]) else None


def _window_of_numpy(bits: Any) -> Any:
    """Return the bytes in which numpy's MT19937 keeps its last word and the number of the next one."""
    state = bits.state
    if state["bit_generator"] != "MT19937":
        return None
    window = (ctypes.c_char * 8).from_address(bits.ctypes.state_address + 623 * 4)
    return (
        window
        if window.raw == struct.pack("=Ii", state["state"]["key"][-1], state["state"]["pos"])
        else None
    )


_python: Any = random.random.__self__  # type: ignore[attr-defined]
_python_aside = _Aside(_window_of_python(_python), random.getstate, random.setstate)
_numpy_bits: Any = np.random.get_bit_generator()  # pyright: ignore[reportAttributeAccessIssue]
_numpy_aside = _Aside(_window_of_numpy(_numpy_bits), np.random.get_state, np.random.set_state)
_numpy_other = _Aside(
    None, np.random.get_state, np.random.set_state
)  # of a bit generator that the user has put there


def _asides() -> tuple[_Aside, _Aside]:
    own = np.random.get_bit_generator() is _numpy_bits  # pyright: ignore[reportAttributeAccessIssue]
    return _python_aside, _numpy_aside if own else _numpy_other


def _torch_window(state: torch.Tensor) -> bytes:
    """Return seed, places and first word of a state of torch's CPU generator."""
    return ctypes.string_at(state.data_ptr(), 40)


def seeded(fn: Callable[[A], R], argument: A, seed: int) -> R:
    """Call `fn(argument)` under seeded generators and return its result; the process's own are put back.

    (Of numpy's old normals, which are made in pairs, one that was kept may come twice.)
    """
    python, numpy = _asides()
    python_state, numpy_state, pair = python.take(), numpy.take(), _python.gauss_next
    torch_state = torch.default_generator.get_state()
    try:
        seed_all(seed)
        return fn(argument)
    finally:
        torch.default_generator.set_state(torch_state)
        python.put(python_state)
        numpy.put(numpy_state)
        _python.gauss_next = pair  # the second of a pair of normals, which no word tells


def watched(fn: Callable[[A], R], argument: A) -> tuple[R, bool]:
    """Call `fn(argument)` without seeding anything, in a fraction of the time of `seeded`.

    Returns:
        The result, and whether `fn` has drawn anything: then the result is worth nothing. The process's generators
        are as they were in any case.
    """
    python, numpy = _asides()
    python_state, numpy_state, pair = python.take(), numpy.take(), _python.gauss_next
    torch_state = torch.default_generator.get_state()
    drew = True
    try:
        result = fn(argument)
        drew = not (
            python.is_untouched()
            and numpy.is_untouched()
            and _torch_window(torch.default_generator.get_state()) == _torch_window(torch_state)
        )
        return result, drew
    finally:
        if drew:
            torch.default_generator.set_state(torch_state)
            python.put(python_state)
            numpy.put(numpy_state)
            _python.gauss_next = pair
