"""The user's line that is being executed, for error messages."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType, TracebackType


def _folder_of(file: str) -> str:
    # With a separator at the end: `.../torch` is also the start of `.../torchvision`.
    return os.path.join(os.path.dirname(os.path.abspath(file)), "")


def _folder_of_torch() -> str:
    # Found, not imported: the launcher prints tracebacks, and importing torch takes seconds.
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return _folder_of(spec.origin)


# Frames of these folders are not the user's: torch, faccel, and Python's own library.
_LIBRARY_FOLDERS = (
    _folder_of_torch(),
    _folder_of(__file__),
    # `threading` is a module of the standard library, so its folder contains all of it.
    _folder_of(threading.__file__),
)

# Paths are relative to where the process started: short, and equal on all ranks.
_START_FOLDER = os.path.join(os.path.abspath(os.curdir), "")

# One per thread: the ranks of `simulate` are threads of one process.
_override = threading.local()


@contextmanager
def override_call_site(site: str) -> Generator[None]:
    """Let `call_site` of this thread return `site` in the body.

    For a collective that runs at the end of a `with` block, but is called where the block begins.
    """
    previous = getattr(_override, "site", None)
    _override.site = site
    try:
        yield
    finally:
        _override.site = previous


def call_site() -> str:
    """Return `file:line` of the innermost frame that belongs to neither torch nor faccel.

    Effects: pure.
    """
    site = getattr(_override, "site", None)
    if site is not None:
        return site
    # Not `inspect.stack()`, which reads the source file of every frame from the disk.
    return call_site_of(sys._getframe(1))  # pyright: ignore[reportPrivateUsage]


def call_site_of(frame: FrameType) -> str:
    """Return the `call_site` of a frame of any thread.

    Effects: pure.
    """
    current: FrameType | None = frame
    while current is not None:
        if is_user_frame(current):
            return f"{relative_path(current)}:{current.f_lineno}"
        current = current.f_back
    # A hook that a C++ thread calls, as autograd's threads do, has no frame of the user.
    return "unknown"


def relative_path(frame: FrameType) -> str:
    """Return the file of a frame, relative to where the process started if it is below it.

    Effects: pure.
    """
    return frame.f_code.co_filename.removeprefix(_START_FOLDER)


def call_site_of_error(tb: TracebackType | None) -> str:
    """Return `file:line` of the innermost frame of a traceback that is the user's.

    Effects: pure.
    """
    site = "unknown"
    while tb is not None:
        if is_user_frame(tb.tb_frame):
            path = tb.tb_frame.f_code.co_filename
            site = f"{path.removeprefix(_START_FOLDER)}:{tb.tb_lineno}"
        tb = tb.tb_next
    return site


def is_user_frame(frame: FrameType) -> bool:
    """Return whether a frame executes code of neither torch, faccel nor Python's own library.

    Effects: pure.
    """
    path = frame.f_code.co_filename
    # `<frozen runpy>`, `<frozen importlib._bootstrap>`: Python modules that have no file
    return not path.startswith(_LIBRARY_FOLDERS) and not path.startswith("<frozen")


def describe_ranks(actions: Mapping[int, str]) -> str:
    """Return one line with the action of each rank; ranks with the same action form one clause.

    Effects: pure.

    Examples:
        >>> describe_ranks({0: "barrier at train.py:4", 1: "returned", 2: "returned"})
        'rank 0: barrier at train.py:4, ranks 1 to 2: returned'
    """
    # On a large mesh all ranks but a few do the same: one clause for those keeps the line short.
    ranks_by_action: dict[str, list[int]] = {}
    for rank, action in actions.items():
        ranks_by_action.setdefault(action, []).append(rank)
    clauses = [f"{_join(ranks)}: {action}" for action, ranks in ranks_by_action.items()]
    return ", ".join(clauses)


def _join(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks[-1] - ranks[0] == len(ranks) - 1:  # without a gap: `actions` is in order of rank
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
