"""Linear layers in fp8 by NVIDIA's Transformer Engine. Not run on hardware by us."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from faccel.context import DistContext
from faccel.errors import BackendError, ConfigError, DeviceError, ModelError, short_repr
from faccel.plan import Fp8, Plan
from faccel.plan_units import TransformerEngineConfig
from faccel.protocols import RunMethod
from faccel.tree import Tree

_RECIPES: Mapping[str, str] = {
    "delayed": "DelayedScaling",
    "mxfp8": "MXFP8BlockScaling",
    "tensorwise": "Float8CurrentScaling",
}
"""The classes of `transformer_engine.common.recipe`, by the name of the recipe here."""


class TransformerEngineLinear(nn.Linear):
    """A linear layer that multiplies with the layer of Transformer Engine, which has no state here.

    That layer is no submodule: parameters keep their names, and its state, pickled bytes, is
    not in checkpoints.
    """

    engine_layer: tuple[Any]
    fp8_options: Fp8

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `T[..., out]` of `T[..., in]`."""
        options = self.fp8_options
        (layer,) = self.engine_layer
        # Set in each forward: under FSDP2 it is the gathered parameter.
        layer._parameters.update(self._parameters)
        if options.recipe == "delayed":  # the context contains the model: `with_history`
            _check_runs_once()
            return _with_full_blocks(layer, input, multiple_of(options))
        with _quantized(options, is_training=self.training):
            return _with_full_blocks(layer, input, multiple_of(options))


def multiple_of(options: Fp8) -> int:
    """Return what the sides of operands must be multiples of.

    Effects: pure.

    Examples:
        >>> multiple_of(Fp8(backend="te", recipe="mxfp8")), multiple_of(Fp8())
        (32, 16)
    """
    if options.recipe == "mxfp8":
        return 32  # the elements of a scale
    return 16  # the operands of the matrix units


def convert(layer: nn.Linear, options: Fp8) -> None:
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
    vars(layer)["fp8_options"] = options
    layer.__class__ = TransformerEngineLinear


def check_plan(options: Fp8, plan: Plan, ctx: DistContext) -> None:
    """Raise where layers of Transformer Engine cannot run as planned.

    Raises:
        ConfigError: They would be sharded, or run in another order than a history needs.
    """
    spec = ctx.mesh.spec
    if spec.tp > 1:
        raise ConfigError(
            "the mesh axis `tp` does not shard layers of Transformer Engine",
            got=f"tp={spec.tp}",
            fix='write `faccel.parallel.Fp8(backend="torchao")`',
        )
    if options.recipe != "delayed":
        return
    # What runs a forward in backward, in a graph, or several ones before their backwards.
    planned = {
        "activation_checkpoint": plan.activation_checkpoint,
        "compile": plan.compile,
        "pipeline": plan.pipeline if spec.pp > 1 else None,
    }
    for name, value in planned.items():
        if value is not None:
            raise ConfigError(
                f'the recipe "delayed" keeps a history of each forward, and excludes `{name}`',
                got=f"{name}={short_repr(value)}",
                fix=f'write `recipe="tensorwise"`, or leave `{name}` out',
            )


def check_recipe(options: Fp8) -> None:
    """Raise unless the installed Transformer Engine has the recipe, and runs it on the device.

    Raises:
        BackendError: This version does not have the recipe.
        DeviceError: It does not run the recipe on this device.
    """
    recipe_of(options)
    if options.recipe != "mxfp8":
        return
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    if not hasattr(engine, "is_mxfp8_available"):  # of the versions that have `autocast`
        return
    is_available, reason = engine.is_mxfp8_available(return_reason=True)
    if not is_available:
        raise DeviceError(
            'Transformer Engine does not run the recipe "mxfp8" on this device',
            got=reason,
            fix='write `recipe="tensorwise"`',
        )


@functools.cache
def recipe_of(options: Fp8) -> object:
    """Return the recipe of Transformer Engine; equal options have the same one.

    Raises:
        BackendError: The installed version does not have it.
    """
    module: Any = importlib.import_module("transformer_engine.common.recipe")
    name = _RECIPES[options.recipe]
    if not hasattr(module, name):
        raise BackendError(
            f"the installed Transformer Engine has no recipe `{name}`",
            got=f"recipe={short_repr(options.recipe)}",
            fix='run `pip install --upgrade --no-build-isolation "transformer_engine[pytorch]"`',
        )
    return getattr(module, name)(**_arguments(options, module.Format))


def _arguments(options: Fp8, formats: Any) -> dict[str, object]:
    """Return the arguments of a recipe. The others have Transformer Engine's defaults."""
    config = _config(options)
    arguments: dict[str, object] = {}
    if config.format is not None:
        arguments["fp8_format"] = getattr(formats, config.format.upper())
    if options.recipe != "delayed":
        return arguments
    # Each rank scales by the elements that it has, as with the other recipes. Otherwise each
    # forward and backward would reduce over the world, also where the ranks do not run equally.
    arguments["reduce_amax"] = False
    history = {
        "margin": config.margin,
        "amax_history_len": config.amax_history,
        "amax_compute_algo": config.amax,
    }
    return arguments | {name: value for name, value in history.items() if value is not None}


def with_history(run: RunMethod, module: nn.Module, plan: Plan, ctx: DistContext) -> RunMethod:
    """Return `run`, after which the scales are computed that the next forward uses.

    Transformer Engine moves the histories of all layers by one forward when its outermost context
    ends, and those of gradients in the backward of the first layer in that context; an inner
    context has a first layer, too. So one context contains a forward of the model, and no layer has
    one. Without histories it is `run` itself.
    """
    options = plan.fp8
    if ctx.config.mixed_precision != "fp8" or options is None or options.recipe != "delayed":
        return run

    def run_with_history(method: str, *args: Tree, **kwargs: Tree) -> Tree:
        with _quantized(options, is_training=module.training):
            return run(method, *args, **kwargs)

    return run_with_history


def _config(options: Fp8) -> TransformerEngineConfig:
    return options.te or TransformerEngineConfig()


def _quantized(options: Fp8, *, is_training: bool) -> AbstractContextManager[object]:
    """Return the context in which Transformer Engine's layers multiply in fp8."""
    enabled = is_training or _config(options).in_eval
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    recipe = recipe_of(options)
    if hasattr(engine, "autocast"):  # from version 2.9, which deprecates the other name
        return engine.autocast(enabled=enabled, recipe=recipe)
    return engine.fp8_autocast(enabled=enabled, fp8_recipe=recipe)


def _with_full_blocks(
    layer: Callable[[torch.Tensor], torch.Tensor], input: torch.Tensor, multiple: int
) -> torch.Tensor:
    """Return `T[..., out]` of a layer that takes a multiple of rows only.

    Rows of zeros change no largest element, and add zero to the gradients of parameters.
    """
    rows = input.reshape(-1, input.shape[-1])
    num_missing = -len(rows) % multiple
    if num_missing == 0:
        return layer(input)
    output = layer(nn.functional.pad(rows, (0, 0, 0, num_missing)))
    return output[: len(rows)].reshape(*input.shape[:-1], -1)


def _check_runs_once() -> None:
    """Raise in a backward, where only activation checkpointing runs a forward."""
    if torch._C._current_graph_task_id() != -1:  # pyright: ignore
        raise ModelError(
            'the recipe "delayed" keeps a history of each forward, and activation checkpointing '
            "runs forwards twice",
            got="a forward in backward",
            fix='write `recipe="tensorwise"`, or turn off activation checkpointing in the model',
        )
