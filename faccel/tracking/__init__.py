"""Loggers, progress bars and experiment trackers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faccel.exports import lazy

if TYPE_CHECKING:
    from faccel.tracking.trackers import Tracker as Tracker
    from faccel.tracking.trackers import Trackers as Trackers
    from faccel.tracking.trackers import finish as finish
    from faccel.tracking.trackers import init_trackers as init_trackers
    from faccel.tracking.trackers import log as log

_NAMES = {
    "faccel.tracking.trackers": ("Tracker", "Trackers", "finish", "init_trackers", "log"),
}  # fmt: skip
__getattr__, __dir__, __all__ = lazy(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__, _NAMES
)
