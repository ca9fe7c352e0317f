"""`load_quantized`: loads a model with weights of 8 or 4 bits, one layer after the other."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import nn

from faccel.checkpoint.arguments import path_argument
from faccel.checkpoint.rank_calls import on_all_ranks
from faccel.checks import instance_of, one_of
from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, COLLECTIVE, effectful, updates
from faccel.errors import CheckpointError, ModelError
from faccel.inference.budget import size_text
from faccel.inference.free_memory import trim_host_memory
from faccel.inference.loading import (
    check_buffers,
    check_not_compiled,
    check_placeable,
    named_buffers,
    original_params,
    tensors_of,
)
from faccel.inference.placement_units import check_dtype, placed_dtype
from faccel.inference.quantization import (
    BITS,
    LIBRARIES,
    Quantize,
    adopt,
    check_installed,
    kernel_for,
    num_bytes_of,
    quantized_layers,
)
from faccel.inference.session import OriginalParam
from faccel.inference.set_tensors import set_buffer, set_param
from faccel.inference.weight_files import (
    StoredWeight,
    WeightReader,
    check_ties,
    stored_weights,
    weights_by_name,
)


@attrs.frozen(kw_only=True)
class QuantizedLayers:
    """What `load_quantized` did.

    Args:
        layers: Names of the layers whose weights are quantized.
        skipped: Names of the other linear layers, each with the reason.
        num_bytes: Memory of all parameters and buffers of the model.
    """

    layers: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    num_bytes: int

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} quantized layers, {size_text(self.num_bytes)} in all"]
        lines += [f"{name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


@effectful(updates("model"), AMBIENT, COLLECTIVE)
def load_quantized(
    model: nn.Module,
    path: str | os.PathLike[str],
    ctx: DistContext,
    *,
    bits: int = 8,
    library: str = "torchao",
    skip: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
) -> QuantizedLayers:
    """Load a model from safetensors files onto `ctx.device`, its linear layers in 8 or 4 bits.

    Effects: updates model, ambient, collective. Each weight is read and quantized before the next
    one: it takes the memory of the quantized model, and of the library's work on one layer, about
    eight times its size in 16 bits. Each rank has a full model.

    Args:
        model: A module, best built inside of `on_meta()`.
        path: A directory with `model.safetensors`, the name of diffusers, or an index; or a file.
        ctx: The world.
        bits: 8 or 4.
        library: `"torchao"`: weights in int8 with a scale for each row, or in int4 with one for
            128 weights. `"bitsandbytes"`: LLM.int8, or NF4 with nested scales.
        skip: Patterns of modules that keep their dtype. None is the output layer and routers:
            their rounding would go into the logits directly, and choose other experts. Tied and
            computed weights always keep theirs.
        dtype: Of the other weights and of the computation, such as `torch.bfloat16`; None is that
            of the model.

    Returns:
        The names of the layers, and the memory of the model.

    Raises:
        BackendError: The library is not installed.
        ConfigError: An argument is invalid, or a pattern matches nothing.
        CheckpointError: Names or shapes in the files differ from the model's, or a weight has
            values that are not finite. The model is unchanged after any error.
        DeviceError: The library has no kernel for the device and the dtype.
        ModelError: No layer can be quantized, or a buffer has no values.

    Examples:
        >>> import tempfile
        >>> from faccel.checkpoint import export_model
        >>> from faccel.testing import fake_context
        >>> ctx, net = fake_context(0, 1), torch.nn.Sequential(torch.nn.Linear(64, 32))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = export_model(net, folder, ctx)
        ...     result = load_quantized(net, folder, ctx)
        >>> result.layers, 64 * 32 < result.num_bytes < 1.2 * 64 * 32
        (('0',), True)
    """
    call = "faccel.inference.load_quantized(model, path, ctx)"
    require_context(ctx, call)
    absolute = path_argument("model", model, path, call)
    instance_of("model", model, nn.Module, fix="pass the module itself", error=ModelError)
    one_of("bits", bits, BITS)
    one_of("library", library, LIBRARIES)
    check_dtype(dtype)
    check_not_compiled(model)
    check_placeable(model)
    layers, skipped = quantized_layers(model, skip)
    ctx.comm.begin_call("load_quantized")
    reader = WeightReader()
    loading = _Loading(model, layers, dtype, ctx.device, reader)

    def prepare() -> None:
        loading.find(absolute)
        check_installed(library)
        loading.choose_kernel(library, bits)

    on_all_ranks(prepare, ctx, "find the weights of the model")
    try:
        on_all_ranks(loading.read, ctx, "read and quantize the weights")
    finally:
        reader.close()
    loading.install()
    return QuantizedLayers(
        layers=tuple(layers), skipped=tuple(skipped.items()), num_bytes=num_bytes_of(model)
    )


class _Loading:
    """Reads all weights of a model, then changes the model.

    Args:
        model: The module.
        layers: The layers that are quantized.
        dtype: Of the other weights; None keeps the model's.
        device: Where to.
        reader: Reads the files.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        dtype: torch.dtype | None,
        device: torch.device,
        reader: WeightReader,
    ) -> None:
        self._model, self._dtype, self._device, self._reader = model, dtype, device, reader
        self._layers = layers
        self._layer_of = {id(layer.weight): layer for layer in layers.values()}
        self._originals = original_params(model, dtype)
        self._weights: dict[str, StoredWeight] = {}
        self._quantize: Quantize | None = None
        self._plain: dict[int, torch.Tensor] = {}
        self._quantized: dict[int, nn.Linear] = {}
        self._buffers: list[tuple[nn.Module, str, torch.Tensor]] = []

    def find(self, path: str) -> None:
        """Find each tensor of the model in the files."""
        stored = stored_weights(path)
        self._weights.update(weights_by_name(tensors_of(self._model), stored))
        check_ties(tensors_of(self._model), stored, self._reader)
        check_buffers(self._model, self._weights)

    def choose_kernel(self, library: str, bits: int) -> None:
        """Choose what quantizes the weights."""
        dtypes: dict[str, torch.dtype] = {}
        for name, layer in self._layers.items():
            dtypes[name] = self._originals[id(layer.weight)].dtype
        self._quantize = kernel_for(library, bits, self._device, self._layers, dtypes)

    def read(self) -> None:
        """Read and quantize all weights. The model is not changed yet."""
        assert self._quantize is not None
        # One weight at a time is in memory with its full size.
        for key, original in self._originals.items():
            value = self._read(original.name, original.shape, original.dtype)
            if key in self._layer_of:
                _check_finite(original.name, value)
                with torch.no_grad():
                    self._quantized[key] = self._quantize(value)
                del value
                trim_host_memory()
            else:
                self._plain[key] = value
        for module, name, full_name, buffer in named_buffers(self._model):
            value = buffer.to(self._device)  # computed by the model: it keeps its dtype
            if full_name in self._weights:
                dtype = placed_dtype(buffer.dtype, self._dtype)
                value = self._read(full_name, buffer.shape, dtype)
            self._buffers.append((module, name, value))

    def _read(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        value = torch.empty(shape, dtype=dtype, device=self._device)
        self._reader.read(self._weights[name], value, 0)
        return value

    def install(self) -> None:
        """Put the weights into the model, which it updates."""
        for key, quantized in self._quantized.items():
            adopt(self._layer_of[key], quantized)
        for key, value in self._plain.items():
            _put(self._originals[key], value)
        for module, name, value in self._buffers:
            set_buffer(module, name, value)


def _check_finite(name: str, value: torch.Tensor) -> None:
    # Rounding would turn NaN into ordinary numbers: the outputs would be wrong without an error.
    smallest, largest = torch.aminmax(value)  # without a second tensor of this size
    if math.isfinite(smallest) and math.isfinite(largest):
        return
    raise CheckpointError(
        f"`{name}` has values that are not finite in {value.dtype}",
        got=f"values between {float(smallest)} and {float(largest)}",
        fix="look at the values in the file; for large ones, write `dtype=torch.bfloat16`",
    )


def _put(original: OriginalParam, value: torch.Tensor) -> None:
    """Give a parameter its values; adapters may train it, so that it requires gradients as before.

    Updates the modules that have it.
    """
    param = nn.Parameter(value, requires_grad=original.requires_grad)
    for owner, name in original.owners:
        set_param(owner, name, param)
