"""The manifest of a checkpoint, and what a directory of checkpoints contains."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import attrs
import xxhash

from faccel.checkpoint.arguments import folder_argument
from faccel.checkpoint.codec import Node
from faccel.checkpoint.files import FileEntry, hash_file
from faccel.errors import CheckpointError

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-step-"
_VERSION = 1  # of the format; a change needs a new number and a reader of the old format
# `step-000000100`, or `step-000000100-1` if a corrupt checkpoint has the first name.
_FOLDER_NAME = re.compile(r"step-(\d{9,})(?:-(\d+))?")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@attrs.frozen
class Checkpoint:
    """One checkpoint of a directory.

    Args:
        path: Its folder.
        step: The step that it was saved at.
        world_size: Number of ranks that saved it.
        num_bytes: Size of its files together.
        created_s: When it was saved, in seconds since 1970.
        metadata: The `metadata` argument of `save`.
        problem: Why it cannot be loaded; None for a committed one. Only `load` compares hashes.
    """

    path: str
    step: int
    world_size: int = 0
    num_bytes: int = 0
    created_s: float = 0.0
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    problem: str | None = None


@attrs.frozen
class Manifest:
    """The description of a checkpoint. It is written last: a folder without it is not a checkpoint.

    The names of the fields are those in the file.

    Args:
        step: See `Checkpoint`.
        world_size: See `Checkpoint`.
        mesh: Ranks per axis of the world that saved it.
        created_s: See `Checkpoint`.
        metadata: See `Checkpoint`.
        files: Its other files.
        state: The node of the state.
    """

    step: int
    world_size: int
    mesh: Mapping[str, int]
    created_s: float
    metadata: Mapping[str, Any]
    files: tuple[FileEntry, ...]
    state: Node = attrs.field(repr=False)

    @property
    def file_names(self) -> list[str]:
        """The names of its other files."""
        return [entry.name for entry in self.files]

    def to_bytes(self) -> bytes:
        """Return a first line with version and hash, and a second line of JSON."""
        # `allow_nan=False`: NaN is no JSON, and the codec of floats stores it as a string
        text = json.dumps(attrs.asdict(self), separators=(",", ":"), allow_nan=False)
        body = text.encode() + b"\n"
        digest = xxhash.xxh3_128(body).hexdigest()
        return f"faccel checkpoint {_VERSION} {digest}\n".encode() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read what `to_bytes` returned.

        Raises:
            ValueError: It is not a manifest, or its bytes have changed.
        """
        first_line, _, body = data.partition(b"\n")
        words = first_line.split(b" ")
        if words[:2] != [b"faccel", b"checkpoint"] or len(words) != 4:
            raise ValueError("the manifest is not faccel's")
        version, digest = words[2:]
        # The hash first: a flipped bit in the version must not be reported as another version.
        if digest != xxhash.xxh3_128(body).hexdigest().encode():
            raise ValueError("the manifest is corrupt: its hash differs")
        if version != str(_VERSION).encode():
            text = version.decode(errors="replace")
            raise ValueError(f"version {text} of the format, this faccel reads {_VERSION}")
        fields = json.loads(body)
        files = tuple(FileEntry(**entry) for entry in fields.pop("files"))
        for file in files:  # a name such as `../x` would read outside the folder
            if not _FILE_NAME.fullmatch(file.name):
                raise ValueError("the manifest names a file outside its folder")
        return cls(files=files, **fields)


def folder_name(step: int, attempt: int = 0) -> str:
    """Return the name of a checkpoint's folder.

    Effects: pure.

    Args:
        step: The step.
        attempt: Above 0 if folders of earlier attempts at this step exist.
    """
    name = f"step-{step:09d}"
    if attempt:
        name += f"-{attempt}"
    return name


