"""How the values of a unit reach the device that computes: directly, or on a stream for copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from faccel.device_table import kind_of

_CHUNK_BYTES = 1 << 24  # of pinned memory, which the operating system cannot swap out
_LARGEST_ITEM = 16  # bytes, of complex128
_NUM_CHUNKS = 2  # one is read while the other is copied

ReadRange = Callable[[str, torch.Tensor, int], None]
"""Writes the values of the parameter of a name into a tensor, from an element of it on."""


class Copies(Protocol):
    """Copies values into buffers. `fill` is called on the thread that reads."""

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return a buffer, as uint8[num_bytes]."""
        ...

    def mark(self) -> Any:
        """Return a point in time before which the computation may still read the buffers."""
        ...

    def fill(self, mark: Any, read: Callable[[], None]) -> Any:
        """Call `read`, whose copies start after `mark`; return the point in time of their end."""
        ...

    def wait(self, end: Any) -> None:
        """Let the computation that follows start after the copies."""
        ...

    def read_param(self, read_range: ReadRange, name: str, tensor: torch.Tensor) -> None:
        """Write the values of a parameter into a tensor of a buffer, inside of `fill`."""
        ...


class DirectCopies:
    """Copies that have ended when `fill` returns: for the host, and without pinned memory.

    Args:
        device: That of the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return a buffer."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def mark(self) -> None:
        """Return None: a unit that is released has been computed."""

    def fill(self, mark: None, read: Callable[[], None]) -> None:
        """Call `read`."""
        read()

    def wait(self, end: None) -> None:
        """Return: the copies have ended."""

    def read_param(self, read_range: ReadRange, name: str, tensor: torch.Tensor) -> None:
        """Write the values of a parameter into a tensor."""
        read_range(name, tensor, 0)


# A copy and the computation of the unit before run at the same time if they are on two streams and
# the memory of the host is pinned. Events order them: a buffer is filled after the computation that
# used it, and a unit computes after its copies. Pinning all weights on the host would take up to
# twice their memory, because PyTorch rounds such allocations up to powers of two; so that values go
# through two chunks.
class StreamCopies:
    """Copies on a stream of the device beside the one that computes.

    Args:
        device: That of the buffers, an accelerator with pinned memory.
        largest: Bytes of the largest parameter: chunks are not larger.
    """

    def __init__(self, device: torch.device, largest: int) -> None:
        self._device = device
        self._stream = torch.Stream(device)
        size = max(min(largest, _CHUNK_BYTES), _LARGEST_ITEM)
        self._chunks: list[torch.Tensor] = []
        for _ in range(_NUM_CHUNKS):
            self._chunks.append(torch.empty(size, dtype=torch.uint8, pin_memory=True))
        self._ends: list[torch.Event | None] = [None] * _NUM_CHUNKS
        self._index = 0

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """Return a buffer whose memory is not reused before the copies into it have ended."""
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        buffer.record_stream(self._stream)  # type: ignore[arg-type]
        return buffer

    def mark(self) -> torch.Event:
        """Return an event after the computation that was submitted."""
        return torch.accelerator.current_stream(self._device).record_event()

    def fill(self, mark: torch.Event, read: Callable[[], None]) -> torch.Event:
        """Call `read` on the stream for copies."""
        self._stream.wait_event(mark)
        # The current stream is one of the thread.
        with self._stream:
            read()
            return self._stream.record_event()

    def wait(self, end: torch.Event) -> None:
        """Let the stream that computes wait for the copies, but not the host."""
        torch.accelerator.current_stream(self._device).wait_event(end)

    def read_param(self, read_range: ReadRange, name: str, tensor: torch.Tensor) -> None:
        """Read into one chunk while the other is copied."""
        flat = tensor.view(-1)
        step = self._chunks[0].numel() // tensor.dtype.itemsize
        for start in range(0, flat.numel(), step):
            values = flat[start : start + step]
            chunk = self._free_chunk()[: values.nbytes].view(values.dtype)
            # Casts are done here, on the host: the copy has the dtype of the buffer.
            read_range(name, chunk, start)
            values.copy_(chunk, non_blocking=True)
            self._ends[self._index] = self._stream.record_event()

    def _free_chunk(self) -> torch.Tensor:
        self._index = (self._index + 1) % _NUM_CHUNKS
        end = self._ends[self._index]
        # The host overwrites the chunk: the thread that reads waits.
        if end is not None:
            end.synchronize()
        return self._chunks[self._index]


def copies_to(device: torch.device, sizes: Sequence[int]) -> Copies:
    """Return how units are copied to a device.

    Args:
        device: Where they compute.
        sizes: Bytes of each parameter.
    """
    if kind_of(device).has_pinned_memory:
        return StreamCopies(device, max(sizes))
    return DirectCopies(device)
