"""Weights in 8 and 4 bits: which layers are quantized, and the libraries that quantize them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import attrs
import torch
from torch import nn

from faccel.errors import (
    BackendError,
    ConfigError,
    DeviceError,
    ModelError,
    short_repr,
    short_text,
    summary,
)
from faccel.inference.set_tensors import set_param
from faccel.parallel.sensitive_layers import (
    has_computed_weight,
    is_sensitive,
    num_owners_of_params,
    skipped_modules,
)

BITS = (8, 4)
_GROUP = 128  # weights with one scale, in torchao's kernel of 4 bits
_LARGEST_MULTIPLE = 256  # that a kernel needs
_OUTLIER = 6.0  # of activations, which LLM.int8 multiplies in 16 bits; the default of transformers

Quantize = Callable[[torch.Tensor], nn.Linear]
"""Returns a layer without bias whose weight has the quantized values of a tensor."""


def _torchao_int8(weight: torch.Tensor) -> nn.Linear:
    from torchao.quantization import Int8WeightOnlyConfig

    # Without the settings of the compiler: they are the process's.
    return _by_torchao(weight, Int8WeightOnlyConfig(set_inductor_config=False))


def _torchao_int4(packing_format: str, weight: torch.Tensor) -> nn.Linear:
    from torchao.quantization import Int4WeightOnlyConfig

    config = Int4WeightOnlyConfig(
        group_size=_GROUP,
        int4_packing_format=packing_format,  # type: ignore[arg-type]
        set_inductor_config=False,
    )
    return _by_torchao(weight, config)


def _by_torchao(weight: torch.Tensor, config: Any) -> nn.Linear:
    from torchao.quantization import quantize_

    # A layer apart: torchao also replaces a method of the layer, which the user's keeps.
    layer = _empty_layer(weight)
    set_param(layer, "weight", nn.Parameter(weight, requires_grad=False))
    quantize_(layer, config)
    return layer


def _empty_layer(weight: torch.Tensor) -> nn.Linear:
    num_rows, num_columns = weight.shape
    return nn.Linear(num_columns, num_rows, bias=False, device="meta")


def _bitsandbytes_int8(weight: torch.Tensor) -> nn.Linear:
    bnb: Any = importlib.import_module("bitsandbytes")

    num_rows, num_columns = weight.shape
    layer = bnb.nn.Linear8bitLt(
        num_columns,
        num_rows,
        bias=False,
        has_fp16_weights=False,
        threshold=_OUTLIER,
        device="meta",
    )
    # It quantizes a tensor that moves from the host to a device.
    values = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    layer.weight = values.to(weight.device)
    return layer


def _bitsandbytes_nf4(weight: torch.Tensor) -> nn.Linear:
    bnb: Any = importlib.import_module("bitsandbytes")

    num_rows, num_columns = weight.shape
    layer = bnb.nn.Linear4bit(
        num_columns,
        num_rows,
        bias=False,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    values = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = values.to(weight.device)
    return layer


@attrs.frozen
class _Library:
    """A library that quantizes.

    Args:
        requirement: What to install.
        candidates: By bits: kernels, of which the first one that the device has is used.
        fix: What to do on a device without one, by bits.
    """

    requirement: str
    candidates: Mapping[int, Sequence[Quantize]]
    fix: Mapping[int, str]


# torchao also has a 4-bit format for every device, which stores each weight in one byte: it saves
# nothing over `bits=8`.
_LIBRARIES: Mapping[str, _Library] = {
    "torchao": _Library(
        '"faccel[ao]"',
        {
            8: (_torchao_int8,),
            4: (
                functools.partial(_torchao_int4, "tile_packed_to_4d"),  # CUDA, in bfloat16
                functools.partial(_torchao_int4, "plain_int32"),  # XPU and NPU
            ),
        },
        {
            8: 'write `library="bitsandbytes"`, or `dtype=torch.bfloat16`',
            4: 'write `library="bitsandbytes"`, `dtype=torch.bfloat16` or `bits=8`',
        },
    ),
    "bitsandbytes": _Library(
        '"faccel[bnb]"',
        {8: (_bitsandbytes_int8,), 4: (_bitsandbytes_nf4,)},
        # Not torchao for 4 bits: it has kernels for fewer devices.
        {8: 'write `library="torchao"`', 4: "write `bits=8`"},
    ),
}
LIBRARIES = tuple(_LIBRARIES)


def check_installed(library: str) -> None:
    """Raise unless a library is installed, without importing it.

    Raises:
        BackendError: It is not.
    """
    if importlib.util.find_spec(library) is None:
        raise BackendError(
            f'`library="{library}"` needs the package `{library}`',
            got="no such package",
            fix=f"run `pip install {_LIBRARIES[library].requirement}`",
        )


# The libraries have no table of their kernels: whether one exists depends on the device, its
# generation, the dtype, the shape and other packages. Layers are tried, before the first weight is
# read.
def kernel_for(
    library: str,
    bits: int,
    device: torch.device,
    layers: Mapping[str, nn.Linear],
    dtypes: Mapping[str, torch.dtype],
) -> Quantize:
    """Return what quantizes the weights of layers on a device.

    Effects: ambient: imports the library, and runs small layers on the device.

    Args:
        library: Of `LIBRARIES`.
        bits: 8 or 4.
        device: Where the layers compute.
        layers: The layers by name.
        dtypes: In which each computes.

    Raises:
        DeviceError: The library has no kernel for the device, a dtype or a shape.
    """
    # A small layer stands for all with the same remainders: kernels need multiples.
    kinds: dict[tuple[int, int, torch.dtype], str] = {}
    for name, layer in layers.items():
        rows, columns = map(_small, layer.weight.shape)
        kinds.setdefault((rows, columns, dtypes[name]), name)
    problems: list[str] = []
    for quantize in _LIBRARIES[library].candidates[bits]:
        problem = _problem(quantize, kinds, device)
        if not problem:
            return quantize
        problems.append(problem)
    raise DeviceError(
        f"{library} has no kernel of {bits} bits for these layers on `{device}`",
        got=short_text("; ".join(problems)),
        fix=_LIBRARIES[library].fix[bits] + ", or add the layer to `skip`",
    )


def _small(size: int) -> int:
    return min(size, _LARGEST_MULTIPLE + size % _LARGEST_MULTIPLE)


def _problem(
    quantize: Quantize, kinds: Mapping[tuple[int, int, torch.dtype], str], device: torch.device
) -> str:
    """Return why a kernel cannot compute one of the layers; "" if it computes all."""
    for (rows, columns, dtype), name in kinds.items():
        weight = torch.linspace(-1, 1, rows * columns).reshape(rows, columns).to(device, dtype)
        try:
            with torch.no_grad():
                # In training mode, bitsandbytes has other kernels.
                quantize(weight).eval()(torch.ones(1, columns, dtype=dtype, device=device))
        # Of any class: asserts, missing packages, missing operators, unknown dtypes.
        except Exception as error:
            return f"`{name}` in {dtype}: {summary(error)}".rstrip(".")
    return ""


def quantized_layers(
    model: nn.Module, skip: Sequence[str] | None
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Return the linear layers that are quantized, and why the others are not, by name.

    Effects: pure.

    Raises:
        ConfigError: A pattern of `skip` matches no module, or `skip` is no list of names.
        ModelError: No layer is left.
    """
    _check_patterns(skip)
    left_out = skipped_modules(model, skip, is_sensitive)
    num_owners = num_owners_of_params(model)
    layers: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = _reason(module, num_owners)
        if name in left_out:
            reason = "skipped"
        if reason:
            skipped[name] = reason
        else:
            layers[name] = module
    if not layers:
        raise ModelError(
            "no layer of the model can be quantized",
            got=", ".join(f"`{name}`: {reason}" for name, reason in list(skipped.items())[:4])
            or f"a {type(model).__name__} without `nn.Linear`",
            fix="pass a model with `nn.Linear` layers, and a shorter `skip`",
        )
    return layers, skipped


