"""What a model needs: to load, to infer, to train. From its configuration or its files."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Container, Mapping
from types import MappingProxyType

import attrs
import torch
from torch import nn

from faccel.errors import ConfigError, ModelError, short_repr
from faccel.inference.meta_modules import on_meta
from faccel.inference.placement_units import placed_dtype, sizes_by_param
from faccel.inference.quantization import quantized_layers
from faccel.inference.strategies import buffer_bytes, placement_for
from faccel.inference.weight_files import stored_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = {"int8": 8, "int4": 4}  # bits
_SCALE_BYTES = 4
_GROUP = 128  # weights of 4 bits with one scale
_ADAM_BYTES = 8  # two averages in fp32
_NOTHING: Mapping[str, int] = MappingProxyType({})


@attrs.frozen(kw_only=True)
class SizeEstimate:
    """Bytes without activations.

    Args:
        num_params: Number of elements of all parameters; a tied one counts once.
        largest_unit: Name of the largest unit, which is never split.
        largest_unit_bytes: Its size.
        load_bytes: Parameters and buffers in the dtype.
        offload_bytes: The least memory for inference with all units on disk: the two largest units.
            Quantized models are not offloaded: their full size.
        train_bytes: With AdamW: parameters, gradients and two averages. With bf16 and fp16, the
            parameters and gradients of mixed precision are in fp32.
    """

    num_params: int
    largest_unit: str
    largest_unit_bytes: int
    load_bytes: int
    offload_bytes: int
    train_bytes: int


def estimate(model: str, dtype: str | None) -> SizeEstimate:
    """Return what a model needs.

    Effects: ambient: reads files, or imports a module.

    Args:
        model: A folder with `config.json` of transformers, a folder or a file of safetensors, or
            `module:callable` that returns a model.
        dtype: Of `DTYPES` or `QUANTIZED`; None is the dtype of the model.

    Raises:
        ConfigError: There is no such model, or files do not show which weights are quantized.
        ModelError: `callable` returned something else.
    """
    if dtype in QUANTIZED:
        return _of_quantized(_module(model), QUANTIZED[dtype])
    target = DTYPES.get(dtype or "")
    if os.path.exists(model):
        # Of files without a configuration, the names show the blocks.
        if os.path.exists(os.path.join(model, "config.json")):
            return _of_module(_from_config(model), target)
        return _of_files(model, target)
    return _of_module(_from_callable(model), target)


def _module(model: str) -> nn.Module:
    if not os.path.exists(model):
        return _from_callable(model)
    if os.path.exists(os.path.join(model, "config.json")):
        return _from_config(model)
    raise ConfigError(
        "files of weights do not show which ones belong to linear layers",
        got=short_repr(model),
        fix="pass a folder with `config.json`, or `module:callable`",
    )


def _from_config(folder: str) -> nn.Module:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            "a `config.json` needs transformers, which is not installed",
            got=short_repr(folder),
            fix='run `pip install "faccel[hf]"`, or pass a file with weights',
        ) from None
    config = transformers.AutoConfig.from_pretrained(folder)
    # The class that the configuration names has the head; `AutoModel` is without it.
    names = getattr(config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    build = cls or transformers.AutoModel.from_config
    with on_meta():
        model = build(config)
    # The class builds fp32; `from_pretrained` loads the dtype of the configuration.
    dtype = getattr(config, "dtype", None)
    for param in model.parameters():
        param.data = param.data.to(placed_dtype(param.dtype, dtype))
    return model


def _from_callable(text: str) -> nn.Module:
    module_name, _, name = text.partition(":")
    fix = "pass a folder with `config.json` or safetensors files, or `module:callable`"
    if not name:
        raise ConfigError("there is no such folder or file", got=short_repr(text), fix=fix)
    # As `python -m`: a module of the current directory.
    sys.path.insert(0, os.getcwd())
    try:
        build = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError("the model cannot be imported", got=str(error), fix=fix) from None
    finally:
        sys.path.remove(os.getcwd())
    # The caller's code runs here; it may also build a large model.
    with on_meta():
        model = build()
    if not isinstance(model, nn.Module):
        raise ModelError(f"`{text}` must return an nn.Module", got=short_repr(model), fix=fix)
    return model


def _of_module(
    model: nn.Module, dtype: torch.dtype | None, saved_bytes: Mapping[str, int] = _NOTHING
) -> SizeEstimate:
    # On one device without a limit: only the sizes of the units are used.
    placement = placement_for(model, {"cpu": 2**62}, dtype=dtype)
    sizes = {unit.name: unit.num_bytes for unit in placement.units}
    for name, size in saved_bytes.items():
        sizes[_unit_of_module(name, sizes)] -= size
    units: dict[str, int] = {}
    for unit in placement.units:
        # Of a tied embedding and head, only one is in use at a time.
        units[unit.group] = max(sizes[unit.name], units.get(unit.group, 0))
    num_params, train_bytes = 0, 0
    for param in model.parameters():
        num_params += param.numel()
        train_bytes += param.numel() * _train_bytes(param.dtype)
    load_bytes = sum(sizes_by_param(model.parameters(), dtype).values())
    load_bytes -= sum(saved_bytes.values())
    return _estimate(units, num_params, load_bytes + buffer_bytes(model, dtype), train_bytes)


def _unit_of_module(name: str, units: Container[str]) -> str:
    """Return the innermost unit that contains a module; "" is the root."""
    while name and name not in units:
        name = name.rpartition(".")[0]
    return name


def _of_quantized(model: nn.Module, bits: int) -> SizeEstimate:
    """Return the sizes with the layers in 8 or 4 bits that `load_quantized` chooses."""
    layers, _ = quantized_layers(model, None)
    saved_bytes: dict[str, int] = {}
    for name, layer in layers.items():
        weight = layer.weight
        num_scales = weight.shape[0]
        if bits == 4:
            num_scales = weight.numel() // _GROUP
        num_bytes = weight.numel() * bits // 8 + _SCALE_BYTES * num_scales
        saved_bytes[name] = weight.numel() * weight.itemsize - num_bytes
    size = _of_module(model, None, saved_bytes)
    return attrs.evolve(size, offload_bytes=size.load_bytes)


def _of_files(path: str, dtype: torch.dtype | None) -> SizeEstimate:
    units: dict[str, int] = {}
    # A tied tensor is stored once.
    num_params, load_bytes, train_bytes = 0, 0, 0
    for name, weight in stored_weights(os.path.abspath(path)).items():
        numel = weight.num_bytes // weight.dtype.itemsize
        size = numel * placed_dtype(weight.dtype, dtype).itemsize
        unit = _unit_of_name(name)
        units[unit] = units.get(unit, 0) + size
        num_params += numel
        load_bytes += size
        train_bytes += numel * _train_bytes(weight.dtype)
    return _estimate(units, num_params, load_bytes, train_bytes)


def _unit_of_name(name: str) -> str:
    """Return the block of a parameter: up to the first number, else its module."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1])


def _train_bytes(dtype: torch.dtype) -> int:
    if not dtype.is_floating_point:  # quantized weights are not trained
        return dtype.itemsize
    # Mixed precision has parameters and gradients in fp32, whatever the weights are stored in.
    return 2 * torch.float32.itemsize + _ADAM_BYTES


def _estimate(
    units: dict[str, int], num_params: int, load_bytes: int, train_bytes: int
) -> SizeEstimate:
    # A model without parameters has no unit.
    largest = max(units, key=units.__getitem__, default="")
    return SizeEstimate(
        num_params=num_params,
        largest_unit=largest,
        largest_unit_bytes=units.get(largest, 0),
        load_bytes=load_bytes,
        offload_bytes=sum(sorted(units.values())[-2:]),
        train_bytes=train_bytes,
    )
