"""Checkpoints of other programs: which format a folder has, and its state as values."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs
import torch

from faccel.checkpoint.dcp_folder import METADATA, read_dcp
from faccel.checkpoint.export import INDEX_FILES
from faccel.checkpoint.format_accelerate import is_accelerate, read_accelerate
from faccel.checkpoint.imported import ImportedModule, ImportedOptimizer, imported_values
from faccel.checkpoint.imported_folder import Imported, read_safetensors, without_prefix
from faccel.checkpoint.load_weights import files_with_weights, names_in_index
from faccel.checkpoint.safe_pickle import read_pickle, unreadable
from faccel.errors import CheckpointError, ConfigError, nearest, short_repr, short_text
from faccel.tree import Tree

# The rest of the state of a Fabric checkpoint beside a DCP folder.
_FABRIC_METADATA = "meta.pt"
_BIN, _BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_FOLDERS = ("accelerate", "dcp")  # the formats that no single file has
_FACCEL_FOLDER = re.compile(r"step-\d{9,}.*|manifest\.json")


def read_format(
    path: str, name: str, *, keys: Collection[str] | None = None, skip: Collection[str] = ()
) -> Imported:
    """Return the state that another program has stored.

    Effects: ambient. Reads files; executes no code of them.

    Args:
        path: A folder or a file.
        name: A key of `FORMATS`, or "auto" for the one that the names of the files show.
        keys: The keys of the state that are read; None reads all.
        skip: Keys of the state, and names of files of Accelerate, that are left out.

    Raises:
        CheckpointError: A file contains code or is corrupt, the folder has another format, or it
            has none of the keys.
        ConfigError: There is no such format.
    """
    name = format_argument(name)
    if not os.path.exists(path):
        raise CheckpointError(
            "`path` does not exist", got=f"`{short_text(path)}`", fix="pass an existing folder"
        )
    if name == "auto":
        name = _detected(path)
    if name in _FOLDERS and not os.path.isdir(path):
        raise _nothing(path, f"a file, but `{name}` is a format of folders")
    imported = FORMATS[name](path, keys, skip)
    # A misspelled name would import what is to be left out.
    unknown = set(skip) - imported.skipped - set(imported.state)
    if unknown:
        raise ConfigError(
            "`skip` must name files of the folder of Accelerate, or keys of the state",
            got=", ".join(sorted(map(short_repr, unknown))),
            fix=nearest(min(unknown), [*imported.skipped, *imported.state]),
        )
    # What a file holds under a key is left out after the file was read.
    state = {key: value for key, value in imported.state.items() if key not in skip}
    left_out = dict(imported.left_out)
    for key in imported.state.keys() & set(skip):
        left_out[key] = "skipped"
    if not state:
        raise _nothing(path, f"no state of the format {name}")
    return attrs.evolve(imported, state=state, left_out=left_out)


def format_argument(name: object) -> str:
    """Return the name of a format.

    Effects: pure.

    Raises:
        ConfigError: It is none.
    """
    names = ["faccel", "auto", *FORMATS]
    if not isinstance(name, str) or name not in names:
        raise ConfigError(
            f"`format` must be one of {', '.join(names)}",
            got=short_repr(name),
            fix=nearest(str(name), names),
        )
    return name


def _detected(path: str) -> str:
    """Return the name of the format of a folder or a file, from the names of its files."""
    # Also what is neither a file nor a folder: the reader of files refuses it by name.
    if not os.path.isdir(path):
        return "safetensors" if path.endswith(".safetensors") else "torch"
    names = set(os.listdir(path))
    # The most specific file decides: a folder of Accelerate may have a safetensors file, too.
    if METADATA in names:
        return "fabric" if _FABRIC_METADATA in names else "dcp"
    if is_accelerate(names):
        return "accelerate"
    if {_BIN, _BIN_INDEX} & names:
        return "torch"
    if any(name.endswith(".safetensors") for name in names):
        return "safetensors"
    if any(map(_FACCEL_FOLDER.fullmatch, names)):
        raise CheckpointError(
            "`path` has checkpoints of faccel, which are not imported",
            got=f"`{short_text(path)}`",
            fix="call `faccel.load(state, path, ctx)`",
        )
    raise _nothing(path, f"files: {short_text(', '.join(sorted(names)) or 'none', 200)}")


def _nothing(path: str, got: str) -> CheckpointError:
    return CheckpointError(
        f"`{short_text(path)}` has no checkpoint that faccel reads",
        got=got,
        fix="pass the folder that `save_state`, `torch.distributed.checkpoint.save` or "
        "`fabric.save` has written, or a file of `torch.save`; "
        f"`format` is one of {', '.join(FORMATS)}",
    )


def _read_torch(path: str, keys: Collection[str] | None, skip: Collection[str]) -> Imported:
    """Read one file of `torch.save`, or the weights `pytorch_model*.bin` of a folder."""
    if not os.path.isdir(path):
        return _of_tree(read_pickle(path, os.path.basename(path)), {})
    files = [_BIN]
    index = os.path.join(path, _BIN_INDEX)
    if os.path.exists(index):
        files = names_in_index(index, ".bin")
    # One file may have any dict; shards are parts of one `state_dict`.
    tensors: dict[str, Tree] = {}
    for file in files:
        content = read_pickle(os.path.join(path, file), file)
        if not isinstance(content, Mapping) or len(files) == 1:
            return _of_tree(content, _others(path, [*files]))
        tensors.update(content)
    return _of_tree(tensors, _others(path, [*files, _BIN_INDEX]))


def _others(path: str, files: Collection[str]) -> dict[str, str]:
    """Return why each other entry of a folder is left out."""
    others = sorted(set(os.listdir(path)) - set(files))
    return dict.fromkeys(others, "not a file of this format")


def _of_tree(tree: Tree, left_out: Mapping[str, str]) -> Imported:
    """Return the state of one nested value."""
    values = imported_values(tree)
    # A file may be the `state_dict` of a single object, as `pytorch_model.bin` is.
    if isinstance(values, ImportedModule):
        values = {"model": values}
    elif isinstance(values, ImportedOptimizer):
        values = {"optimizer": values}
    if not isinstance(values, dict):
        raise CheckpointError(
            "the file contains no dict",
            got=f"a {type(values).__name__}",
            fix='write a dict of states with `torch.save({"model": model.state_dict()}, path)`',
        )
    notes: list[str] = []
    state = without_prefix({str(key): value for key, value in values.items()}, notes)
    return Imported(state, dict(left_out), tuple(notes))


def _read_dcp(path: str, keys: Collection[str] | None, skip: Collection[str]) -> Imported:
    return _of_tree(read_dcp(path), _others(path, _dcp_files(path)))


def _dcp_files(path: str) -> list[str]:
    return [METADATA, *(name for name in os.listdir(path) if name.endswith(".distcp"))]


def _read_fabric(path: str, keys: Collection[str] | None, skip: Collection[str]) -> Imported:
    """Read a file of `fabric.save`, or the folder that it writes for a sharded model."""
    if not os.path.isdir(path):
        return _read_torch(path, keys, skip)
    values = read_pickle(os.path.join(path, _FABRIC_METADATA), _FABRIC_METADATA)
    if not isinstance(values, Mapping):
        raise unreadable(_FABRIC_METADATA, f"a {type(values).__name__}, no dict")
    # The folder has the sharded states, the file all other values.
    left_out = _others(path, [*_dcp_files(path), _FABRIC_METADATA])
    return _of_tree({**read_dcp(path), **values}, left_out)


def _read_safetensors(path: str, keys: Collection[str] | None, skip: Collection[str]) -> Imported:
    # The index decides which files are read, as in `load_model`.
    folder, files = files_with_weights(path)
    tensors = read_safetensors(folder, files)
    left_out: dict[str, str] = {}
    if os.path.isdir(path):
        left_out = _others(path, [*files, *INDEX_FILES])
    return _of_tree(tensors, left_out)


Read = Callable[[str, Collection[str] | None, Collection[str]], Imported]
FORMATS: Mapping[str, Read] = {
    "accelerate": read_accelerate,
    "dcp": _read_dcp,
    "fabric": _read_fabric,
    "safetensors": _read_safetensors,
    "torch": _read_torch,
}
"""How each format is read, from a path, the selected keys, and what is skipped."""


def num_updates(imported: Imported) -> int | None:
    """Return how many updates the optimizers have made; None if no state counts them.

    Effects: pure.
    """
    # Adam counts the updates of each parameter, as a 0-d tensor or a number. SGD does not.
    steps: list[int] = []
    for value in imported.state.values():
        if isinstance(value, ImportedOptimizer):
            entries: Mapping[Any, Any] = value.state_dict.get("state", {})
            for entry in entries.values():
                step = entry.get("step") if isinstance(entry, Mapping) else None
                if isinstance(step, torch.Tensor) and step.numel() == 1:
                    step = step.item()
                if isinstance(step, (int, float)) and math.isfinite(step):
                    steps.append(int(step))
    return max(steps, default=None)
