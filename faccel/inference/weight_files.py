"""The tensors in safetensors files, and reads of them straight into memory that exists already."""

from __future__ import annotations

import json
import math
import operator
import os
import stat
import threading
import weakref
from collections.abc import Iterable, Mapping

import attrs
import torch

from faccel.checkpoint.files import SAFETENSORS_DTYPES, SHARDING
from faccel.checkpoint.load_weights import check_none, files_with_weights
from faccel.checkpoint.tied_tensors import are_equal, different_values
from faccel.device_table import is_host
from faccel.errors import CheckpointError, short_text, summary

_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}
_CHUNK_BYTES = 1 << 24  # of a read that is cast, or copied to another device
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format
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
    weights: dict[str, StoredWeight] = {}
    for name in files:
        # An index may name files that were not downloaded. The bytes may be anything.
        try:
            weights.update(_weights_of_file(os.path.join(folder, name)))
        except FileNotFoundError:
            raise CheckpointError(
                "the weights are incomplete or corrupt", got=f"`{name}` is missing", fix=_FIX
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                "the weights are incomplete or corrupt",
                got=f"`{name}` has an invalid header: {short_text(summary(error))}",
                fix=_FIX,
            ) from error
    return weights


def _weights_of_file(path: str) -> dict[str, StoredWeight]:
    # Not by the library of the format: it maps the file so that all of it counts in RLIMIT_DATA.
    with open(path, "rb", opener=_open_regular) as file:
        # Eight bytes with the length of the JSON, the JSON, then the tensors.
        num_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(num_bytes - 8, _MAX_HEADER_BYTES):
            raise ValueError("the length of the header is wrong")
        header = json.loads(file.read(length))
    if SHARDING in header.pop("__metadata__", {}):
        raise CheckpointError(
            "the file has slices of tensors, as in a checkpoint of `faccel.save`",
            got=f"`{path}`",
            fix="write the weights with `faccel merge CHECKPOINT OUT`, and place `OUT`",
        )
    weights: dict[str, StoredWeight] = {}
    for name, fields in header.items():
        first, last = fields["data_offsets"]
        dtype, shape = _DTYPES[fields["dtype"]], tuple(map(operator.index, fields["shape"]))
        weight = StoredWeight(path, 8 + length + first, shape, dtype)
        is_inside = first >= 0 and 8 + length + last <= num_bytes
        # A wrong offset would read the values of another tensor, without an error.
        if min(shape, default=0) < 0 or last - first != weight.num_bytes or not is_inside:
            raise ValueError(f"`{name}` is not where the header states")
        weights[name] = weight
    return weights


def _open_regular(path: str, flags: int) -> int:
    # A pipe would wait for its writer.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")
    return os.open(path, flags)


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
    result: dict[str, StoredWeight] = {}
    missing: set[str] = set()
    misshapen: set[str] = set()
    mistyped: set[str] = set()
    for names in _names_of_tensors(tensors):
        # All differences are collected, so that one message has them.
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
    check_none(missing, "missing in the files")
    check_none(stored.keys() - tensors.keys(), "unknown to the model")
    check_none(misshapen, "of another shape")
    check_none(mistyped, "of a dtype that cannot be cast to the model's")
    return result


def _names_of_tensors(tensors: Mapping[str, torch.Tensor]) -> Iterable[list[str]]:
    """Return the names of each tensor of a model."""
    names_of: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names_of.setdefault(id(tensor), []).append(name)
    return names_of.values()


def check_ties(
    tensors: Mapping[str, torch.Tensor], stored: Mapping[str, StoredWeight], reader: WeightReader
) -> None:
    """Raise if two names of one tensor of a model have different values in the files.

    Effects: ambient.

    Args:
        tensors: As for `weights_by_name`, which has found no difference of shapes.
        stored: Of `stored_weights`.
        reader: Reads the files.

    Raises:
        CheckpointError: They differ; the message names them.
    """
    for names in _names_of_tensors(tensors):
        stored_names = [name for name in names if name in stored]
        for other in stored_names[1:]:
            pair = (stored[stored_names[0]], stored[other])
            if not _have_equal_values(pair, tensors[names[0]], reader):
                raise different_values(
                    (stored_names[0], other), "remove one of them from the files"
                )


def _have_equal_values(
    weights: tuple[StoredWeight, StoredWeight], tensor: torch.Tensor, reader: WeightReader
) -> bool:
    num_elements = _CHUNK_BYTES // tensor.dtype.itemsize
    for start in range(0, tensor.numel(), num_elements):
        size = min(num_elements, tensor.numel() - start)
        first, other = (torch.empty(size, dtype=weight.dtype) for weight in weights)
        reader.read(weights[0], first, start)
        reader.read(weights[1], other, start)
        if not are_equal(first, other, tensor.dtype):
            return False
    return True


# `preadv` reads into memory that is reused: the operating system clears the pages of new memory
# first, and Python's lock is released meanwhile. A cast goes through one chunk of 16 MB, so that it
# needs no second copy of the tensor.
class WeightReader:
    """Reads tensors from files, for one thread after the other.

    The files are read, not mapped: mapped pages count as memory of the process, and a limit on its
    memory would be exceeded.
    """

    def __init__(self) -> None:
        self._descriptors: dict[str, int] = {}
        self._chunk: torch.Tensor | None = None
        self._lock = threading.Lock()  # the chunk is one
        # A placed model may be dropped without `materialize`, and loading may fail.
        weakref.finalize(self, _close_all, self._descriptors)

    def read(self, weight: StoredWeight, destination: torch.Tensor, start: int) -> None:
        """Write a stored tensor, from the element `start` on, into a contiguous one of any dtype.

        Updates `destination`.

        Raises:
            CheckpointError: The file ends before the tensor, or cannot be read.
        """
        flat = destination.detach().view(-1)
        if flat.numel() == 0:
            return
        with self._lock:
            self._read_flat(weight, flat, weight.start + start * weight.dtype.itemsize)

    def _read_flat(self, weight: StoredWeight, flat: torch.Tensor, offset: int) -> None:
        if is_host(flat.device) and flat.dtype == weight.dtype:
            self._read_bytes(weight.path, offset, flat.view(torch.uint8))
            return
        # In chunks, so that a cast needs no second copy of the tensor.
        step = _CHUNK_BYTES // weight.dtype.itemsize
        if self._chunk is None:
            self._chunk = torch.empty(_CHUNK_BYTES, dtype=torch.uint8)
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            chunk = self._chunk[: part.numel() * weight.dtype.itemsize]
            self._read_bytes(weight.path, offset + start * weight.dtype.itemsize, chunk)
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
        _close_all(self._descriptors)


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
