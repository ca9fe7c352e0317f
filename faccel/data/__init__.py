"""Data order, sources and loaders; datasets of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faccel.exports import lazy

if TYPE_CHECKING:
    from faccel.data.blend import Blend as Blend
    from faccel.data.indexed_tokens import IndexedTokens as IndexedTokens
    from faccel.data.packed_tokens import PackedTokens as PackedTokens

_NAMES = {
    "faccel.data.blend": ("Blend",),
    "faccel.data.indexed_tokens": ("IndexedTokens",),
    "faccel.data.packed_tokens": ("PackedTokens",),
}
__getattr__, __dir__, __all__ = lazy(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__, _NAMES
)
