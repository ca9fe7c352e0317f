"""Durable files: hashed while they are written, and on the disk before anything refers to them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

import attrs
import torch
import xxhash

from faccel.errors import CheckpointError

_CHUNK_BYTES = (
    1 << 22
)  # small enough that a chunk is still in the cache when it is written after hashing
_MAX_BYTES = 1 << 30  # of a file that is read into memory at once
# Keys in the metadata of a header. PyTorch's HuggingFaceStorageReader looks for the first two, to
# put shards together. The third one shows that the last shard is missing, which they do not.
SHARDING = "DCP_SHARDING_INFO"
SAVED_OFFSETS = "saved_offsets"
FULL_SHAPE = "full_shape"
# The names in the header, https://github.com/huggingface/safetensors#format. There is none for
# complex128, which the codec of tensors stores as pairs of float64.
SAFETENSORS_DTYPES = {
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
        name: Its name in the folder.
        size: In bytes.
        xxh3: 128-bit XXH3 of its bytes, in hexadecimal.
    """

    name: str
    size: int
    xxh3: str


@attrs.frozen(eq=False)
class Slice:
    """A contiguous block of a tensor, to be written by one rank.

    Args:
        key: Name of the tensor.
        tensor: `T[...]`, the block, on any device.
        offsets: Index of its first element in the full tensor.
        full_shape: Of the full tensor.
    """

    key: str
    tensor: torch.Tensor
    offsets: Sequence[int]
    full_shape: Sequence[int]


def _byte_chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    # No copy of a contiguous tensor on the CPU. One on another device is copied once.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:  # numpy has no memory to view
        return
    if flat.stride(0) != 1:  # a slice of one element is contiguous with any stride
        flat = flat.clone(memory_format=torch.contiguous_format)
    buffer = memoryview(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    for start in range(0, len(buffer), _CHUNK_BYTES):
        yield buffer[start : start + _CHUNK_BYTES]


def _header(slices: Sequence[Slice], metadata: Mapping[str, str] | None) -> bytes:
    """Return the header of a safetensors file: its length as a little-endian uint64, then JSON."""
    header: dict[str, object] = {}
    sharding: dict[str, object] = {}
    end = 0
    for piece in slices:
        dtype = piece.tensor.dtype
        if dtype not in SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"`{piece.key}` has a dtype that safetensors cannot store",
                got=str(dtype),
                fix="cast it, for example with `.float()`",
            )
        start, end = end, end + piece.tensor.numel() * dtype.itemsize
        header[piece.key] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(piece.tensor.shape),
            "data_offsets": [start, end],
        }
        sharding[piece.key] = {
            SAVED_OFFSETS: list(piece.offsets),
            FULL_SHAPE: list(piece.full_shape),
        }
    if metadata is None:
        metadata = {"format": "pt", SHARDING: json.dumps(sharding), "DCP_VERSION": "1.0"}
    header["__metadata__"] = dict(metadata)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data after the header is aligned to 8 bytes
    return struct.pack("<Q", len(text)) + text


def write_safetensors(
    directory: str, name: str, slices: Iterable[Slice], metadata: Mapping[str, str] | None = None
) -> FileEntry:
    """Write slices of tensors as a safetensors file.

    Effects: ambient. A slice on another device is copied to the CPU, one at a time. Tensors on the
    CPU are not copied.

    Args:
        directory: The folder.
        name: Name of the file.
        slices: One for each tensor in the file.
        metadata: For the header; None stores the offsets of each slice.
    """
    # Larger elements first: then each tensor is aligned to the size of its elements.
    ordered = sorted(slices, key=lambda piece: -piece.tensor.dtype.itemsize)

    def chunks() -> Iterator[bytes | memoryview]:
        yield _header(ordered, metadata)
        for piece in ordered:
            yield from _byte_chunks(piece.tensor)

    return write_file(directory, name, chunks())


