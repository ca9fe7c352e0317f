"""Where a rank is in its program: what it waits for, its line, its process groups' progress."""

from __future__ import annotations

import json
import os
import sys
import time
from types import FrameType

import attrs
import torch

from faccel.call_site import call_site_of, is_user_frame

# A thread that waits for another rank needs none of the CPU; one that computes needs all of it.
_MAX_CPU_LOAD = 0.1
_LIBRARY_FOLDERS = (
    os.path.join(os.path.dirname(torch.__file__), ""),
    os.path.join(os.path.dirname(os.path.dirname(__file__)), ""),
)
# gloo counts messages as collectives, but a message concerns two ranks only.
_MESSAGES = ("send", "recv", "isend", "irecv", "batch_isend_irecv")


@attrs.frozen
class Position:
    """Where a rank is.

    Args:
        doing: What it does, with the user's line.
        waits_in: The process group in whose last collective it waits for the other ranks; empty if
            that is unknown.
        num_collectives: By process group, how many collectives this rank has begun.
    """

    doing: str
    waits_in: str
    num_collectives: dict[str, int]

    def to_json(self) -> str:
        """Return the position as text for the store."""
        return json.dumps(attrs.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Position:
        """Return the position that `to_json` has written."""
        return cls(**json.loads(text))

    def is_in_call_of(self, other: Position) -> bool:
        """Return whether both ranks wait in one collective, as the same call."""
        if not self.waits_in or self.waits_in != other.waits_in:
            return False
        if call_of(self.doing) != call_of(other.doing):
            return False
        number = self.num_collectives.get(self.waits_in)
        return number == other.num_collectives.get(self.waits_in)

    def waits_forever_for(self, other: Position) -> bool:
        """Return whether neither of two ranks can continue.

        This one waits for `other` in a collective. If `other` has not begun that one, but another
        one that this rank has not begun, then `other` waits for this rank. A rank that is late has
        begun no such collective.

        Examples:
            >>> saving = Position("save", "calls", {"calls": 3, "world": 7})
            >>> saving.waits_forever_for(Position("backward", "", {"calls": 2, "world": 8}))
            True
            >>> saving.waits_forever_for(Position("read a file", "", {"calls": 2, "world": 7}))
            False
        """
        number = self.num_collectives.get(self.waits_in)
        other_number = other.num_collectives.get(self.waits_in)
        # A group that only one of the ranks has created concerns one of them.
        if number is None or other_number is None or other_number > number:
            return False
        if other_number == number:
            # both in the collective of one number: they exchange nothing if it is not the same
            return other.waits_in == self.waits_in and call_of(other.doing) != call_of(self.doing)
        for group, num_begun in self.num_collectives.items():
            if other.num_collectives.get(group, 0) > num_begun:
                return True
        return False


def call_of(doing: str) -> str:
    """Return the name of the call in a text such as `"save at train.py:3"`.

    Effects: pure.
    """
    return doing.partition(" at ")[0]


@attrs.frozen
class ThreadSample:
    """A thread at one moment.

    Args:
        instruction: Identifies the instruction that it executes.
        cpu_s: How long it has computed; 0 where the system does not count that.
        is_in_library: Whether torch or faccel is executing, except for messages to one rank.
        doing: The function that the user's code has called, and the user's line.
    """

    instruction: tuple[int, int]
    cpu_s: float
    is_in_library: bool
    doing: str

    def is_blocked_since(self, earlier: ThreadSample, elapsed_s: float) -> bool:
        """Return whether the thread has waited in torch or faccel since an earlier sample."""
        if not self.is_in_library or self.instruction != earlier.instruction:
            return False
        return self.cpu_s - earlier.cpu_s < _MAX_CPU_LOAD * elapsed_s


def sample_thread(thread_id: int) -> ThreadSample | None:
    """Return what a thread of this process is doing; None if it has ended.

    Effects: pure. Takes microseconds; the thread does not notice it.
    """
    frame = sys._current_frames().get(thread_id)  # pyright: ignore[reportPrivateUsage]
    if frame is None:
        return None
    code = frame.f_code
    is_in_library = code.co_filename.startswith(_LIBRARY_FOLDERS) and code.co_name not in _MESSAGES
    # The identity and not the frame, which would keep the local values of the user alive.
    instruction = (id(frame), frame.f_lasti)
    return ThreadSample(instruction, _cpu_time(thread_id), is_in_library, _doing(frame))


def _cpu_time(thread_id: int) -> float:
    # Not on Windows.
    if not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread_id))


def _doing(frame: FrameType) -> str:
    """Return the function that the user's code has called, and the user's line."""
    name = ""
    current: FrameType | None = frame
    while current is not None and not is_user_frame(current):
        name = current.f_code.co_name
        current = current.f_back
    # `model(x)` calls `__call__`
    if not name or name.startswith("_"):
        name = "a call"
    return f"{name} at {call_site_of(frame)}"