def read_manifest(folder: str) -> Manifest:
    """Read the manifest of a folder, and check that its files exist and have the right sizes.

    Effects: ambient.

    Raises:
        ValueError: A file is missing, additional or of another size; the message names it.
    """
    try:
        with open(os.path.join(folder, MANIFEST), "rb") as file:
            manifest = Manifest.from_bytes(file.read())
    except OSError as error:
        raise ValueError(f"no manifest ({error.strerror})") from error
    # The hash was valid, so a manifest with other fields was written by another version.
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"the manifest cannot be read: {error}") from error
    sizes = _file_sizes(folder)
    for entry in manifest.files:
        if entry.name not in sizes:
            raise ValueError(f"`{entry.name}` is missing")
        size = sizes.pop(entry.name)
        if size != entry.size:
            raise ValueError(f"`{entry.name}` has {size} bytes instead of {entry.size}")
    # The reader of tensors would take an additional file for a part of the checkpoint.
    for name in sorted(sizes):
        if name.endswith(".safetensors"):
            raise ValueError(f"`{name}` does not belong to it")
    return manifest


def _file_sizes(folder: str) -> dict[str, int]:
    """Return the sizes of the files in a folder, without links, because they lead elsewhere."""
    sizes: dict[str, int] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False):
                    sizes[entry.name] = entry.stat().st_size
    except OSError as error:  # another process is removing the folder
        raise ValueError(f"its files cannot be read ({error.strerror})") from error
    return sizes


def check_hash(folder: str, entry: FileEntry) -> str | None:
    """Return what is wrong with a file; None if its hash is unchanged.

    Effects: ambient.
    """
    try:
        digest = hash_file(os.path.join(folder, entry.name))
    except OSError as error:
        return f"`{entry.name}` cannot be read ({error.strerror})"
    if digest != entry.xxh3:
        return f"`{entry.name}` is corrupt: its hash differs"
    return None


def first_corrupt_file(folder: str, manifest: Manifest) -> str | None:
    """Compare the hashes of all files; return the first problem, None if all are valid.

    Effects: ambient.
    """
    for entry in manifest.files:
        problem = check_hash(folder, entry)
        if problem is not None:
            return problem
    return None


def checkpoints(path: str | os.PathLike[str]) -> list[Checkpoint]:
    """Return the checkpoints of a directory, newest first, with the problems of invalid ones.

    Effects: pure. Reads manifests and sizes of files on this node; `load` compares hashes too.

    Examples:
        >>> checkpoints("missing/directory")
        []
    """
    path = folder_argument(path)
    try:
        names = [entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise CheckpointError(
            "`path` must be a directory of checkpoints",
            got=f"`{path}`, a file",
            fix="pass a directory, as in `path='runs/first'`",
        ) from None
    folders: list[tuple[int, int, str]] = []
    for name in names:
        match = _FOLDER_NAME.fullmatch(name)
        if match is not None:
            folders.append((int(match[1]), int(match[2] or 0), name))
    folders.sort(reverse=True)  # by step, then by attempt
    return [_checkpoint_at(os.path.join(path, name), step) for step, _, name in folders]


def newest_valid(path: str | os.PathLike[str]) -> Checkpoint | None:
    """Return the newest checkpoint of a directory that has no problem; None if there is none.

    Effects: ambient.
    """
    for checkpoint in checkpoints(path):
        if checkpoint.problem is None:
            return checkpoint
    return None


def _checkpoint_at(folder: str, step: int) -> Checkpoint:
    try:
        manifest = read_manifest(folder)
        if manifest.step != step:  # a folder that was copied or renamed by hand
            raise ValueError(f"the manifest is of step {manifest.step}")
    except ValueError as error:
        return Checkpoint(folder, step, problem=str(error))
    return checkpoint_of(folder, manifest)


def checkpoint_of(folder: str, manifest: Manifest) -> Checkpoint:
    """Return the record of a committed checkpoint.

    Effects: pure.
    """
    return Checkpoint(
        path=folder,
        step=manifest.step,
        world_size=manifest.world_size,
        num_bytes=sum(entry.size for entry in manifest.files),
        created_s=manifest.created_s,
        metadata=manifest.metadata,
    )
