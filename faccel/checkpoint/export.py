"""Exports: the weights of a model as safetensors files, as the Hugging Face ecosystem reads them."""

from __future__ import annotations

import io
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
from faccel.checkpoint.codec_modules import first_names
from faccel.checkpoint.dcp import Reader
from faccel.checkpoint.files import Slice, sync_directory, write_file, write_safetensors
from faccel.checkpoint.pretrained import active_adapter, write_adapter, write_config
from faccel.checkpoint.rank_calls import on_all_ranks, on_rank_0
from faccel.checkpoint.tensor_names import trainable_entries
from faccel.checks import shown
from faccel.comm.objects import gather_objects
from faccel.context import DistContext
from faccel.effects import AMBIENT, COLLECTIVE, effectful, updates
from faccel.errors import CheckpointError, ConfigError
from faccel.flat_shard import FlatShard
from faccel.training.model import WrappedModel
from faccel.tree import Tree, full_tensor, local_tensor

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Files with weights that an earlier export, also one of transformers, may have left.
_STALE_FILE = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|pytorch_model.*\.bin(\.index\.json)?"
)
_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}

Fetch = Callable[[Sequence[str]], Mapping[str, torch.Tensor]]
"""Returns full tensors on the CPU by their names, on rank 0. Every rank must call it."""


def parse_size(size: str | int) -> int:
    """Return a size such as `"5GB"` in bytes.

    Effects: pure.

    Raises:
        ConfigError: It is not a size.

    Examples:
        >>> parse_size("1.5KB"), parse_size("2 MiB"), parse_size(100)
        (1500, 2097152, 100)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(
            "`max_shard_size` must be a positive size",
            got=repr(size),
            fix='write `"5GB"`, `"500MB"` or a number of bytes',
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _user_module(model: object) -> nn.Module:
    if isinstance(model, WrappedModel):
        return model.module
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            "`model` must be a wrapped model or an nn.Module",
            got=shown(model),
            fix="pass the model itself",
        )
    return model


def _memory_key(tensor: torch.Tensor) -> Hashable:
    """Return a key that is equal for two names of one tied tensor."""
    if isinstance(tensor, FlatShard):
        return id(tensor.param)
    shard = local_tensor(tensor)
    start = (shard.untyped_storage().data_ptr(), shard.storage_offset())
    return start, tensor.shape, shard.stride(), tensor.dtype


@attrs.frozen(eq=False)
class _Weights:
    """The tensors of a model, without repetitions.

    Args:
        tensors: Each tensor under its first name.
        ties: For every other name of a tied tensor, its first name.
    """

    tensors: dict[str, torch.Tensor]
    ties: dict[str, str]

    @classmethod
    def of(cls, model: WrappedModel | nn.Module, *, trained_only: bool) -> _Weights:
        state: Mapping[str, Tree] = model.state_dict()
        if trained_only:
            state = trainable_entries(_user_module(model), state)
        tensors: dict[str, torch.Tensor] = {}
        ties: dict[str, str] = {}
        first_names: dict[Hashable, str] = {}
        for name, tensor in state.items():
            if not isinstance(tensor, torch.Tensor):
                continue  # an extra state of the user's module
            # Empty tensors have no memory of their own: they all would be tied.
            key = _memory_key(tensor) if tensor.numel() else name
            first_name = first_names.setdefault(key, name)
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

    def __init__(self, path: str, num_shards: int, ties: Mapping[str, str]) -> None:
        self._path, self._num_shards, self._ties = path, num_shards, ties
        self._weight_map: dict[str, str] = {}
        self._num_bytes = 0
        self._temporary = os.path.join(path, f".tmp-export-{secrets.token_hex(4)}")
        os.makedirs(self._temporary)

    def write(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one shard."""
        name = _WEIGHTS
        if self._num_shards > 1:
            name = f"model-{index + 1:05d}-of-{self._num_shards:05d}.safetensors"
        slices = [Slice(key, tensor, [0] * tensor.ndim) for key, tensor in tensors.items()]
        # transformers requires the format; safetensors' `load_model` reads the other names of tied
        # tensors
        metadata = {"format": "pt", **self._ties}
        write_safetensors(self._temporary, name, slices, metadata=metadata)
        for key, tensor in tensors.items():
            self._weight_map[key] = name
            self._num_bytes += tensor.numel() * tensor.dtype.itemsize

    def finish(self, module: nn.Module | None) -> list[str]:
        """Write the index, move all files, delete stale ones; return the files with weights."""
        if self._num_shards > 1:
            index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._weight_map}
            text = json.dumps(index, indent=2, sort_keys=True)
            write_file(self._temporary, _INDEX, [text.encode()])
        if module is not None:
            write_config(module, self._temporary)
        # The old index goes first and the new one comes last: no loader ever reads a mixture of two
        # exports.
        old_index = os.path.join(self._path, _INDEX)
        if os.path.exists(old_index):
            os.unlink(old_index)
        names = sorted(os.listdir(self._temporary), key=lambda name: (name == _INDEX, name))
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
) -> list[str]:
    """Write the full tensors of a model as safetensors files, however they are sharded.

    Effects: ambient, collective. Rank 0 writes files, and replaces those of an earlier export in
    the directory. It needs the memory of one file. A transformers model is written with
    `config.json`, for `from_pretrained`.

    Args:
        model: From `wrap`, or a module.
        path: A directory, created if it is missing.
        ctx: The world.
        max_shard_size: The largest file: `"5GB"`, `"500MB"` or a number of bytes. Several files
            have an index.
        trained_only: Whether to leave out frozen parameters. The active adapter of a PEFT model is
            written as one file with its configuration, for `PeftModel.from_pretrained`.

    Returns:
        The names of the files with weights, on every rank. A tied tensor is stored once; its other
        names are in the metadata of the files.

    Raises:
        CheckpointError: The files cannot be written; on every rank.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> with tempfile.TemporaryDirectory() as path:
        ...     export_model(torch.nn.Linear(2, 1), path, fake_context(0, 1))
        ['model.safetensors']
    """
    call = "faccel.checkpoint.export_model(model, path, ctx)"
    directory = path_argument("model", model, path, call)
    module = _user_module(model)
    weights = _Weights.of(model, trained_only=trained_only)
    fetcher = _Fetcher(weights.tensors, ctx)
    adapter = active_adapter(module) if trained_only else None
    if adapter is not None:
        state = fetcher.fetch(list(fetcher.sizes()))
        return on_rank_0(
            lambda: write_adapter(module, adapter, state, directory), ctx, "write the adapter"
        )
    shards = split_into_shards(fetcher.sizes(), parse_size(max_shard_size))
    described = None if trained_only else module
    return write_export(directory, shards, weights.ties, fetcher.fetch, ctx, described)


