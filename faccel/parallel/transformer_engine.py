"""Linear layers in fp8 by NVIDIA's Transformer Engine. Not run on hardware by us."""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


class TransformerEngineLinear(nn.Linear):
    """A linear layer that multiplies with the layer of Transformer Engine, which has no state here.

    That layer is no submodule: parameters keep their names, and its own state, pickled bytes, is
    not in checkpoints.
    """

    engine_layer: tuple[Any]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `T[..., out]` of `T[..., in]`."""
        (layer,) = self.engine_layer
        # Set in each forward: under FSDP2 it is the gathered parameter.
        layer._parameters.update(self._parameters)
        with _fp8():
            return layer(input)


def convert(layer: nn.Linear) -> None:
    """Let a layer multiply with Transformer Engine, in place. Updates `layer`."""
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    num_columns, num_rows = layer.weight.shape
    # On meta: its parameters are replaced in each forward.
    engine_layer = engine.Linear(
        num_rows,
        num_columns,
        bias="bias" in dict(layer.named_parameters()),
        params_dtype=layer.weight.dtype,
        device="meta",
    )
    # In a tuple, so that `nn.Module` does not register it.
    vars(layer)["engine_layer"] = (engine_layer,)
    layer.__class__ = TransformerEngineLinear


def _fp8() -> AbstractContextManager[object]:
    """Return the context in which Transformer Engine's layers multiply in fp8."""
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    if hasattr(engine, "autocast"):  # from version 2.9, which deprecates the other name
        return engine.autocast(enabled=True, recipe=_recipe())
    return engine.fp8_autocast(enabled=True, fp8_recipe=_recipe())


@functools.cache
def _recipe() -> object:
    # One scale for each tensor, computed from it. Unlike delayed scaling it has no history, which
    # a checkpoint would have to contain.
    recipe: Any = importlib.import_module("transformer_engine.common.recipe")
    return recipe.Float8CurrentScaling()