def write_shards(directory: str, rank: int, slices: Iterable[Slice]) -> list[FileEntry]:
    """Write the slices of one rank as safetensors files; return the files.

    Effects: ambient. A name is in a safetensors file only once. So a second slice of a tensor goes
    to a second file.
    """
    files: list[dict[str, Slice]] = []
    for piece in slices:
        for file in files:
            if piece.key not in file:
                file[piece.key] = piece
                break
        else:
            files.append({piece.key: piece})
    entries: list[FileEntry] = []
    for number, file in enumerate(files, start=1):
        name = f"shard-{rank + 1:05d}-model-{number:05d}-of-{len(files):05d}.safetensors"
        entries.append(write_safetensors(directory, name, file.values()))
    return entries


def write_file(directory: str, name: str, chunks: Iterable[bytes | memoryview]) -> FileEntry:
    """Write a new file; its bytes are on the disk when this returns.

    Effects: ambient. Its name is on the disk after `sync_directory`.
    """
    digest, size = xxhash.xxh3_128(), 0
    # O_EXCL: an existing file is an error, because it is another writer's.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = os.open(os.path.join(directory, name), flags, 0o644)
    try:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            remaining = memoryview(chunk)
            while remaining:  # `os.write` may write fewer bytes
                remaining = remaining[os.write(fd, remaining) :]
        os.fsync(fd)  # without it, a crash of the node may leave an empty file
    finally:
        os.close(fd)
    return FileEntry(name, size, digest.hexdigest())


def read_regular_file(path: str, num_bytes: int = -1, *, follows_links: bool = False) -> bytes:
    """Return the first `num_bytes` of a file; all of it by default.

    Effects: ambient.

    Args:
        path: The file, which another program may have written.
        num_bytes: How much to read.
        follows_links: Whether it may be a symbolic link, which leads elsewhere.

    Raises:
        ValueError: It is a pipe, a device, a folder, or larger than 1 GiB.
        OSError: It cannot be read, or is a link.
    """
    # To open a pipe waits for its writer.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if not follows_links:
        flags |= os.O_NOFOLLOW
    fd = os.open(path, flags)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > _MAX_BYTES:
            raise ValueError(f"it has {status.st_size} bytes")
        with open(fd, "rb", closefd=False) as file:
            return file.read(num_bytes)
    finally:
        os.close(fd)


def hash_file(path: str) -> str:
    """Return the 128-bit XXH3 of a file, in hexadecimal.

    Effects: ambient.
    """
    digest = xxhash.xxh3_128()
    # Unbuffered: chunks are read directly, without a copy in Python's buffer.
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: str) -> None:
    """Write the bytes of a file that another library has written to the disk.

    Effects: ambient.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_directory(path: str) -> None:
    """Write the names in a directory to the disk: a new or renamed file is durable only after that.

    Effects: ambient.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: str) -> None:
    """Make a directory and its missing parents; their names are on the disk when this returns.

    Effects: ambient.
    """
    # From the deepest missing directory upwards; made and fsynced from the top downwards.
    missing: list[str] = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for directory in reversed(missing):
        os.makedirs(directory, exist_ok=True)
        sync_directory(os.path.dirname(directory))


class DirectoryLock:
    """The exclusive right to write into a directory of checkpoints, across processes.

    A lock of the operating system on the file `.lock`: it is released when the process dies.

    Args:
        directory: The directory.

    Raises:
        CheckpointError: Another writer has it.
    """

    def __init__(self, directory: str) -> None:
        # O_NOFOLLOW: a link would create a file outside of the directory.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd: int | None = os.open(os.path.join(directory, ".lock"), flags, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            # EACCES on some network file systems; others do not support locks at all, which is an
            # error
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise CheckpointError(
                "another writer is saving into this directory",
                got=directory,
                fix="use a different directory for each run",
            ) from None

    def release(self) -> None:
        """Release it; a second call does nothing."""
        if self._fd is None:
            return
        # Closing is not enough: a forked worker of a DataLoader has a copy of the descriptor.
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
        self._fd = None
