"""Folders of `torch.distributed.checkpoint` (DCP), read without executing code.

DCP describes a folder by a pickled file, `.metadata`, and stores values that are no tensors as
pickles. PyTorch's reader executes both. This one builds stand-ins for the seven classes of the
description, and reads the values as `torch.load(weights_only=True)` does.
"""

from __future__ import annotations

import io
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from faccel.checkpoint.safe_pickle import read_pickle, refused, unreadable
from faccel.errors import CheckpointError
from faccel.tree import Tree

METADATA = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath"},
}  # fmt: skip
_CORRUPT = (
    AttributeError, EOFError, IndexError, KeyError, OSError, OverflowError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip


class _StandIn:
    """What the description has in place of an object of PyTorch: its fields, and no behaviour."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        self.state: Any = {}

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Builds stand-ins; refuses every class and function that a description does not have."""

    def __init__(self, file: io.BytesIO, name: str) -> None:
        super().__init__(file)
        self._name = name

    def find_class(self, module_name: str, global_name: str, /) -> object:
        if global_name in _CLASSES.get(module_name, ()):
            # A new class each time: a pickle can set attributes of a class that it names.
            return type(global_name, (_StandIn,), {})
        # Types of C: their attributes cannot be set.
        builtin = {"torch.Size": torch.Size, "collections.OrderedDict": OrderedDict}
        value = builtin.get(f"{module_name}.{global_name}")
        if module_name == "torch" and value is None:
            # Not `getattr`, which imports submodules of torch by name.
            value = vars(torch).get(global_name)
            if not isinstance(value, torch.dtype):  # a function of torch is code
                value = None
        if value is None:
            raise refused(self._name, f"{module_name}.{global_name}")
        return value


def read_dcp(folder: str) -> dict[str, Tree]:
    """Return the nested state of a DCP folder, with full tensors on the CPU.

    Effects: ambient. Reads files.

    Args:
        folder: The folder, with the file `.metadata`.

    Raises:
        CheckpointError: A file contains code or is corrupt; names it.
    """
    name = os.path.join(os.path.basename(folder), METADATA)
    try:
        with open(os.path.join(folder, METADATA), "rb") as file:
            fields = _Unpickler(io.BytesIO(file.read()), name).load().state
        return _DcpFolder(folder, fields).read()
    except (*_CORRUPT, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise unreadable(name, f"{type(error).__name__}: {error}") from None


class _DcpFolder:
    """A folder and the fields of its description."""

    def __init__(self, folder: str, fields: Mapping[str, Any]) -> None:
        self._folder = folder
        self._entries: Mapping[str, _StandIn] = fields["state_dict_metadata"]
        # The keys that lead to each entry, if a nested state was flattened.
        self._paths: Mapping[str, Sequence[str | int]] = fields.get("planner_data") or {}
        # By name and the first index of the part of the tensor.
        self._locations: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
        for index, location in fields["storage_data"].items():
            start = tuple(index.state.get("offset") or ())
            self._locations[index.state["fqn"], start] = location.state

    def read(self) -> dict[str, Tree]:
        leaves: list[tuple[Sequence[str | int], Tree]] = []
        for name, entry in self._entries.items():
            path = self._paths.get(name, (name,))
            # A value that is no tensor is a pickle in one piece.
            if type(entry).__name__ == "BytesStorageMetadata":
                leaves.append((path, self._value(name, ())))
            else:
                leaves.append((path, self._tensor(name, entry.state)))
        return _nested(leaves)

    def _tensor(self, name: str, fields: Mapping[str, Any]) -> torch.Tensor:
        """Return a full tensor, from all of its chunks."""
        # The state of `TensorProperties` is a tuple that begins with the dtype.
        dtype = fields["properties"].state[0]
        # Before the memory is allocated: a corrupt size may be any number.
        size = fields["size"]
        num_elements = math.prod(size)
        num_stored = sum(math.prod(chunk.state["sizes"]) for chunk in fields["chunks"])
        if num_stored != num_elements:
            raise ValueError(f"`{name}`: {num_stored} of {num_elements} elements are in the files")
        # Zeros: a description with a hole must not show memory of this process.
        tensor = torch.zeros(size, dtype=dtype)
        # Each rank of the run has written its shards as chunks.
        for chunk in fields["chunks"]:
            start, sizes = tuple(chunk.state["offsets"]), tuple(chunk.state["sizes"])
            view = tensor
            for dim, (first, size) in enumerate(zip(start, sizes, strict=True)):
                view = view.narrow(dim, first, size)
            value = self._value(name, start)
            if not isinstance(value, torch.Tensor) or value.shape != view.shape:
                raise ValueError(f"`{name}`: a part of it has another shape than described")
            view.copy_(value)
        return tensor

    def _value(self, name: str, start: tuple[int, ...]) -> Tree:
        location = self._locations[name, start]
        file_name: str = location["relative_path"]
        # A name such as `../secret` would read outside the folder.
        if os.path.basename(file_name) != file_name:
            raise ValueError(f"`{name}` is in a file outside of the folder")
        path = os.path.join(self._folder, file_name)
        if not os.path.isfile(path):
            raise ValueError(f"`{file_name}` is missing")
        # `read` allocates the memory of any length before it reads.
        offset, length = location["offset"], location["length"]
        if not 0 <= offset <= offset + length <= os.path.getsize(path):
            raise ValueError(f"`{file_name}` is shorter than described")
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
        return read_pickle(
            io.BytesIO(data), os.path.join(os.path.basename(self._folder), file_name)
        )


def _nested(leaves: Iterable[tuple[Sequence[str | int], Tree]]) -> dict[str, Tree]:
    """Return the nested state: DCP's numbers are the indices of lists."""
    # Dicts first, also for lists: the items of a list may come in any order.
    root: dict[Any, Any] = {}
    for path, value in leaves:
        parent = root
        for key in path[:-1]:
            parent = parent.setdefault(key, {})
        parent[path[-1]] = value
    return _with_lists(root)


def _with_lists(value: Any) -> Any:
    if type(value) is not dict:
        return value
    children = {key: _with_lists(child) for key, child in value.items()}
    if children and all(type(key) is int for key in children):
        return [children[key] for key in sorted(children)]
    return children
