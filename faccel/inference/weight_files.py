"""The tensors in safetensors files, and reads of them straight into memory that exists already."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Mapping

import attrs
import torch

from faccel.checkpoint.codec_modules import first_names
from faccel.checkpoint.files import SAFETENSORS_DTYPES, SHARDING
from faccel.checkpoint.headers import check_slices, read_slices
from faccel.checkpoint.load_weights import files_with_weights
from faccel.errors import CheckpointError

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
_CHUNK_BYTES = 1 << 24  # of a read that is cast, or copied to another device
_FIX = "download or export the files again"


@attrs.frozen
class StoredWeight:
    """Where a tensor is stored.

    Args:
        path: The file.
        start: Offset of its first byte in the file.
        shape: Its shape.
        dtype: In the file.
    """

    path: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored_weights(path: str) -> dict[str, StoredWeight]:
    """Return the tensors of a file, or of the files of a directory, by name.

    Effects: ambient. Only the headers are read.

    Raises:
        CheckpointError: There are none, or a header is invalid.
    """
    folder, files = files_with_weights(path)
    try:
        check_slices(read_slices(folder, files))  # also that no offset is outside of a file
    except ValueError as error:
        raise CheckpointError(
            "the weights are incomplete or corrupt", got=str(error), fix=_FIX
        ) from None
    weights: dict[str, StoredWeight] = {}
    for name in files:
        weights.update(_weights_of_file(os.path.join(folder, name)))
    return weights


def _weights_of_file(path: str) -> dict[str, StoredWeight]:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    if SHARDING in header.pop("__metadata__", {}):
        raise CheckpointError(
            "the file has slices of tensors, as in a checkpoint of `faccel.save`",
            got=f"`{path}`",
            fix="write the weights with `faccel merge CHECKPOINT OUT`, and place `OUT`",
        )
    weights: dict[str, StoredWeight] = {}
    for name, fields in header.items():
        dtype = _DTYPES.get(fields["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"`{name}` has an unsupported dtype", got=str(fields["dtype"]), fix=_FIX
            )
        start = 8 + length + fields["data_offsets"][0]
        weights[name] = StoredWeight(path, start, tuple(fields["shape"]), dtype)
    return weights


def weights_by_name(
    tensors: Mapping[str, torch.Tensor], stored: Mapping[str, StoredWeight]
) -> dict[str, StoredWeight]:
    """Return where each tensor of a model is stored, under all names of the tensor.

    Effects: pure.

    Args:
        tensors: The tensors of the model; a tied one has several names.
        stored: Of `stored_weights`.

    Raises:
        CheckpointError: Names or shapes differ, or a dtype cannot be cast.
    """
    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    result: dict[str, StoredWeight] = {}
    missing: set[str] = set()
    misshapen: set[str] = set()
    mistyped: set[str] = set()
    for names in names_of.values():
        # the files may contain a tied tensor under any of its names
        stored_names = [name for name in names if name in stored]
        if not stored_names:
            missing.add(names[0])
            continue
        name, tensor = stored_names[0], tensors[names[0]]
        if stored[name].shape != tuple(tensor.shape):
            misshapen.add(f"{name} {list(stored[name].shape)} for {list(tensor.shape)}")
        if not torch.can_cast(stored[name].dtype, tensor.dtype):
            mistyped.add(name)
        result.update(dict.fromkeys(names, stored[name]))
    _check_empty(missing, "missing in the files")
    _check_empty(stored.keys() - tensors.keys(), "unknown to the model")
    _check_empty(misshapen, "of another shape")
    _check_empty(mistyped, "of a dtype that cannot be cast to the model's")
    return result


def _check_empty(names: set[str], problem: str) -> None:
    if names:
        raise CheckpointError(
            "the weights do not fit the model",
            got=f"{first_names(names)}: {problem}",
            fix="build the model that was exported; convert other formats with `from_pretrained`",
        )


class WeightReader:
    """Reads tensors from files, for one thread after the other.

    The files are read, not mapped: mapped pages count as memory of the process, and a limit on its
    memory would be exceeded.
    """

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._chunk: torch.Tensor | None = None
        self._lock = threading.Lock()  # the chunk is one

    def read(self, weight: StoredWeight, destination: torch.Tensor) -> None:
        """Write a stored tensor into a contiguous one, cast to its dtype.

        Updates `destination`.

        Raises:
            CheckpointError: The file ends before the tensor, or cannot be read.
        """
        flat = destination.detach().view(-1)
        if flat.numel() == 0:
            return
        with self._lock:
            self._read_flat(weight, flat)

    def _read_flat(self, weight: StoredWeight, flat: torch.Tensor) -> None:
        if flat.device.type == "cpu" and flat.dtype == weight.dtype:
            self._read_bytes(weight.path, weight.start, flat.view(torch.uint8))
            return
        # In chunks, so that a cast needs no second copy of the tensor.
        step = _CHUNK_BYTES // weight.dtype.itemsize
        if self._chunk is None:
            self._chunk = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            chunk = self._chunk[: part.numel() * weight.dtype.itemsize]
            self._read_bytes(weight.path, weight.start + start * weight.dtype.itemsize, chunk)
            part.copy_(chunk.view(weight.dtype))

    def _read_bytes(self, path: str, start: int, destination: torch.Tensor) -> None:
        buffer = memoryview(destination.numpy())  # pyright: ignore[reportArgumentType]
        num_read = 0
        try:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            while num_read < len(buffer):
                # Linux reads at most 2 GiB at once; Python's lock is released meanwhile.
                num_bytes = os.preadv(
                    self._descriptors[path], [buffer[num_read:]], start + num_read
                )
                if num_bytes == 0:
                    raise CheckpointError("a file of weights ends early", got=path, fix=_FIX)
                num_read += num_bytes
        except OSError as error:
            raise CheckpointError(
                "a file of weights cannot be read", got=str(error), fix=_FIX
            ) from error

    def close(self) -> None:
        """Close the files."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
