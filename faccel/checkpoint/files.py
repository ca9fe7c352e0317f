"""Files that last: written whole, hashed while they are written, on the disk before anything depends on them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
import xxhash

from faccel.errors import CheckpointError

_CHUNK = 1 << 22  # bytes; what is hashed is still in the cache when it is written
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@attrs.frozen
class FileEntry:
    """A file of a checkpoint.

    Args:
        name: In its directory.
        size: In bytes.
        xxh3: 128-bit XXH3 of its bytes, in hexadecimal.
    """

    name: str
    size: int
    xxh3: str


@attrs.frozen(eq=False)
class Slice:
    """A tensor to write: one part of a larger one.

    Args:
        key: Its name.
        tensor: `T[...]`, on any device.
        offsets: Where it begins in the larger tensor.
    """

    key: str
    tensor: torch.Tensor
    offsets: Sequence[int]


def _bytes_of(tensor: torch.Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        data = memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]


def _header(slices: Sequence[Slice], metadata: Mapping[str, str] | None) -> bytes:
    header: dict[str, Any] = {}
    end = 0
    for each in slices:
        if each.tensor.dtype not in _DTYPES:
            raise CheckpointError(
                "this dtype cannot be stored",
                got=f"`{each.key}`, {each.tensor.dtype}",
                fix="cast it",
            )
        begin, end = end, end + each.tensor.numel() * each.tensor.dtype.itemsize
        shape = list(each.tensor.shape)
        header[each.key] = {
            "dtype": _DTYPES[each.tensor.dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    if metadata is None:
        sharding = json.dumps({each.key: {"saved_offsets": list(each.offsets)} for each in slices})
        metadata = {"format": "pt", "DCP_SHARDING_INFO": sharding, "DCP_VERSION": "1.0"}
    header["__metadata__"] = dict(metadata)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    directory: str, name: str, slices: Iterable[Slice], metadata: Mapping[str, str] | None = None
) -> FileEntry:
    """Write slices of tensors in the format of safetensors, as torch's `HuggingFaceStorageReader` reads them.

    Needs the memory of one slice where it has to be copied from a device, and none where it is on the CPU.

    Args:
        directory: Where to.
        name: Of the file.
        slices: What.
        metadata: For the header; None says where each slice begins.
    """
    ordered = sorted(slices, key=lambda s: -s.tensor.dtype.itemsize)  # every one is aligned

    def chunks() -> Iterator[bytes | memoryview]:
        yield _header(ordered, metadata)
        for each in ordered:
            yield from _bytes_of(each.tensor)

    return write_file(directory, name, chunks())


def write_file(directory: str, name: str, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a new file; it is on the disk when this returns."""
    digest, size = xxhash.xxh3_128(), 0
    fd = os.open(
        os.path.join(directory, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644
    )
    try:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            left = memoryview(chunk)
            while left:
                left = left[os.write(fd, left) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    return FileEntry(name, size, digest.hexdigest())


def hash_file(path: str) -> str:
    """Return the 128-bit XXH3 of a file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_directory(path: str) -> None:
    """Put the names in a directory on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(directory: str) -> int:
    """Return a file descriptor that holds the one right to write into a directory of checkpoints until it is closed.

    The system closes it for a process that dies.

    Raises:
        CheckpointError: Another writer holds it.
    """
    fd = os.open(os.path.join(directory, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        raise CheckpointError(
            "another writer is saving into this directory",
            got=directory,
            fix="give each run a directory of its own",
        ) from None
    return fd


def unlock(fd: int) -> None:
    """Give the right back, also where a process that was forked meanwhile holds a copy of the descriptor."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def make_directory(path: str) -> None:
    """Make a directory and those above it; their names are on the disk when this returns."""
    missing: list[str] = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for each in reversed(missing):
        os.makedirs(each, exist_ok=True)
        sync_directory(os.path.dirname(each))
