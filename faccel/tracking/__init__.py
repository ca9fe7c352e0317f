"""Loggers, progress bars, experiment trackers and meters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faccel.exports import lazy

if TYPE_CHECKING:
    from faccel.tracking.flops import flops_of as flops_of
    from faccel.tracking.goodput_categories import Goodput as Goodput
    from faccel.tracking.goodput_categories import goodput as goodput
    from faccel.tracking.journal import phase as phase
    from faccel.tracking.journal import read_journal as read_journal
    from faccel.tracking.memory_categories import PeakMemory as PeakMemory
    from faccel.tracking.memory_categories import peak_memory as peak_memory
    from faccel.tracking.meter import Meter as Meter
    from faccel.tracking.meter import Rates as Rates
    from faccel.tracking.meter import init_meter as init_meter
    from faccel.tracking.meter import rates as rates
    from faccel.tracking.meter import tick as tick
    from faccel.tracking.profiler import ProfileSummary as ProfileSummary
    from faccel.tracking.profiler import profile as profile
    from faccel.tracking.progress import show as show
    from faccel.tracking.recording import log as log
    from faccel.tracking.recording import log_figure as log_figure
    from faccel.tracking.recording import log_file as log_file
    from faccel.tracking.recording import log_images as log_images
    from faccel.tracking.recording import log_table as log_table
    from faccel.tracking.tracker import Tracker as Tracker
    from faccel.tracking.tracker import Trackers as Trackers
    from faccel.tracking.trackers import finish as finish
    from faccel.tracking.trackers import handle as handle
    from faccel.tracking.trackers import init_trackers as init_trackers

_NAMES = {
    "faccel.tracking.flops": ("flops_of",),
    "faccel.tracking.goodput_categories": ("Goodput", "goodput"),
    "faccel.tracking.journal": ("phase", "read_journal"),
    "faccel.tracking.memory_categories": ("PeakMemory", "peak_memory"),
    "faccel.tracking.meter": ("Meter", "Rates", "init_meter", "rates", "tick"),
    "faccel.tracking.profiler": ("ProfileSummary", "profile"),
    "faccel.tracking.progress": ("show",),
    "faccel.tracking.recording": ("log", "log_figure", "log_file", "log_images", "log_table"),
    "faccel.tracking.tracker": ("Tracker", "Trackers"),
    "faccel.tracking.trackers": ("finish", "handle", "init_trackers"),
}
__getattr__, __dir__, __all__ = lazy(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__, _NAMES
)
