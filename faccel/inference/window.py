"""The window: memory for the offloaded units in use, and for those that are expected next.

The calling thread decides what is loaded and evicted; one other thread reads. A buffer is reused by
the next unit of the same size: new memory would have to be cleared by the operating system.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import attrs
import torch
from torch import nn

from faccel.errors import ModelError
from faccel.inference.budget import size_text
from faccel.inference.copies import Copies
from faccel.inference.use_order import UseOrder

_ALIGNMENT = 64  # bytes, as PyTorch's allocators
_MAX_LOADING = 2  # units that are read ahead at a time; a unit in need waits for them


# The budget of the device is resident weights + window. A pass is a cycle over all units,
# for which eviction by least recent use is the worst choice: it evicts what is needed next.
# The order of the previous pass predicts the next use of each unit.
class Source(Protocol):
    """Where the values of a unit are."""

    def read(self, tensors: Sequence[torch.Tensor]) -> None:
        """Write the values of the unit into tensors, on the thread that reads."""
        ...


@attrs.frozen(eq=False)
class OffloadedUnit:
    """A unit that is copied to the device that computes.

    Args:
        shapes: Of its parameters.
        dtypes: Of its parameters.
        source: Where their values are.
    """

    shapes: Sequence[torch.Size]
    dtypes: Sequence[torch.dtype]
    source: Source

    @property
    def num_bytes(self) -> int:
        """The size of a buffer for the unit."""
        return sum(map(_aligned_size, self.shapes, self.dtypes))

    @property
    def num_padding_bytes(self) -> int:
        """The bytes of a buffer that are there for alignment."""
        size = self.num_bytes
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            size -= shape.numel() * dtype.itemsize
        return size

    def views(self, buffer: torch.Tensor) -> list[nn.Parameter]:
        """Return the parameters as views of a buffer."""
        params: list[nn.Parameter] = []
        start = 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            size = shape.numel() * dtype.itemsize
            view = buffer[start : start + size].view(dtype).view(shape)
            params.append(nn.Parameter(view, requires_grad=False))
            start += _aligned_size(shape, dtype)
        return params


def _aligned_size(shape: torch.Size, dtype: torch.dtype) -> int:
    size = shape.numel() * dtype.itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@attrs.define(eq=False)
class _Slot:
    """A unit in memory.

    Args:
        buffer: Its bytes.
        params: Views of it.
        loading: Done when the values were read; returns the point in time when they are there.
        num_users: How many calls of its forward are running.
    """

    buffer: torch.Tensor
    params: list[nn.Parameter]
    loading: Future[Any]
    num_users: int = 0


class Window:
    """Memory for units in use.

    Args:
        units: The units in the order of their definition. Names with equal values are one unit.
        capacity: Bytes of all buffers.
        copies: How the values reach the buffers.
    """

    def __init__(self, units: Mapping[str, OffloadedUnit], capacity: int, copies: Copies) -> None:
        self._units = units
        self._capacity = capacity
        self._copies = copies
        self._order = UseOrder(list(units))
        self._slots: dict[str, _Slot] = {}
        self._free: list[torch.Tensor] = []  # buffers without a unit
        # One thread: two reads at a time would share the bandwidth, and the unit that is used next
        # would be there later.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="faccel-weights")
        self._is_forked = False
        _WINDOWS.add(self)
        self.num_read = 0  # units, for tests and benchmarks

    def note_fork(self) -> None:
        """Let `acquire` raise: a fork has no thread that reads, and would wait forever."""
        self._is_forked = True

    def acquire(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of a unit, which stay in memory until `release`.

        Raises:
            CheckpointError: They cannot be read.
            ModelError: The units in use leave no room.
        """
        if self._is_forked:
            raise ModelError(
                "a placed model cannot run in a forked process",
                got="a model that was placed before the fork",
                fix="place the model in the process that runs it",
            )
        self._order.use(name)
        slot = self._slots.get(name)
        if slot is None:
            # Not expected: another branch of the model, or the first pass.
            if not self._make_room(self._units[name].num_bytes, {}):
                raise ModelError(
                    f"no room is left for the unit `{name}`",
                    got=f"{size_text(self._capacity)} for units in use",
                    fix="raise the budget of the device that computes",
                )
            slot = self._load(name)
        slot.num_users += 1
        # Before the wait below: the thread continues with the next units while this one computes.
        self._prefetch()
        try:
            self._copies.wait(slot.loading.result())
        # Ctrl-C, too: the next call reads the unit again.
        except BaseException:
            self._drop(name)
            raise
        return slot.params

    def release(self, name: str) -> None:
        """Allow a unit to be evicted, and load the next one."""
        slot = self._slots.get(name)
        if slot is None:  # its load has failed
            return
        slot.num_users -= 1
        self._prefetch()

    def release_all(self) -> None:
        """Allow all units to be evicted, after a forward that has not reached its end."""
        for slot in self._slots.values():
            slot.num_users = 0

    def close(self) -> None:
        """Wait for the thread, and free all memory."""
        # A read that is running writes into a buffer until it ends.
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._slots.clear()
        self._free.clear()

    def _drop(self, name: str) -> None:
        slot = self._slots.pop(name)
        self._free.append(slot.buffer)

    def _load(self, name: str) -> _Slot:
        unit = self._units[name]
        buffer = self._buffer(unit.num_bytes)
        params = unit.views(buffer)
        tensors = [param.data for param in params]
        # The buffer may be that of a unit whose computation is submitted, but has not ended.
        read = functools.partial(unit.source.read, tensors)
        loading = self._reader.submit(self._copies.fill, self._copies.mark(), read)
        self.num_read += 1
        self._slots[name] = _Slot(buffer, params, loading)
        return self._slots[name]

    def _buffer(self, num_bytes: int) -> torch.Tensor:
        # Blocks of one model have equal sizes.
        for index, buffer in enumerate(self._free):
            if buffer.numel() == num_bytes:
                return self._free.pop(index)
        # Buffers of other sizes are freed as far as the new one needs their room.
        while self._free and self.num_allocated() + num_bytes > self._capacity:
            self._free.pop()
        return self._copies.allocate(num_bytes)

    def num_allocated(self) -> int:
        """Return the bytes of all buffers."""
        return self._num_used() + sum(map(torch.Tensor.numel, self._free))

    def _num_used(self) -> int:
        return sum(slot.buffer.numel() for slot in self._slots.values())

    def _make_room(self, num_bytes: int, keep: Mapping[str, float]) -> bool:
        """Evict units until there is room; return whether there is.

        Args:
            num_bytes: How much.
            keep: Units that stay.
        """
        used = self._num_used()
        distances = self._order.distances()
        idle = [key for key, slot in self._slots.items() if not slot.num_users and key not in keep]
        # The unit whose next use is last: no other choice reads less (Belady 1966).
        victims: list[str] = []
        for key in sorted(idle, key=distances.__getitem__, reverse=True):
            if used + num_bytes <= self._capacity:
                break
            victims.append(key)
            used -= self._slots[key].buffer.numel()
        if used + num_bytes > self._capacity:
            return False
        for key in victims:
            self._evict(key)
        return True

    def _evict(self, name: str) -> None:
        loading = self._slots[name].loading
        if not loading.cancel():  # the thread holds the memory until it is done
            loading.exception()
        self._drop(name)

    def _prefetch(self) -> None:
        """Load the units that are expected next, as far as there is room."""
        distances = self._order.distances()
        num_loading = sum(not slot.loading.done() for slot in self._slots.values())
        for name in self._order.upcoming():
            if name in self._slots:
                continue
            if num_loading >= _MAX_LOADING:
                return
            keep = {key: value for key, value in distances.items() if value <= distances[name]}
            # Units that are used sooner stay, so that reading ahead never costs a second read.
            if not self._make_room(self._units[name].num_bytes, keep):
                return
            self._load(name)
            num_loading += 1


# Not by the number of the process in each call: the compiler cannot trace that.
_WINDOWS: weakref.WeakSet[Window] = weakref.WeakSet()


def _note_fork() -> None:
    for window in _WINDOWS:
        window.note_fork()


os.register_at_fork(after_in_child=_note_fork)