@attrs.frozen
class _TensorSpec:
    """Shape, dtype and pipeline rank of a tensor.

    Args:
        pp_rank: The first rank of the axis `pp` that has the tensor.
        shape: Its full shape.
        dtype: Its dtype.
    """

    pp_rank: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class _Fetcher:
    """Gathers full tensors of a model on rank 0, from shards and from the stages of a pipeline."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], ctx: DistContext) -> None:
        self._tensors = tensors
        self._ctx = ctx
        self._specs: dict[str, _TensorSpec] = {}
        pp_rank = ctx.comm.rank("pp")
        specs: dict[str, _TensorSpec] = {}
        for name, tensor in tensors.items():
            specs[name] = _TensorSpec(pp_rank, tuple(tensor.shape), tensor.dtype)
        stages = [specs]
        if ctx.mesh.spec.pp > 1:
            stages = gather_objects(specs, ctx, axis="pp")
        for stage in stages:
            for name, spec in stage.items():
                self._specs.setdefault(name, spec)

    def sizes(self) -> dict[str, int]:
        """Return the sizes of all tensors of the model in bytes."""
        sizes: dict[str, int] = {}
        for name, spec in self._specs.items():
            sizes[name] = math.prod(spec.shape) * spec.dtype.itemsize
        return sizes

    def fetch(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        """Return full tensors on the CPU, on rank 0. Collective."""
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            tensor = self._full_tensor(name)
            if self._ctx.is_main:
                tensors[name] = tensor.cpu()
        return tensors

    def _full_tensor(self, name: str) -> torch.Tensor:
        if self._ctx.mesh.spec.pp == 1:
            return full_tensor(self._tensors[name])
        spec = self._specs[name]
        if spec.pp_rank == self._ctx.comm.rank("pp"):
            tensor = full_tensor(self._tensors[name]).to(self._ctx.device)
        else:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self._ctx.device)
        return self._ctx.comm.broadcast(tensor, spec.pp_rank, "pp")


def write_export(
    path: str,
    shards: list[list[str]],
    ties: Mapping[str, str],
    fetch: Fetch,
    ctx: DistContext,
    module: nn.Module | None = None,
) -> list[str]:
    """Write the files of an export on rank 0; return the names of those with weights.

    Effects: ambient, collective.

    Args:
        path: The directory.
        shards: The names of the tensors in each file.
        ties: See `_Weights`.
        fetch: Returns the tensors.
        ctx: The world.
        module: The module whose configuration is written, too.
    """
    writers: list[_ExportWriter] = []  # one on rank 0, none on the other ranks

    def create() -> None:
        writers.append(_ExportWriter(path, len(shards), ties))

    def write(index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        writers[0].write(index, tensors)

    on_rank_0(create, ctx, "begin an export")
    try:
        for index, names in enumerate(shards):
            tensors = fetch(names)
            # Arguments, not the loop's variables: the lambda is called at once, but linters cannot
            # know it.
            on_rank_0(lambda args=(index, tensors): write(*args), ctx, "write the export")
        return on_rank_0(lambda: writers[0].finish(module), ctx, "finish the export")
    finally:
        for writer in writers:
            writer.close()


@effectful(AMBIENT, COLLECTIVE, updates("model"))
def load_model(
    model: WrappedModel | nn.Module,
    path: str | os.PathLike[str],
    ctx: DistContext,
    *,
    trained_only: bool = False,
) -> None:
    """Load safetensors files, from `export_model` or from the Hugging Face ecosystem, into a model.

    Effects: updates model, ambient, collective. Files are memory-mapped and each rank reads its
    shards, so loading needs the memory of one tensor besides the model. Weights are cast to the
    model's dtypes.

    Args:
        model: From `wrap`, or a module.
        path: A directory with `model.safetensors` or an index, or one file.
        ctx: The world.
        trained_only: Whether the files are from `export_model(..., trained_only=True)`.

    Raises:
        CheckpointError: Names or shapes differ from the model's; the message names them. The model
            is unchanged.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> ctx, net = fake_context(0, 1), torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = export_model(net, path, ctx)
        ...     load_model(net, path, ctx)
    """
    call = "faccel.checkpoint.load_model(model, path, ctx)"
    absolute = path_argument("model", model, path, call)
    _user_module(model)
    state = model.state_dict()
    weights = _Weights.of(model, trained_only=trained_only)
    readers: list[Reader] = []
    destinations: dict[str, torch.Tensor] = {}

    def plan() -> None:
        folder, files = _files_with_weights(absolute)
        readers.append(Reader(folder, files))
        destinations.update(_destinations(weights, readers[0]))

    on_all_ranks(plan, ctx, "find the weights of the model")
    on_all_ranks(lambda: readers[0].read(destinations), ctx, "read the weights")
    # Most modules' `state_dict` returns the parameters themselves, which have been read into; some
    # return copies.
    on_all_ranks(lambda: model.load_state_dict(state), ctx, "load the weights")


def _destinations(weights: _Weights, reader: Reader) -> dict[str, torch.Tensor]:
    """Return the model's tensors under the names in the files.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    stored = reader.stored()
    destinations = dict(weights.tensors)
    for name, first_name in weights.ties.items():
        # the files may contain a tied tensor under another of its names
        if name in stored and first_name not in stored and first_name in destinations:
            destinations[name] = destinations.pop(first_name)
    missing = destinations.keys() - stored.keys()
    unknown = stored.keys() - destinations.keys() - weights.ties.keys()
    misshapen: set[str] = set()
    for name, tensor in destinations.items():
        if name in stored and stored[name].shape != tensor.shape:
            misshapen.add(name)
    _check_empty(missing, "missing in the files")
    _check_empty(unknown, "unknown to the model")
    _check_empty(misshapen, "of another shape")
    return destinations