def _check_patterns(skip: Any) -> None:
    if skip is None:
        return
    is_list = isinstance(skip, Sequence | Set) and not isinstance(skip, str)
    if is_list and all(isinstance(pattern, str) for pattern in skip):
        return
    raise ConfigError(
        "`skip` must be a list of names of modules",
        got=short_repr(skip),
        fix='write `skip=["lm_head"]`',
    )


def _reason(layer: nn.Linear, num_owners: Mapping[int, int]) -> str:
    """Return why a layer is not quantized; "" if it is."""
    # Subclasses compute something else in `forward`, or their owner reads the weight.
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}"
    # Before each forward, from parameters that are not replaced.
    if has_computed_weight(layer):
        return "its weight is computed"
    # The other module reads the weight as an ordinary tensor, as an embedding does.
    if num_owners[id(layer.weight)] > 1:
        return "its weight is tied"
    if layer.weight.numel() == 0:
        return "its weight has no elements"
    return ""


def adopt(layer: nn.Linear, quantized: Any) -> None:
    """Give a layer the weight of a quantized one, and its class. Updates `layer`."""
    # In place: hooks, other names of the layer and references to it stay valid.
    set_param(layer, "weight", quantized.weight)
    if type(quantized) is nn.Linear:  # the weight computes, as torchao's
        return
    for name, value in vars(quantized).items():
        vars(layer).setdefault(name, value)
    # bitsandbytes converts state dicts of older versions by such a hook.
    name = "_load_state_dict_pre_hooks"
    vars(layer)[name].update(vars(quantized)[name])
    layer.__class__ = type(quantized)
    if hasattr(quantized.weight, "module"):
        quantized.weight.module = layer


def num_bytes_of(module: nn.Module) -> int:
    """Return the memory of the parameters and buffers of a model, scales included."""
    sizes: dict[int, int] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        sizes.update(_sizes(tensor))
    return sum(sizes.values())


def _sizes(tensor: Any) -> dict[int, int]:
    """Return the bytes of the tensors that a tensor consists of, by `id`."""
    if hasattr(tensor, "__tensor_flatten__"):
        sizes: dict[int, int] = {}
        for name in tensor.__tensor_flatten__()[0]:
            sizes.update(_sizes(getattr(tensor, name)))
        return sizes
    sizes = {id(tensor): tensor.numel() * tensor.element_size()}
    # Of bitsandbytes: the scales of 8 bits, and the nested ones of 4 bits.
    if getattr(tensor, "SCB", None) is not None:
        sizes.update(_sizes(tensor.SCB))
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        sizes.update(_sizes(state.absmax))
        state = state.state2
    return sizes
