"""An export of the model in a checkpoint, without the program that made it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from faccel.checkpoint.dcp import Reader
from faccel.checkpoint.encode import join
from faccel.checkpoint.export import num_bytes, shards_of, write_export
from faccel.checkpoint.manifest import MANIFEST, Checkpoint, check_hash, checkpoints, read_manifest
from faccel.context import DistContext
from faccel.errors import CheckpointError


def merge(
    path: str,
    out: str,
    ctx: DistContext,
    *,
    name: str | None = None,
    max_shard_size: str | int = "5GB",
) -> list[str]:
    """Make an export of the model in a checkpoint, without the program that made it.

    Effects: ambient. Reads and writes files.

    Args:
        path: A checkpoint, or a directory of them, of which the newest committed one is taken.
        out: Where the export goes.
        ctx: A world of one process.
        name: Which model, where the state holds several: its key.
        max_shard_size: As for `export_model`.

    Returns:
        The names of the files.

    Raises:
        CheckpointError: There is no such model.
    """
    folder = _newest(path).path
    if os.path.exists(os.path.join(out, MANIFEST)):
        raise CheckpointError(
            "an export would spoil this checkpoint", got=f"`{out}`", fix="name another directory"
        )
    manifest = read_manifest(folder)
    problem = next((said for entry in manifest.files if (said := check_hash(folder, entry))), None)
    if problem is not None:
        raise CheckpointError(
            "the checkpoint is not as it was written", got=problem, fix="merge another one"
        )
    state = manifest.state if isinstance(manifest.state, dict) else {}
    models = {
        key: node["v"]
        for key, node in state.items()
        if isinstance(node, dict) and node.get("!") == "module"
    }
    if name is None and len(models) == 1:
        name = min(models)
    if name is None or name not in models:
        listed = ", ".join(f"`{each}`" for each in sorted(models)) or "none"
        got = f"{name}; there are {listed}"
        raise CheckpointError("name a model of the checkpoint", got=got, fix="pass `--model NAME`")
    reader = Reader(folder, [each.name for each in manifest.files])
    stored, weights = reader.stored(), dict[str, tuple[str, bool]]()
    for key, node in models[name].items():
        kind = node.get("!") if isinstance(node, dict) else None  # an extra state is no weight
        if kind in ("tensor", "complex"):
            weights[key] = join(join("", name), key), kind == "complex"
    sizes = {
        key: stored[at].shape.numel() * stored[at].dtype.itemsize
        for key, (at, _) in weights.items()
    }
    shards = shards_of(sizes, num_bytes(max_shard_size))

    def fetch(names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        places = {key: weights[key] for key in names}
        tensors = {
            at: torch.empty(stored[at].shape, dtype=stored[at].dtype) for at, _ in places.values()
        }
        reader.read(tensors)
        return {
            key: torch.view_as_complex(tensors[at]) if is_complex else tensors[at]
            for key, (at, is_complex) in places.items()
        }

    return write_export(os.path.abspath(out), shards, {}, fetch, ctx)


def _newest(path: str) -> Checkpoint:
    try:
        read_manifest(path)
        return Checkpoint(path, 0)
    except ValueError:
        found = next((each for each in checkpoints(path) if each.problem is None), None)
    if found is None:
        raise CheckpointError(
            "there is no checkpoint", got=f"`{path}`", fix="name one, or the directory of a run"
        )
    return found
