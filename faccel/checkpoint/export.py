"""Weights for others: safetensors files as the Hugging Face ecosystem reads them, from any layout, and back."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from faccel.checkpoint.dcp import Reader
from faccel.checkpoint.encode import trained
from faccel.checkpoint.files import Slice, sync_directory, write_file, write_safetensors
from faccel.checkpoint.pretrained import adapter_of, describe, write_adapter
from faccel.comm.all_or_error import all_or_error
from faccel.comm.objects import gather_objects
from faccel.context import DistContext
from faccel.effects import AMBIENT, COLLECTIVE, effectful, updates
from faccel.errors import CheckpointError, ConfigError
from faccel.flat_shard import FlatShard
from faccel.training.model import WrappedModel
from faccel.tree import full_tensor, local_tensor

_INDEX = "model.safetensors.index.json"
_OURS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json|pytorch_model.*\.bin(\.index\.json)?"
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
"""Gives whole tensors of some names on the CPU."""


def num_bytes(size: str | int) -> int:
    """Return how many bytes a text such as `"5GB"` says."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(
            "`max_shard_size` is a size",
            got=repr(size),
            fix='write `"5GB"`, `"500MB"` or a number of bytes',
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _module(model: Any) -> nn.Module:
    if isinstance(model, WrappedModel):
        return model.module
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            "only a model can be exported", got=f"a {type(model).__name__}", fix="pass the model"
        )
    return model


def _place_of(x: torch.Tensor) -> tuple[Any, ...]:
    """Return what two names of one tensor have in common."""
    if isinstance(x, FlatShard):
        return (id(x.param),)
    mine = local_tensor(x)
    return mine.untyped_storage().data_ptr(), mine.storage_offset(), x.shape, mine.stride(), x.dtype


