"""`export_model`: the full weights of a model as safetensors files, for `from_pretrained`."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence

import attrs
import torch
from torch import nn

from faccel.checkpoint.arguments import path_argument
from faccel.checkpoint.files import Slice, sync_directory, write_file, write_safetensors
from faccel.checkpoint.pretrained import active_adapter, weights_stem, write_adapter, write_config
from faccel.checkpoint.rank_calls import on_rank_0
from faccel.checkpoint.tensor_names import quantization_entries, trainable_entries
from faccel.checkpoint.tensor_views import check_storable
from faccel.checkpoint.tied_tensors import tie_keys
from faccel.checks import parse_size, shown
from faccel.context import DistContext
from faccel.effects import AMBIENT, COLLECTIVE, effectful
from faccel.errors import CheckpointError, ConfigError, short_repr
from faccel.offloaded_tensor import OffloadedTensor
from faccel.training.full_tensors import FullTensors
from faccel.training.model import WrappedModel
from faccel.training.module_names import uncompiled, with_user_names
from faccel.tree import Tree, has_inner_tensors

# Of transformers and plain models, then of diffusers.
WEIGHTS_FILES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEX_FILES = tuple(f"{name}.index.json" for name in WEIGHTS_FILES)
# Files with weights that an earlier export, also one of transformers, may have left.
_STALE_FILE = re.compile(
    r"(diffusion_pytorch_)?model(-\d{5}-of-\d{5})?\.safetensors"
    r"|(diffusion_pytorch_)?model\.safetensors\.index\.json"
    r"|pytorch_model.*\.bin(\.index\.json)?"
)

Fetch = Callable[[Sequence[str]], Mapping[str, torch.Tensor]]
"""Returns full tensors on the CPU by their names, on rank 0. Every rank must call it."""


def user_module(model: object) -> nn.Module:
    """Return the module of a wrapped model, or the module itself; not compiled.

    Effects: pure.

    Raises:
        CheckpointError: It is something else.
    """
    if isinstance(model, WrappedModel):
        return uncompiled(model.module)
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            "`model` must be a wrapped model or an nn.Module",
            got=shown(model),
            fix="pass the model itself",
        )
    return uncompiled(model)


def check_ordinary(name: str, tensor: torch.Tensor) -> None:
    """Raise for a tensor that consists of others, such as a quantized one of torchao.

    Raises:
        CheckpointError: Files of safetensors cannot contain it.
    """
    if has_inner_tensors(tensor):
        raise CheckpointError(
            f"`{name}` cannot be exported",
            got=f"a tensor of class {type(tensor).__name__}",
            fix="export a model of `tensor.dequantize()`, or write it with the library of the "
            "class; `faccel.save` stores it as it is",
        )


@attrs.frozen(eq=False)
class Weights:
    """The tensors of a model, without repetitions.

    Args:
        tensors: Each tensor under its first name.
        ties: For every other name of a tied tensor, its first name.
    """

    tensors: dict[str, torch.Tensor]
    ties: dict[str, str]  # safetensors refuses to store one memory twice

    @classmethod
    def of(
        cls, model: WrappedModel | nn.Module, state: Mapping[str, Tree], *, trained_only: bool
    ) -> Weights:
        """Return the tensors of `state`, the model's `state_dict`, under the user's names.

        They alias the state.

        With `trained_only`, the model's frozen parameters are left out.

        Raises:
            CheckpointError: One of them cannot be stored in a file that other programs read.
        """
        state = with_user_names(state)
        if trained_only:
            state = trainable_entries(model, state)
        tensors: dict[str, torch.Tensor] = {}
        ties: dict[str, str] = {}
        keys = tie_keys(model, state)
        first_names: dict[Hashable, str] = {}
        for name, tensor in state.items():
            if not isinstance(tensor, torch.Tensor):
                continue  # an extra state of the user's module
            check_storable(name, tensor)
            check_ordinary(name, tensor)
            first_name = first_names.setdefault(keys[name], name)
            if first_name == name:
                tensors[name] = tensor.detach()
            else:
                ties[name] = first_name
        return cls(tensors, ties)


def split_into_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Split names of tensors into the files of an export, in order.

    Effects: pure. A file is larger than `max_bytes` only if it has a single tensor.

    Examples:
        >>> split_into_shards({"a": 3, "b": 3, "c": 9}, max_bytes=6)
        [['a', 'b'], ['c']]
    """
    shards: list[list[str]] = [[]]
    free_bytes = max_bytes
    for name, size in sizes.items():
        if shards[-1] and size > free_bytes:
            shards.append([])
            free_bytes = max_bytes
        shards[-1].append(name)
        free_bytes -= size
    return shards


