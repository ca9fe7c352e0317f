"""The process-wide generators of torch (CPU), NumPy and Python, as one state."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np  # which imports `numpy.random`, 10 ms, at its first use
import torch

A = TypeVar("A")
R = TypeVar("R")

NumpyState = tuple[str, np.ndarray, int, int, float]  # as `np.random.get_state()` returns it
PythonState = tuple[int, tuple[int, ...], float | None]  # as `random.getstate()` returns it


class Generators:
    """A state of all three generators.

    Args:
        torch_state: `uint8[n]`, of `torch.Generator.get_state`.
        numpy_state: Of `np.random.get_state`.
        python_state: Of `random.getstate`.
    """

    __slots__ = ("numpy", "python", "torch")

    def __init__(
        self, torch_state: torch.Tensor, numpy_state: NumpyState, python_state: PythonState
    ) -> None:
        self.torch = torch_state
        self.numpy = numpy_state
        self.python = python_state

    @classmethod
    def current(cls) -> Generators:
        """Return the state of the process's generators."""
        numpy_state: NumpyState = np.random.get_state()  # pyright: ignore[reportAssignmentType]
        return cls(torch.default_generator.get_state(), numpy_state, random.getstate())

    @classmethod
    def seeded(cls, seed: int) -> Generators:
        """Return the state of generators that were seeded with `seed`, as `seed_all` would."""
        torch_state = torch.Generator().manual_seed(seed).get_state()
        numpy_state = np.random.RandomState(seed % 2**32).get_state()
        python_state = random.Random(seed).getstate()
        return cls(torch_state, numpy_state, python_state)  # type: ignore[arg-type]

    def restore(self) -> None:
        """Set the process's generators to this state."""
        torch.default_generator.set_state(self.torch)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def equals(self, other: Generators) -> bool:
        """Return whether both states are the same, so that the next draws are."""
        kind, words, *position = self.numpy
        other_kind, other_words, *other_position = other.numpy
        return (
            torch.equal(self.torch, other.torch)
            and self.python == other.python
            and (kind, position) == (other_kind, other_position)
            and np.array_equal(words, other_words)
        )


@contextmanager
def using(state: Generators) -> Generator[None]:
    """Run the body with the process's generators in `state`, then restore them.

    Effects: ambient. Updates `state`, so that the next body continues where this one ended.
    """
    process_state = Generators.current()
    state.restore()
    try:
        yield
    finally:
        after = Generators.current()
        state.torch, state.numpy, state.python = after.torch, after.numpy, after.python
        process_state.restore()


def seed_all(seed: int) -> None:
    """Seed all three in place, in microseconds; for worker processes and inside `using`."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@functools.cache
def _seeded_bit_generator() -> np.random.MT19937:
    return np.random.MT19937(0)


class _PythonGenerator:
    """Python's process-wide generator, whose state is copied only after something drew from it.

    `random.getstate` takes 10 µs, a tenth of the time to read a small batch. Two draws show whether
    the state is the last one that was copied: its next two words are stored. If it is another
    state, the drawn word is returned to it by decrementing the index of the MT19937. Every later
    draw is the same then. (At a multiple of 624 words the state itself looks different: index 0 of
    the new words, instead of index 624 of the old ones.)
    """

    def __init__(self) -> None:
        self._state: PythonState | None = None
        self._next_words = (0, 0, 0)
        # `gauss` draws normals in pairs and stores the second one here, outside of the words.
        self._instance: random.Random = random.random.__self__  # type: ignore[attr-defined]

    def take(self) -> PythonState:
        """Return the state, and leave the generator two words after it: `put` must follow."""
        gauss_next = self._instance.gauss_next  # type: ignore[attr-defined]
        first, second, _ = self._next_words
        num_drawn = 1
        is_same = random.getrandbits(32) == first
        if is_same:
            # One word is equal by chance once in 2^32 batches, two are not in practice.
            num_drawn = 2
            is_same = random.getrandbits(32) == second
        if self._state is None or not is_same:
            self._copy(num_drawn)
        assert self._state is not None
        version, words, _ = self._state
        # A comparison of words could not detect a normal that is stored already.
        self._instance.gauss_next = None  # type: ignore[attr-defined]
        return version, words, gauss_next

    def _copy(self, num_drawn: int) -> None:
        version, words, _ = random.getstate()
        state = (version, (*words[:-1], words[-1] - num_drawn), None)
        random.setstate(state)
        self._next_words = (
            random.getrandbits(32),
            random.getrandbits(32),
            random.getrandbits(32),
        )
        self._state = state
        random.setstate(state)
        random.getrandbits(64)  # two words

    def next_word(self) -> int:
        """Return the word that the generator draws next, directly after `take`."""
        return self._next_words[2]

    def put(self, state: PythonState) -> None:
        """Set the state that `take` returned."""
        random.setstate(state)


_python = _PythonGenerator()


class _DrawDetector:
    """A bit generator that stands in for NumPy's own, and detects that something drew from it.

    Its twin draws a word whenever it does. The words of both differ as soon as something else drew.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again with equal states."""
        self.bits = np.random.MT19937(0)
        self._twin = np.random.MT19937(0)

    def has_drawn(self) -> bool:
        """Return whether something drew since the last call; then `reset` must follow."""
        return self.bits.random_raw() != self._twin.random_raw()


@functools.cache
def _draw_detector() -> _DrawDetector:
    return _DrawDetector()


def _is_exchanged(bits: object) -> bool:
    """Return whether NumPy's bit generator is one that a running call has put in its place."""
    return bits is _seeded_bit_generator() or bits is _draw_detector().bits


