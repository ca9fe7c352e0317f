"""The traceback of an error of faccel, for the user: his own frames, without those of faccel."""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import TracebackType

from faccel.call_site import is_user_frame
from faccel.errors import FaccelError

_FOLDER = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "")
# attrs compiles the `__init__` of a record, in a file of this name and the name of the class.
_GENERATED = ("<attrs generated", " faccel.")


def hide_frames(error: BaseException) -> None:
    """Remove the frames inside of faccel from the tracebacks of an error of faccel and its causes.

    The message has the problem and the fix, and the last frame is the call of the user. Frames of
    functions of the user that faccel has called stay, such as a `state_dict` that raises.

    Effects: updates error. An error that is not a `FaccelError` keeps all of its frames.
    """
    if not isinstance(error, FaccelError):
        return
    pending: list[BaseException] = [error]
    seen: set[int] = set()
    while pending:
        current = pending.pop()
        if id(current) in seen:  # a chain of contexts can be a circle
            continue
        seen.add(id(current))
        current.__traceback__ = _user_entries(current.__traceback__)
        causes = (current.__cause__, current.__context__)
        pending.extend(cause for cause in causes if cause is not None)


def shows_frames(env: Mapping[str, str]) -> bool:
    """Return whether an environment asks for debug mode, in which tracebacks are complete.

    For errors that are raised before there is a `Config`.

    Effects: pure.
    """
    return env.get("FACCEL_DEBUG", "").lower() in ("1", "true", "yes", "on")


@contextmanager
def uncaught_without_frames(env: Mapping[str, str]) -> Generator[None]:
    """Call `hide_frames` for an error of the body that nothing catches.

    For a function that is called outside of any context. `sys.excepthook` is restored when the
    error is no longer referenced, because the user's code has caught it.

    Effects: ambient. Replaces `sys.excepthook` for as long as the error exists.
    """
    try:
        yield
    except FaccelError as error:
        if not shows_frames(env):
            _hide_frames_later(error)
        raise


def _hide_frames_later(error: FaccelError) -> None:
    previous = sys.excepthook
    # Not the error itself: the hook would keep it alive.
    error_id = id(error)

    def hook(
        error_type: type[BaseException], error: BaseException, tb: TracebackType | None
    ) -> None:
        if id(error) == error_id:
            hide_frames(error)
            tb = error.__traceback__
        previous(error_type, error, tb)

    def restore() -> None:
        if sys.excepthook is hook:  # otherwise another library has replaced it since
            sys.excepthook = previous

    sys.excepthook = hook
    # Not at exit, when Python may still print the error.
    weakref.finalize(error, restore).atexit = False


def _user_entries(tb: TracebackType | None) -> TracebackType | None:
    """Return the entries of a traceback that are outside of faccel's calls."""
    entries: list[TracebackType] = []
    is_inside = False
    while tb is not None:
        # A frame of a library is inside of faccel if faccel has called it.
        if _is_faccel(tb.tb_frame.f_code.co_filename):
            is_inside = True
        elif is_user_frame(tb.tb_frame):
            is_inside = False
        if not is_inside:
            entries.append(tb)
        tb = tb.tb_next
    # New entries: a debugger may still show the original ones.
    result: TracebackType | None = None
    for entry in reversed(entries):
        result = TracebackType(result, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return result


def _is_faccel(path: str) -> bool:
    if path.startswith(_FOLDER):
        return True
    return path.startswith(_GENERATED[0]) and _GENERATED[1] in path
