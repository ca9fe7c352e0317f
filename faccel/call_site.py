"""Where each rank is and what it does there, for the messages of errors."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch

_INSIDE = tuple(
    os.path.dirname(os.path.abspath(file)) + os.sep
    for file in (torch.__file__, __file__, threading.__file__)
)


_FOLDER = os.path.join(
    os.path.abspath(os.curdir), ""
)  # where the process began: names are short, and alike on all ranks
_here = threading.local()


@contextmanager
def standing_at(site: str) -> Generator[None]:
    """Let `call_site` of this thread be `site` in the body, for what happens at another line than it was asked at."""
    before = getattr(_here, "site", None)
    _here.site = site
    try:
        yield
    finally:
        _here.site = before


def call_site() -> str:
    """Return `file:line` of the innermost frame that is the user's: neither torch's nor faccel's.

    Effects: pure.
    """
    if getattr(_here, "site", None) is not None:
        return _here.site
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_INSIDE) and not name.startswith("<frozen"):
            return f"{name.removeprefix(_FOLDER)}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown"


def roll(doing: Mapping[int, str]) -> str:
    """Say what each rank is doing, ranks that do the same in one clause.

    Effects: pure.

    Examples:
        >>> roll({0: "barrier at train.py:4", 1: "returned", 2: "returned"})
        'rank 0: barrier at train.py:4, ranks 1 to 2: returned'
    """
    groups: dict[str, list[int]] = {}
    for rank, what in doing.items():
        groups.setdefault(what, []).append(rank)
    return ", ".join(f"{_span(ranks)}: {what}" for what, ranks in groups.items())


def _span(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    is_run = ranks[-1] - ranks[0] == len(ranks) - 1
    return f"ranks {ranks[0]} to {ranks[-1]}" if is_run else f"ranks {', '.join(map(str, ranks))}"
