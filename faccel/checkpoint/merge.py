"""`merge`: an export of the model in a checkpoint, without the program that saved it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import attrs
import torch

from faccel.checkpoint.arguments import folder_argument
from faccel.checkpoint.codec import Node, kind_of
from faccel.checkpoint.codec_tensors import TENSOR
from faccel.checkpoint.codec_values import MAPPING, SEQUENCE
from faccel.checkpoint.codec_wrappers import WRAPPER
from faccel.checkpoint.dcp import Reader
from faccel.checkpoint.export import split_into_shards, write_export
from faccel.checkpoint.manifest import (
    MANIFEST,
    Checkpoint,
    Manifest,
    NewerFormatError,
    check_format,
    checkpoints,
    newest_committed,
    read_manifest,
)
from faccel.checkpoint.tensor_names import child_name, first_names, item_name
from faccel.checkpoint.tensor_views import DTYPES
from faccel.checkpoint.verification import first_problem
from faccel.checks import parse_size
from faccel.context import DistContext
from faccel.errors import CheckpointError
from faccel.training.module_names import user_name


def merge(
    path: str,
    out: str,
    ctx: DistContext,
    *,
    name: str | None = None,
    max_shard_size: str | int = "5GB",
) -> list[str]:
    """Write an export of the model in a checkpoint.

    Effects: ambient. Reads and writes files.

    Args:
        path: A checkpoint, or a directory of checkpoints, whose newest committed one is used.
        out: The directory of the export.
        ctx: A world of one process.
        name: Which model, if the state has several: its key in the state, or the keys that lead to
            it, as in `"ema.model"`.
        max_shard_size: See `export_model`.

    Returns:
        The names of the files with weights.

    Raises:
        CheckpointError: There is no such model, or the checkpoint is corrupt.
        ConfigError: `path` or `out` is not a local path.
    """
    path, out = folder_argument(path), folder_argument(out, "out")
    # An export deletes stale files of its directory, those of a checkpoint would be among them.
    if os.path.exists(os.path.join(out, MANIFEST)):
        raise CheckpointError(
            "the export would overwrite files of a checkpoint",
            got=f"`{out}`",
            fix="pass another output directory",
        )
    folder, manifest = _checkpoint_at(path)
    problem = first_problem(folder)
    if problem is not None:
        raise _corrupt(folder, problem)
    reader = Reader(folder, manifest.file_names)
    weights = _weights(manifest.state, name)
    stored = reader.stored()
    sizes: dict[str, int] = {}
    for key, weight in weights.items():
        sizes[key] = stored[weight.path].shape.numel() * stored[weight.path].dtype.itemsize
    # Tied tensors are stored under each of their names in a checkpoint, so there are no ties.
    shards = split_into_shards(sizes, parse_size(max_shard_size, "max_shard_size"))

    def fetch(names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        # One file of the export at a time is in memory.
        tensors: dict[str, torch.Tensor] = {}
        for key in names:
            tensor = stored[weights[key].path]
            tensors[weights[key].path] = torch.empty(tensor.shape, dtype=tensor.dtype)
        reader.read(tensors)
        return {key: weights[key].from_stored(tensors) for key in names}

    return write_export(os.path.abspath(out), shards, {}, fetch, ctx)


def _checkpoint_at(path: str) -> tuple[str, Manifest]:
    """Return a checkpoint's folder and manifest: of `path` itself, or of the newest one in it."""
    try:  # `path` is a checkpoint
        return path, read_manifest(path)
    except NewerFormatError as error:
        check_format(Checkpoint(path, 0, problem=str(error), is_newer_format=True))
    except ValueError as error:
        if os.path.lexists(os.path.join(path, MANIFEST)):
            raise _corrupt(path, str(error)) from None
    newest = newest_committed(checkpoints(path))
    if newest is None:
        raise CheckpointError(
            f"`{path}` does not contain a checkpoint",
            got="no committed checkpoint",
            fix="pass a checkpoint, or the `path` that was passed to `faccel.save`",
        )
    return newest.path, read_manifest(newest.path)


def _corrupt(folder: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint `{folder}` is corrupt", got=problem, fix="merge another one"
    )


@attrs.frozen
class _Weight:
    """A tensor in the files of a checkpoint, with its node, which states how it is stored."""

    path: str
    node: Node

    def from_stored(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        tensor = tensors[self.path]
        kind = kind_of(self.node)
        if kind == "complex":
            return torch.view_as_complex(tensor)
        if kind == "bits":
            return tensor.view(DTYPES[self.node["dtype"]])
        return tensor


def _weights(state: Node, name: str | None) -> dict[str, _Weight]:
    """Return the weights of a model by their keys in its `state_dict`."""
    models = _models(state, "")
    if name is None and len(models) == 1:
        name = min(models)
    if name is None or name not in models:
        listed = first_names(models.keys(), limit=20)
        raise CheckpointError(
            "`--model` must name a model of the checkpoint",
            got=f"{name}; models: {listed or 'none'}",
            fix=f"pass `--model NAME` with one of them: {listed}",
        )
    path, nodes = models[name]
    weights: dict[str, _Weight] = {}
    for key, node in nodes.items():
        kind = kind_of(node)
        if kind in WRAPPER.kinds:
            raise CheckpointError(
                f"`{key}` cannot be exported",
                got=f"a tensor of class {node['class']}",
                fix="load the checkpoint into the model with `faccel.load`",
            )
        if kind in TENSOR.kinds:  # an extra state of a module is not a weight
            weights[user_name(key)] = _Weight(child_name(path, key), node)
    return weights


def _models(node: Node, path: str, label: str = "") -> dict[str, tuple[str, Mapping[str, Node]]]:
    """Return the models of a state: the path of each and its entries, by the keys that lead to it.

    A model at the top level has its key as the name, one below it `key.key`, in which items of
    lists are numbers.
    """
    kind = kind_of(node)
    if kind == "module":
        return {label or "model": (path, node["v"])}
    models: dict[str, tuple[str, Mapping[str, Node]]] = {}
    for key, child_path, child in _children(node, kind, path):
        found = _models(child, child_path, f"{label}.{key}".removeprefix("."))
        for name, model in found.items():
            if name in models:  # `{"a.b": ...}` beside `{"a": {"b": ...}}`
                name = model[0]
            models[name] = model
    return models


def _children(node: Node, kind: str, path: str) -> list[tuple[str, str, Node]]:
    """Return key, path and node of each child of a container."""
    if kind in SEQUENCE.kinds:
        items = node["v"] if isinstance(node, dict) else node
        return [(str(i), item_name(path, i), child) for i, child in enumerate(items)]
    if kind == "dict" and "!" not in node:
        entries = node.items()
    elif kind == "record":
        entries = node["v"].items()
    elif kind in MAPPING.kinds:
        # a key that is no plain value, such as a tuple, stands for none that could be typed
        keys = [key if kind_of(key) == "plain" else None for key in node["k"]]
        entries = zip(keys, node["v"], strict=True)
    else:
        return []
    return [(str(key), child_name(path, key), child) for key, child in entries if key is not None]