def _without_ties(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors, each once, and for every other name of one the name that it is kept under."""
    kept: dict[str, torch.Tensor] = {}
    first: dict[Any, str] = {}
    ties: dict[str, str] = {}
    for name, x in state.items():
        if not isinstance(x, torch.Tensor):
            continue  # an extra state of the user's: not a weight
        place = _place_of(x) if x.numel() else name
        if first.setdefault(place, name) == name:
            kept[name] = x.detach()
        else:
            ties[name] = first[place]
    return kept, ties


def shards_of(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Return the names of each file's tensors, so that no file with several is larger than `max_bytes`."""
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


class _Writer:
    """Writes an export into a folder of its own, and puts it in place of an older one at the end."""

    def __init__(self, path: str, shards: list[list[str]], ties: Mapping[str, str]) -> None:
        self.path, self.shards, self.ties = path, shards, ties
        self.weight_map: dict[str, str] = {}
        self.num_bytes = 0
        self.temporary = os.path.join(path, f".tmp-export-{secrets.token_hex(4)}")
        os.makedirs(self.temporary)

    def write(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write shard `number`."""
        of = len(self.shards)
        name = "model.safetensors" if of == 1 else f"model-{number + 1:05d}-of-{of:05d}.safetensors"
        slices = [Slice(key, x, [0] * x.ndim) for key, x in tensors.items()]
        write_safetensors(self.temporary, name, slices, metadata={"format": "pt", **self.ties})
        self.weight_map |= dict.fromkeys(tensors, name)
        self.num_bytes += sum(x.numel() * x.dtype.itemsize for x in tensors.values())

    def finish(self, module: nn.Module | None) -> None:
        """Put the files in place, and the description of `module`; those of an older export go."""
        if len(self.shards) > 1:
            index = {"metadata": {"total_size": self.num_bytes}, "weight_map": self.weight_map}
            write_file(
                self.temporary, _INDEX, [json.dumps(index, indent=2, sort_keys=True).encode()]
            )
        if module is not None:
            describe(module, self.temporary)
        new = sorted(os.listdir(self.temporary), key=lambda name: (name == _INDEX, name))
        if os.path.exists(os.path.join(self.path, _INDEX)):
            os.unlink(
                os.path.join(self.path, _INDEX)
            )  # until the new one is there, nothing loads a mixture
        for name in new:
            os.replace(os.path.join(self.temporary, name), os.path.join(self.path, name))
        for each in os.scandir(self.path):
            if each.name not in new and _OURS.fullmatch(each.name):
                os.unlink(each.path)
        sync_directory(self.path)

    def end(self) -> None:
        """Remove what is left."""
        shutil.rmtree(self.temporary, ignore_errors=True)


@effectful(AMBIENT, COLLECTIVE)
def export_model(
    model: WrappedModel | nn.Module,
    path: str | os.PathLike[str],
    ctx: DistContext,
    *,
    max_shard_size: str | int = "5GB",
    trained_only: bool = False,
) -> list[str]:
    """Write the weights of a model as safetensors, whole, whatever ranks hold which part of them.

    Effects: ambient, collective. Rank 0 writes files; those of an earlier export in the same directory go. Rank 0 needs
    memory for one shard. A model of transformers is written with its `config.json`, so that `from_pretrained` loads it.

    Args:
        model: From `wrap`, or a module.
        path: A directory, made where it is missing.
        ctx: The world.
        max_shard_size: The largest file: `"5GB"`, `"500MB"` or a number of bytes. Several files have an index.
        trained_only: Whether parameters that require no gradients are left out. The active adapter of a model of PEFT
            is written as one file with its configuration, which `PeftModel.from_pretrained` reads.

    Returns:
        The names of the files that hold weights, on every rank. Of tied weights each is stored once; the other names
        stand in the metadata of the files.

    Raises:
        CheckpointError: The files cannot be written; on every rank.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> with tempfile.TemporaryDirectory() as path:
        ...     export_model(torch.nn.Linear(2, 1), path, fake_context(0, 1))
        ['model.safetensors']
    """
    module = _module(model)
    state = model.state_dict()
    adapter = adapter_of(module) if trained_only else None
    kept, ties = _without_ties(trained(module, state) if trained_only else state)
    owners = _owners({name: (list(x.shape), x.dtype) for name, x in kept.items()}, ctx)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (_, shape, dtype) in owners.items()}
    shards = shards_of(sizes, num_bytes(max_shard_size))

    def fetch(names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        found = {name: one(name) for name in names}  # on every rank: it may be collective
        return {name: x.cpu() for name, x in found.items()} if ctx.is_main else {}

    def one(name: str) -> torch.Tensor:
        owner, shape, dtype = owners[name]
        if ctx.mesh.spec.pp == 1:
            return full_tensor(kept[name])
        is_mine = owner == ctx.comm.rank("pp")
        mine = (
            full_tensor(kept[name])
            if is_mine
            else torch.empty(shape, dtype=dtype, device=ctx.device)
        )
        return ctx.comm.broadcast(mine.to(ctx.device), owner, "pp")

    if adapter is not None:
        return _export_adapter(module, adapter, fetch(list(sizes)), os.path.abspath(path), ctx)
    return write_export(
        os.path.abspath(path), shards, ties, fetch, ctx, None if trained_only else module
    )


def _export_adapter(
    module: nn.Module, adapter: str, state: Mapping[str, torch.Tensor], path: str, ctx: DistContext
) -> list[str]:
    told = all_or_error(
        lambda: write_adapter(module, adapter, state, path) if ctx.is_main else None,
        ctx,
        "write the adapter",
        error=CheckpointError,
    )
    return told[0] or []


def _owners(
    own: dict[str, tuple[list[int], torch.dtype]], ctx: DistContext
) -> dict[str, tuple[int, list[int], torch.dtype]]:
    """Return for each tensor of the model which stage of the pipeline has it, its shape and dtype."""
    stages = [own] if ctx.mesh.spec.pp == 1 else gather_objects(own, ctx, axis="pp")
    found: dict[str, tuple[int, list[int], torch.dtype]] = {}
    for number, names in enumerate(stages):
        for name, (shape, dtype) in names.items():
            found.setdefault(name, (number, shape, dtype))
    return found


def write_export(
    path: str,
    shards: list[list[str]],
    ties: Mapping[str, str],
    fetch: Fetch,
    ctx: DistContext,
    module: nn.Module | None = None,
) -> list[str]:
    """Write the files of an export on rank 0, and `module`'s own description; return the names of those with weights.

    Effects: ambient, collective.
    """
    opened = all_or_error(
        lambda: _Writer(path, shards, ties) if ctx.is_main else None,
        ctx,
        "begin an export",
        error=CheckpointError,
    )
    writer = opened[0] if ctx.is_main else None
    try:
        for number, names in enumerate(shards):
            tensors = fetch(names)
            all_or_error(
                lambda n=number, t=tensors: writer and writer.write(n, t),
                ctx,
                "write the export",
                error=CheckpointError,
            )
        all_or_error(
            lambda: writer and writer.finish(module),
            ctx,
            "finish the export",
            error=CheckpointError,
        )
        files = all_or_error(
            lambda: sorted(set(writer.weight_map.values())) if writer else None,
            ctx,
            "end the export",
            error=CheckpointError,
        )[0]
        return files or []
    finally:
        if writer is not None:
            writer.end()


@effectful(AMBIENT, COLLECTIVE, updates("model"))
def load_model(
    model: WrappedModel | nn.Module,
    path: str | os.PathLike[str],
    ctx: DistContext,
    *,
    trained_only: bool = False,
) -> None:
    """Load weights from safetensors, of `export_model` or of the Hugging Face ecosystem, into a model.

    Effects: updates model, ambient, collective. Files are mapped, and each rank reads its part alone, so that the
    memory of one tensor is needed above the model's own. Weights are cast to the model's dtype.

    Args:
        model: From `wrap`, or a module.
        path: A directory with `model.safetensors` or an index, or one file.
        ctx: The world.
        trained_only: Whether the files hold what `export_model(..., trained_only=True)` wrote of such a model.

    Raises:
        CheckpointError: Names or shapes are not the model's; names them, and nothing has been written.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> ctx, net = fake_context(0, 1), torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = export_model(net, path, ctx)
        ...     load_model(net, path, ctx)
    """
    module = _module(model)
    state = model.state_dict()
    kept, ties = _without_ties(trained(module, state) if trained_only else state)
    readers: list[Reader] = []

    def plan() -> None:
        folder, files = _files_of(os.path.abspath(path))
        readers.append(Reader(folder, files))
        stored = readers[0].stored()
        aliases = {ties[name]: name for name in ties if name in stored and ties[name] not in stored}
        for kept_name, name in aliases.items():  # the file kept another of the tied names
            kept[name] = kept.pop(kept_name)
        missing, unknown = (
            sorted(set(kept) - set(stored)),
            sorted(set(stored) - set(kept) - set(ties)),
        )
        wrong = [n for n, x in kept.items() if n in stored and stored[n].shape != x.shape]
        _refuse(missing, "missing in the files")
        _refuse(unknown, "not the model's")
        _refuse(wrong, "of another shape")

    all_or_error(plan, ctx, "find the weights of the model", error=CheckpointError)
    all_or_error(lambda: readers[0].read(kept), ctx, "read the weights", error=CheckpointError)
    all_or_error(
        lambda: model.load_state_dict(state), ctx, "load the weights", error=CheckpointError
    )  # for modules that give copies away


def _refuse(names: Sequence[str], what: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise CheckpointError(
            "these weights do not fit the model",
            got=f"{', '.join(f'`{n}`' for n in names[:3])}{more}: {what}",
            fix="build the model that was exported; another format is converted by its own `from_pretrained`",
        )


def _files_of(path: str) -> tuple[str, list[str]]:
    if os.path.isfile(path):
        return os.path.dirname(path), [os.path.basename(path)]
    index = os.path.join(path, _INDEX)
    if os.path.exists(index):
        with open(index) as file:
            names = sorted(set(json.load(file).get("weight_map", {}).values()))
        if not names or any(os.path.basename(name) != name for name in names):
            raise CheckpointError(
                "the index names no files of its directory", got=f"`{index}`", fix="export it again"
            )
        return path, names
    if os.path.exists(os.path.join(path, "model.safetensors")):
        return path, ["model.safetensors"]
    raise CheckpointError(
        "there are no weights",
        got=f"neither `model.safetensors` nor `{_INDEX}` in `{path}`",
        fix="name their directory",
    )


@effectful(AMBIENT, COLLECTIVE)
def save_object(obj: Any, path: str | os.PathLike[str], ctx: DistContext) -> None:
    """Write rank 0's object with `torch.save`: whole, or not at all.

    Effects: ambient, collective. For files of your own; what a run goes on from is what `save` is for.

    Args:
        obj: Anything that torch can pickle; of the other ranks it is ignored.
        path: The file.
        ctx: The world.

    Raises:
        CheckpointError: It cannot be written; on every rank, and an older file is as it was.

    Examples:
        >>> import os, tempfile
        >>> from faccel.testing import fake_context
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_object({"x": 1}, os.path.join(folder, "x.pt"), fake_context(0, 1))
        ...     torch.load(os.path.join(folder, "x.pt"))
        {'x': 1}
    """

    def write() -> None:
        import io

        target = os.path.abspath(path)
        folder, name = os.path.split(target)
        buffer = io.BytesIO()
        torch.save(obj, buffer)
        temporary = f".tmp-{name}-{secrets.token_hex(4)}"
        try:
            write_file(folder, temporary, [buffer.getbuffer()])
            os.replace(os.path.join(folder, temporary), target)
        finally:
            if os.path.exists(os.path.join(folder, temporary)):
                os.unlink(os.path.join(folder, temporary))
        sync_directory(folder)

    all_or_error(
        lambda: write() if ctx.is_main else None,
        ctx,
        f"write `{os.fspath(path)}`",
        error=CheckpointError,
    )
