"""Stacks of the threads of this process, as values for JSON."""

from __future__ import annotations

import sys
import threading
from types import FrameType

from faccel.call_site import is_user_frame, relative_path

FrameValues = tuple[str, int, str, bool]
"""File, line, function, and whether it is the user's: the fields of `Frame`."""

_MAX_FRAMES = 200
_BACKWARD = "_engine_run_backward"


def current_stack(thread_id: int) -> tuple[FrameValues, ...] | None:
    """Return the stack of the thread that trains, innermost frame first; None if it has ended.

    On an accelerator a thread of autograd calls the user's hooks: then its frames come first.

    Effects: pure.
    """
    # A copy of references: the threads continue, and nothing of them is locked.
    frames = sys._current_frames()  # pyright: ignore[reportPrivateUsage]
    frame = frames.get(thread_id)
    if frame is None:
        return None
    stack = frames_of(frame)
    if frame.f_code.co_name == _BACKWARD:
        # Threads of C++ are not registered, or as dummies.
        known_ids: set[int | None] = set()
        for thread in threading.enumerate():
            if not thread.name.startswith("Dummy-"):
                known_ids.add(thread.ident)
        for other_id, other in frames.items():
            if other_id not in known_ids:
                return frames_of(other) + stack
    return stack


def frames_of(frame: FrameType | None) -> tuple[FrameValues, ...]:
    """Return a frame and its callers as values; only the innermost ones of a deep recursion.

    Effects: pure.
    """
    values: list[FrameValues] = []
    while frame is not None and len(values) < _MAX_FRAMES:
        is_user = is_user_frame(frame)
        values.append((relative_path(frame), frame.f_lineno, frame.f_code.co_name, is_user))
        frame = frame.f_back
    return tuple(values)


def other_stacks(thread_ids: set[int]) -> dict[str, tuple[FrameValues, ...]]:
    """Return the stacks of all threads but these, by name.

    Effects: pure.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    stacks: dict[str, tuple[FrameValues, ...]] = {}
    for thread_id, frame in sys._current_frames().items():  # pyright: ignore[reportPrivateUsage]
        if thread_id not in thread_ids:
            stacks[names.get(thread_id, f"thread {thread_id}")] = frames_of(frame)
    return stacks
