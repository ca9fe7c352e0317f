"""The mutable part of a `DistContext`: callbacks, wrapped models, open iterations, and updates."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import attrs

from faccel.grad_reducer import GradReducer

T = TypeVar("T")
_NO_SPAN: AbstractContextManager[None] = nullcontext()


@attrs.define(eq=False)
class WaitTimes:
    """What this rank has done besides training steps since a meter was opened.

    Args:
        clock: Returns seconds; that of the meter.
        data_s: Seconds in `next` of faccel's loaders.
        num_batches: How many batches the loaders have yielded.
        comm_s: Seconds in faccel's collectives on the host.
        phase_s: Seconds in phases by name, "checkpoint" and "evaluation". What a loader or a
            collective waits inside of a phase belongs to the phase only.
        in_phases_s: The sum of all phases.
        num_skips: How often `optimizer_step` has skipped an update.
        notes: Functions that are called at the end of a phase with its name and None, and for a
            checkpoint with "saved" or "loaded" and its step.
    """

    clock: Callable[[], float]
    data_s: float = 0.0
    num_batches: int = 0
    comm_s: float = 0.0
    phase_s: dict[str, float] = attrs.field(factory=lambda: {"checkpoint": 0.0, "evaluation": 0.0})
    in_phases_s: float = 0.0
    num_skips: int = 0
    notes: list[Callable[[str, int | None], None]] = attrs.field(factory=list)
    _is_in_phase: bool = attrs.field(default=False, init=False)

    @contextmanager
    def communicating(self) -> Generator[None]:
        """Count the time of the body as a wait for other ranks."""
        start_s = self.clock()
        try:
            yield
        finally:
            self.comm_s += self.clock() - start_s

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Count the time of the body as that phase, unless it is inside of another one."""
        # `save` inside of an evaluation: the outer phase has its time already.
        if self._is_in_phase:
            yield
            return
        self._is_in_phase = True
        start_s, data_s, comm_s = self.clock(), self.data_s, self.comm_s
        try:
            yield
        finally:
            self._is_in_phase = False
            duration_s = self.clock() - start_s
            self.phase_s[name] += duration_s
            self.in_phases_s += duration_s
            self.data_s, self.comm_s = data_s, comm_s
            self.note(name, None)

    def note(self, name: str, step: int | None) -> None:
        """Call the functions in `notes`."""
        for note in self.notes:
            note(name, step)


def counted(waits: Sequence[WaitTimes]) -> AbstractContextManager[None]:
    """Return a context whose time is counted as communication in `waits`, if there is one."""
    if waits:
        return waits[0].communicating()
    return nullcontext()


