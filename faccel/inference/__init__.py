"""Models larger than the device: placement, offload, distributed inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faccel.exports import lazy

if TYPE_CHECKING:
    from faccel.inference.meta_modules import on_meta as on_meta
    from faccel.inference.offload_model import offload as offload
    from faccel.inference.place_model import place as place
    from faccel.inference.placed_model import PlacedModel as PlacedModel
    from faccel.inference.placed_model import materialize as materialize
    from faccel.inference.placement import PlacedUnit as PlacedUnit
    from faccel.inference.placement import Placement as Placement
    from faccel.inference.quantized_model import QuantizedLayers as QuantizedLayers
    from faccel.inference.quantized_model import load_quantized as load_quantized
    from faccel.inference.strategies import placement_for as placement_for
    from faccel.inference.work_sharing import share_work as share_work

_NAMES = {
    "faccel.inference.quantized_model": ("QuantizedLayers", "load_quantized"),
    "faccel.inference.offload_model": ("offload",),
    "faccel.inference.meta_modules": ("on_meta",),
    "faccel.inference.place_model": ("place",),
    "faccel.inference.placed_model": ("PlacedModel", "materialize"),
    "faccel.inference.placement": ("PlacedUnit", "Placement"),
    "faccel.inference.strategies": ("placement_for",),
    "faccel.inference.work_sharing": ("share_work",),
}  # fmt: skip
__getattr__, __dir__, __all__ = lazy(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__, _NAMES
)