def call_seeded(fn: Callable[[A], R], argument: A, seed: int) -> R:
    """Return `fn(argument)`, computed with the generators seeded; then restore the process's own.

    Effects: ambient. Takes 15 µs besides `fn`. NumPy's legacy normals are drawn in pairs: the
    second one of a pair whose first was drawn before this call is discarded.

    Args:
        fn: What to call.
        argument: Its argument.
        seed: Equal seeds give equal draws, in a worker process after `seed_all(seed)`, too.

    Examples:
        >>> call_seeded(lambda low: random.randint(low, 9), 0, seed=1)
        2
    """
    torch_state = torch.default_generator.get_state()
    python_state = _python.take()
    # NumPy needs 65 µs to copy the state of an MT19937, but less than 1 µs to exchange the whole
    # bit generator of `np.random`. A call that begins while another one runs copies the state: a
    # nested one, or that of another rank of a simulation, which restores states by value. A second
    # exchange could end after the first, and leave the wrong bit generator.
    bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
    numpy_state = None
    if _is_exchanged(bits):
        numpy_state = np.random.get_state()
    else:
        np.random.set_bit_generator(_seeded_bit_generator())  # type: ignore[attr-defined]
    try:
        seed_all(seed)
        return fn(argument)
    finally:
        if numpy_state is None:
            np.random.set_bit_generator(bits)  # type: ignore[attr-defined]
        else:
            np.random.set_state(numpy_state)
        _python.put(python_state)
        torch.default_generator.set_state(torch_state)


def call_watched(fn: Callable[[A], R], argument: A) -> tuple[R, bool]:
    """Call `fn(argument)` and detect whether it drew; restore the process's generators.

    Effects: ambient. Takes half the time of `call_seeded`, because it seeds nothing: a result for
    which something was drawn is not reproducible, and the caller discards it.

    Args:
        fn: What to call.
        argument: Its argument.

    Returns:
        `(result, drew)`.

    Examples:
        >>> call_watched(abs, -3), call_watched(lambda high: random.random() < high, 2)
        ((3, False), (True, True))
    """
    bits = np.random.get_bit_generator()  # type: ignore[attr-defined]
    # As in `call_seeded`: a second exchange could end after the first.
    if _is_exchanged(bits):
        return detect_draws(lambda: fn(argument))
    torch_state = torch.default_generator.get_state()
    python_state = _python.take()
    next_word = _python.next_word()
    detector = _draw_detector()
    np.random.set_bit_generator(detector.bits)  # type: ignore[attr-defined]
    drew = True
    try:
        result = fn(argument)
        drew = (
            random.getrandbits(32) != next_word
            or detector.has_drawn()
            or _bytes(torch.default_generator.get_state()) != _bytes(torch_state)
        )
    finally:
        np.random.set_bit_generator(bits)  # type: ignore[attr-defined]
        _python.put(python_state)
        if drew:
            detector.reset()
            torch.default_generator.set_state(torch_state)
    return result, drew


def _bytes(state: torch.Tensor) -> bytes:
    """Return the contents, which Python compares in half the time of `torch.equal`."""
    return state.numpy().tobytes()


def detect_draws(fn: Callable[[], R], *, torch_only: bool = False) -> tuple[R, bool]:
    """Call `fn` and compare the process's generators before and after; restore them if it drew.

    Effects: ambient.

    Args:
        fn: What to call.
        torch_only: Whether to compare torch's generator only: 5 µs instead of 200 µs.

    Returns:
        `(result, drew)`: what `fn` returned, and whether it changed a generator.

    Examples:
        >>> detect_draws(lambda: 3), detect_draws(lambda: torch.rand(1).shape)
        ((3, False), (torch.Size([1]), True))
    """
    if torch_only:
        return _detect_torch_draws(fn)
    before = Generators.current()
    drew = True  # an exception of `fn` restores them, too
    try:
        result = fn()
        drew = not before.equals(Generators.current())
    finally:
        if drew:
            before.restore()
    return result, drew


def _detect_torch_draws(fn: Callable[[], R]) -> tuple[R, bool]:
    before = torch.default_generator.get_state()
    drew = True
    try:
        result = fn()
        drew = not torch.equal(before, torch.default_generator.get_state())
    finally:
        if drew:
            torch.default_generator.set_state(before)
    return result, drew
