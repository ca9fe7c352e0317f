"""Collectives over nested values, and their implementations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faccel.exports import lazy

if TYPE_CHECKING:
    from faccel.comm.control import Agreement as Agreement
    from faccel.comm.control import on_local_main as on_local_main
    from faccel.comm.objects import scatter_objects as scatter_objects
    from faccel.comm.shapes import all_to_all as all_to_all
    from faccel.comm.shapes import pad_across as pad_across

_NAMES = {
    "faccel.comm.control": ("Agreement", "on_local_main"),
    "faccel.comm.objects": ("scatter_objects",),
    "faccel.comm.shapes": ("all_to_all", "pad_across"),
}  # fmt: skip
__getattr__, __dir__, __all__ = lazy(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__, _NAMES
)
