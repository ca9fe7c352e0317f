"""Random numbers: generators from integers, and the state of the process-wide ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faccel.exports import lazy

if TYPE_CHECKING:
    from faccel.random.seeding import RngState as RngState
    from faccel.random.seeding import generator as generator

_NAMES = {
    "faccel.random.seeding": ("RngState", "generator"),
}  # fmt: skip
__getattr__, __dir__, __all__ = lazy(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__, _NAMES
)