class _ExportWriter:
    """Writes an export into a temporary folder, then moves the files to their final place."""

    def __init__(
        self, path: str, num_shards: int, ties: Mapping[str, str], module: nn.Module | None
    ) -> None:
        self._path, self._num_shards, self._ties = path, num_shards, ties
        self._module = module
        self._stem = weights_stem(module)
        self._index_file = f"{self._stem}.safetensors.index.json"
        self._weight_map: dict[str, str] = {}
        self._num_bytes = 0
        # In the same directory, so that moving a file is a rename within one file system.
        self._temporary = os.path.join(path, f".tmp-export-{secrets.token_hex(4)}")
        os.makedirs(self._temporary)

    def write(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one shard."""
        name = f"{self._stem}.safetensors"
        if self._num_shards > 1:
            name = f"{self._stem}-{index + 1:05d}-of-{self._num_shards:05d}.safetensors"
        slices: list[Slice] = []
        for key, tensor in tensors.items():
            slices.append(Slice(key, tensor, [0] * tensor.ndim, tensor.shape))
        # transformers requires the format; safetensors' `load_model` reads the other names of tied
        # tensors
        metadata = {"format": "pt", **self._ties}
        write_safetensors(self._temporary, name, slices, metadata=metadata)
        for key, tensor in tensors.items():
            self._weight_map[key] = name
            self._num_bytes += tensor.numel() * tensor.dtype.itemsize

    def finish(self, dtype: torch.dtype | None) -> list[str]:
        """Write the index, move all files, delete stale ones; return the files with weights."""
        if self._num_shards > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            write_file(self._temporary, self._index_file, [text.encode()])
        if self._module is not None:
            write_config(self._module, self._temporary, dtype)
        # The old index goes first and the new one comes last: no loader ever reads a mixture of two
        # exports.
        for index_file in INDEX_FILES:
            old_index = os.path.join(self._path, index_file)
            if os.path.exists(old_index):
                os.unlink(old_index)
        names = sorted(
            os.listdir(self._temporary), key=lambda name: (name == self._index_file, name)
        )
        for name in names:
            os.replace(os.path.join(self._temporary, name), os.path.join(self._path, name))
        for entry in os.scandir(self._path):
            if entry.name not in names and _STALE_FILE.fullmatch(entry.name):
                os.unlink(entry.path)
        sync_directory(self._path)
        return sorted(set(self._weight_map.values()))

    def close(self) -> None:
        """Delete the temporary folder."""
        shutil.rmtree(self._temporary, ignore_errors=True)


@effectful(AMBIENT, COLLECTIVE)
def export_model(
    model: WrappedModel | nn.Module,
    path: str | os.PathLike[str],
    ctx: DistContext,
    *,
    max_shard_size: str | int = "5GB",
    trained_only: bool = False,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write the full tensors of a model as safetensors files, however they are sharded.

    Effects: ambient, collective. Rank 0 writes files, and replaces those of an earlier export in
    the directory. It needs the memory of one file. A model of transformers, diffusers or timm is
    written with `config.json` and the file names of its library, for `from_pretrained` or
    `timm.create_model("local-dir:PATH")`.

    Args:
        model: From `wrap`, or a module.
        path: A directory, created if it is missing.
        ctx: The world.
        max_shard_size: The largest file: `"5GB"`, `"500MB"` or a number of bytes. Several files
            have an index.
        trained_only: Whether to leave out frozen parameters. The active adapter of a PEFT model is
            written as one file with its configuration, for `PeftModel.from_pretrained`.
        dtype: What floating-point tensors are cast to in the files, as `model.to(dtype)` does; None
            keeps each dtype. The model is unchanged.

    Returns:
        The names of the files with weights, on every rank. A tied tensor is stored once; its other
        names are in the metadata of the files.

    Raises:
        CheckpointError: The files cannot be written, or a weight is quantized; on every rank.
        ConfigError: `dtype` is not a floating-point dtype of at least 16 bits.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> with tempfile.TemporaryDirectory() as path:
        ...     export_model(torch.nn.Linear(2, 1), path, fake_context(0, 1))
        ['model.safetensors']
    """
    call = "faccel.checkpoint.export_model(model, path, ctx)"
    directory = path_argument("model", model, path, call)
    module = user_module(model)
    _check_dtype(dtype)
    ctx.comm.begin_call("export_model")
    state = _state_of(model)
    if not trained_only:
        _check_described(model, with_user_names(state))
    weights = Weights.of(model, state, trained_only=trained_only)
    full_tensors = _CastTensors(FullTensors(weights.tensors, ctx), dtype)
    adapter = None
    if trained_only:
        adapter = active_adapter(module)
    if adapter is not None:
        # Every rank gathers, rank 0 writes.
        state = full_tensors.on_rank_0(list(full_tensors.sizes()))
        return on_rank_0(
            lambda: write_adapter(module, adapter, state, directory), ctx, "write the adapter"
        )
    shards = split_into_shards(full_tensors.sizes(), parse_size(max_shard_size, "max_shard_size"))
    described: nn.Module | None = module
    if trained_only:  # `from_pretrained` could not build the model from a part of its weights
        described = None
    return write_export(
        directory, shards, weights.ties, full_tensors.on_rank_0, ctx, described, dtype
    )


def _state_of(model: WrappedModel | nn.Module) -> Mapping[str, Tree]:
    """Return the state of a model; offloaded parameters are placeholders, read one by one later."""
    module = user_module(model)
    if any(isinstance(param, OffloadedTensor) for param in module.parameters()):
        return module.state_dict(keep_vars=True)
    return model.state_dict()


def _check_described(model: WrappedModel | nn.Module, state: Mapping[str, Tree]) -> None:
    """Raise for weights of bitsandbytes that other programs would take for ordinary ones.

    Raises:
        CheckpointError: The configuration of the model does not describe them.
    """
    # Models that transformers has quantized have it, so that `from_pretrained` reads the scales.
    config = getattr(user_module(model), "config", None)
    if getattr(config, "quantization_config", None) is not None:
        return
    entries = list(quantization_entries(model, state))
    if not entries:
        return
    raise CheckpointError(
        "the quantized weights of the model cannot be exported",
        got=f"`{entries[0]}`, and no `quantization_config` in the configuration of the model",
        fix="keep the files that were quantized, and export adapters with `trained_only=True`",
    )


def _check_dtype(dtype: object) -> None:
    if dtype is None:
        return
    # 8 bits need scales, which a cast does not compute.
    is_valid = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize >= 2
    if not is_valid:
        raise ConfigError(
            "`dtype` must be a floating-point dtype of at least 16 bits",
            got=short_repr(dtype),
            fix="write `dtype=torch.bfloat16`",
        )


@attrs.frozen(eq=False)
class _CastTensors:
    """Full tensors in the dtype of an export.

    Args:
        tensors: The tensors of the model.
        dtype: See `export_model`.
    """

    tensors: FullTensors
    dtype: torch.dtype | None

    def _dtype_of(self, dtype: torch.dtype) -> torch.dtype:
        # As `nn.Module.to`: ints, bools and complex numbers keep their dtypes.
        if self.dtype is None or not dtype.is_floating_point:
            return dtype
        return self.dtype

    def sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, spec in self.tensors.specs.items():
            sizes[name] = math.prod(spec.shape) * self._dtype_of(spec.dtype).itemsize
        return sizes

    def on_rank_0(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        tensors = self.tensors.on_rank_0(names)
        return {name: tensor.to(self._dtype_of(tensor.dtype)) for name, tensor in tensors.items()}


def write_export(
    path: str,
    shards: list[list[str]],
    ties: Mapping[str, str],
    fetch: Fetch,
    ctx: DistContext,
    module: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write the files of an export on rank 0; return the names of those with weights.

    Effects: ambient, collective.

    Args:
        path: The directory.
        shards: The names of the tensors in each file.
        ties: See `Weights`.
        fetch: Returns the tensors.
        ctx: The world.
        module: The module whose configuration is written, too.
        dtype: The dtype in the configuration; None is the module's.
    """
    writers: list[_ExportWriter] = []  # one on rank 0, none on the other ranks

    def create() -> None:
        writers.append(_ExportWriter(path, len(shards), ties, module))

    def write(index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        writers[0].write(index, tensors)

    on_rank_0(create, ctx, "begin an export")
    try:
        for index, names in enumerate(shards):
            tensors = fetch(names)
            # Arguments, not the loop's variables: the lambda is called at once, but linters cannot
            # know it.
            on_rank_0(lambda args=(index, tensors): write(*args), ctx, "write the export")
        return on_rank_0(lambda: writers[0].finish(dtype), ctx, "finish the export")
    finally:
        for writer in writers:
            writer.close()