class Lifetime:
    """Callbacks for the end of a context, its wrapped models, and its open iterations and joins.

    Background saves and signal handlers register a callback, `wrap` registers models. Thread-safe.

    Examples:
        >>> lifetime = Lifetime()
        >>> lifetime.on_close(lambda: print("wait for the background save"))
        >>> lifetime.on_close(lambda: print("restore the signal handlers"))
        >>> lifetime.close()
        restore the signal handlers
        wait for the background save
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        # Sets of tokens and not counters: a generator that the garbage collector closes removes its
        # token in the middle of any other statement, and `add` and `discard` are atomic.
        self._uneven_iterations: set[object] = set()
        self._joins: set[object] = set()
        self._has_loader = False
        self._num_backwards = 0
        self._num_updates = 0
        self._has_accumulated = False
        self._num_windows = 0
        # By `id` of the wrapped model. Weak, so that a model is freed when the user drops it.
        self._models: dict[int, weakref.ref[object]] = {}
        self._reducers: dict[int, GradReducer] = {}
        self._waits: WaitTimes | None = None
        # Names a range of the profile that is open.
        self._span: Callable[[str], AbstractContextManager[object]] | None = None
        self.created_s = time.monotonic()
        # Read twice in every step, so the sequence is made when a model comes or goes.
        self._reducers_in_order: tuple[GradReducer, ...] = ()

    def on_close(self, callback: Callable[[], None]) -> None:
        """Register a function that `close` calls, for example to wait for a background save."""
        with self._lock:
            self._callbacks.append(callback)

    def cancel(self, callback: Callable[[], None]) -> None:
        """Remove a callback; does nothing where it is not registered."""
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

    def callbacks(self, cls: type[T]) -> list[T]:
        """Return the registered callbacks of a class, oldest first."""
        # A copy: the caller cancels callbacks while it iterates over the result.
        with self._lock:
            callbacks: list[object] = list(self._callbacks)
        return [callback for callback in callbacks if isinstance(callback, cls)]

    def close(self) -> None:
        """Call every callback once, newest first, and raise the first error after the last call.

        Effects: ambient.
        """
        # Cleared first: a second `close`, or one from a callback, calls nothing twice.
        with self._lock:
            # newest first, as in `contextlib.ExitStack`: what came later may use what came earlier
            callbacks = self._callbacks[::-1]
            self._callbacks.clear()
        # Called without the lock, which is not reentrant: a callback may call `cancel`.
        errors: list[Exception] = []
        for callback in callbacks:
            # A failed save must not keep the signal handlers from being restored.
            try:
                callback()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def add_model(self, model: object, reducer: GradReducer) -> None:
        """Register a wrapped model, until it is garbage collected or `remove_model` is called."""
        key = id(model)

        def forget(_: object) -> None:
            self._forget(key)

        self._models[key] = weakref.ref(model, forget)
        self._reducers[key] = reducer
        self._reducers_in_order = tuple(self._reducers.values())

    def remove_model(self, model: object) -> None:
        """Remove a wrapped model that another one replaces."""
        self._forget(id(model))

    def _forget(self, key: int) -> None:
        self._models.pop(key, None)
        self._reducers.pop(key, None)
        self._reducers_in_order = tuple(self._reducers.values())

    def models(self) -> list[object]:
        """Return the wrapped models of this context, oldest first."""
        models: list[object] = []
        for reference in list(self._models.values()):
            model = reference()
            if model is not None:
                models.append(model)
        return models

    def reducer_of(self, model: object) -> GradReducer:
        """Return the gradient reducer of a wrapped model."""
        return self._reducers[id(model)]

    def reducers(self) -> Sequence[GradReducer]:
        """Return the gradient reducers of the wrapped models, oldest first."""
        return self._reducers_in_order

    def record_spans(self, span: Callable[[str], AbstractContextManager[object]] | None) -> None:
        """Let `span(name)` be entered around each part of a step; None ends it."""
        self._span = span

    @property
    def has_spans(self) -> bool:
        """Whether a profile is open."""
        return self._span is not None

    def span(self, name: str) -> AbstractContextManager[object]:
        """Return a context that names a range of the profile; without one it does nothing."""
        # One object for all calls: each step enters some.
        if self._span is None:
            return _NO_SPAN
        return self._span(name)

    @contextmanager
    def _spanned(self, name: str, context: AbstractContextManager[None]) -> Generator[None]:
        with self.span(name), context:
            yield

    @contextmanager
    def uneven_iteration(self) -> Generator[None]:
        """Mark the body as an iteration over a loader with `tail="uneven"`."""
        token = object()  # iterations nest: each removes its token only
        self._uneven_iterations.add(token)
        try:
            yield
        finally:
            self._uneven_iterations.discard(token)

    @contextmanager
    def join(self) -> Generator[None]:
        """Mark the body as one in which ranks may train for different numbers of steps."""
        token = object()
        self._joins.add(token)
        try:
            yield
        finally:
            self._joins.discard(token)

    def add_backward(self) -> None:
        """Count a backward of the present update."""
        self._num_backwards += 1

    def add_update(self, grad_accum: int) -> None:
        """Count the present update; the next backward belongs to another one."""
        if self._num_backwards >= grad_accum:
            self._has_accumulated = True
        self._num_backwards = 0
        self._num_updates += 1

    @property
    def num_updates(self) -> int:
        """How many updates were counted, those of all optimizers."""
        return self._num_updates

    def drop_backwards(self) -> None:
        """Forget the backwards of the present update, whose gradients were dropped."""
        self._num_backwards = 0

    def begin_window(self) -> int:
        """Count a call of `forward_backward`; return its number, the same on all ranks."""
        self._num_windows += 1
        return self._num_windows

    @property
    def num_windows(self) -> int:
        """How often `forward_backward` was called."""
        return self._num_windows

    def continue_from_window(self, number: int) -> None:
        """Note the number of the last window, on which ranks agree after one of them failed."""
        self._num_windows = number

    def add_windows(self) -> None:
        """Note that `windows` groups micro-batches, so that updates may have any number of them."""
        self._has_accumulated = True

    @property
    def num_backwards(self) -> int:
        """How many backwards there were since the last update."""
        return self._num_backwards

    @property
    def has_accumulated(self) -> bool:
        """Whether the context had `windows`, or an update with all of its micro-batches."""
        return self._has_accumulated

    @property
    def waits(self) -> WaitTimes | None:
        """How long this rank has waited; None without a meter, when nothing is measured."""
        return self._waits

    def count_waits(self, waits: WaitTimes) -> None:
        """Let loaders and collectives of the context count their times in `waits`."""
        self._waits = waits

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context whose time is counted as a phase.

        Without a meter and a profile it does nothing.
        """
        phase: AbstractContextManager[None] = nullcontext()
        if self._waits is not None:
            phase = self._waits.phase(name)
        if self._span is None:
            return phase
        return self._spanned(name, phase)

    def note(self, name: str, step: int) -> None:
        """Let meters know that the checkpoint of a step was "saved" or "loaded"."""
        if self._waits is not None:
            self._waits.note(name, step)

    def add_skip(self) -> None:
        """Count an update that `optimizer_step` has skipped."""
        if self._waits is not None:
            self._waits.num_skips += 1

    def add_loader(self) -> None:
        """Note that the context has split a loader over its ranks."""
        self._has_loader = True

    @property
    def has_loader(self) -> bool:
        """Whether the context has split a loader over its ranks."""
        return self._has_loader

    @property
    def has_uneven_iteration(self) -> bool:
        """Whether a loader with `tail="uneven"` is being iterated.

        Outside of `join`, training on it would hang.
        """
        return bool(self._uneven_iterations)

    @property
    def has_join(self) -> bool:
        """Whether a `join` context is open."""
        return bool(self._joins)
