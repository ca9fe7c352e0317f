"""The ways to run a model, one row each; for authors of backends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faccel.exports import lazy

if TYPE_CHECKING:
    from faccel.backends.table import BACKENDS as BACKENDS
    from faccel.backends.table import Backend as Backend
    from faccel.backends.table import choose as choose
    from faccel.backends.table import use as use

_NAMES = {
    "faccel.backends.table": ("BACKENDS", "Backend", "choose", "use"),
}  # fmt: skip
__getattr__, __dir__, __all__ = lazy(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__, _NAMES
)