def _check_empty(names: set[str], problem: str) -> None:
    if names:
        raise CheckpointError(
            "the weights do not fit the model",
            got=f"{first_names(names)}: {problem}",
            fix="build the model that was exported; convert other formats with `from_pretrained`",
        )


def _files_with_weights(path: str) -> tuple[str, list[str]]:
    """Return the folder and the names of the files of an export."""
    if os.path.isfile(path):
        return os.path.dirname(path), [os.path.basename(path)]
    index = os.path.join(path, _INDEX)
    if os.path.exists(index):
        with open(index) as file:
            names = sorted(set(json.load(file).get("weight_map", {}).values()))
        # a name with a directory, such as `../secret`, would read outside the folder
        if not names or any(os.path.basename(name) != name for name in names):
            raise CheckpointError(
                "the index names no files of its directory", got=f"`{index}`", fix="export it again"
            )
        return path, names
    if os.path.exists(os.path.join(path, _WEIGHTS)):
        return path, [_WEIGHTS]
    raise CheckpointError(
        f"`{path}` does not contain weights",
        got=f"neither `{_WEIGHTS}` nor `{_INDEX}`",
        fix="pass the directory that `export_model` has written",
    )


@effectful(AMBIENT, COLLECTIVE)
def save_object(obj: object, path: str | os.PathLike[str], ctx: DistContext) -> None:
    """Write rank 0's object with `torch.save`, atomically.

    Effects: ambient, collective. To resume a run, use `save` instead: loading this file executes
    pickled code.

    Args:
        obj: Any object that torch can pickle. Those of the other ranks are ignored.
        path: The file.
        ctx: The world.

    Raises:
        CheckpointError: It cannot be written; on every rank. An older file is unchanged.

    Examples:
        >>> import os, tempfile
        >>> from faccel.testing import fake_context
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_object({"x": 1}, os.path.join(folder, "x.pt"), fake_context(0, 1))
        ...     torch.load(os.path.join(folder, "x.pt"))
        {'x': 1}
    """
    call = "faccel.checkpoint.save_object(obj, path, ctx)"
    target = path_argument("obj", obj, path, call)
    on_rank_0(lambda: _write_pickle(obj, target), ctx, f"write `{target}`")


def _write_pickle(obj: object, path: str) -> None:
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    folder, name = os.path.split(path)
    temporary_name = f".tmp-{name}-{secrets.token_hex(4)}"
    temporary = os.path.join(folder, temporary_name)
    try:
        write_file(folder, temporary_name, [buffer.getbuffer()])
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    sync_directory(folder)
