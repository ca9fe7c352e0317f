"""What a directory of checkpoints holds: one folder each, with a manifest that says what belongs to it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import attrs
import xxhash

from faccel.checkpoint.files import FileEntry, hash_file
from faccel.errors import CheckpointError

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-step-"
_VERSION = 1
_NAME = re.compile(r"step-(\d{9,})(?:-(\d+))?")
_SAFE_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@attrs.frozen
class Checkpoint:
    """One checkpoint of a directory.

    Args:
        path: Its own folder.
        step: The step that it was saved at.
        world_size: How many ranks saved it.
        num_bytes: Size of its files together.
        created_s: When it was saved, in seconds since 1970.
        metadata: What the user gave to `save`, for policies and people.
        problem: Why it cannot be loaded; None for a committed one. Hashes are compared by `load`.
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
    """What belongs to a checkpoint; written last, so that it tells a whole one from a part of one.

    Args:
        step: As in `Checkpoint`.
        world_size: As in `Checkpoint`.
        mesh: Ranks per axis of the world that saved it.
        created_s: As in `Checkpoint`.
        metadata: As in `Checkpoint`.
        files: Its other files.
        state: The node of the state.
    """

    step: int
    world_size: int
    mesh: Mapping[str, int]
    created_s: float
    metadata: Mapping[str, Any]
    files: tuple[FileEntry, ...]
    state: Any = attrs.field(repr=False)

    def to_bytes(self) -> bytes:
        """Return a first line with version and hash, and JSON behind it."""
        body = (
            json.dumps(attrs.asdict(self), separators=(",", ":"), allow_nan=False).encode() + b"\n"
        )
        return f"faccel checkpoint {_VERSION} {xxhash.xxh3_128(body).hexdigest()}\n".encode() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read one.

        Raises:
            ValueError: It is none, or not as it was written.
        """
        head, _, body = data.partition(b"\n")
        words = head.split(b" ")
        if words[:2] != [b"faccel", b"checkpoint"] or len(words) != 4:
            raise ValueError("the manifest is not one of faccel's")
        if words[3] != xxhash.xxh3_128(body).hexdigest().encode():
            raise ValueError("the manifest is not as it was written")
        if words[2] != str(_VERSION).encode():
            raise ValueError(
                f"version {words[2].decode(errors='replace')} of the format, this faccel reads {_VERSION}"
            )
        fields = json.loads(body)
        files = tuple(FileEntry(**each) for each in fields.pop("files"))
        if any(not _SAFE_FILE.fullmatch(each.name) for each in files):
            raise ValueError("the manifest names a file outside of its folder")
        return cls(files=files, **fields)


def folder_name(step: int, attempt: int = 0) -> str:
    """Return the name of a checkpoint's folder; of a later attempt where an earlier one of the step is there."""
    return f"step-{step:09d}" + (f"-{attempt}" if attempt else "")


def read_manifest(folder: str) -> Manifest:
    """Read the manifest of a folder and compare what does not take long: which files are there, and their sizes.

    Raises:
        ValueError: Something is missing, additional or of another size; names it.
    """
    try:
        with open(os.path.join(folder, MANIFEST), "rb") as file:
            manifest = Manifest.from_bytes(file.read())
    except OSError as error:
        raise ValueError(f"no manifest ({error.strerror})") from error
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"the manifest cannot be read: {error}") from error
    try:
        with os.scandir(folder) as entries:
            sizes = {
                each.name: each.stat().st_size
                for each in entries
                if each.is_file(follow_symlinks=False)
            }
    except OSError as error:  # another process removes it
        raise ValueError(f"its files cannot be read ({error.strerror})") from error
    for each in manifest.files:
        if each.name not in sizes:
            raise ValueError(f"`{each.name}` is missing")
        if sizes[each.name] != each.size:
            raise ValueError(f"`{each.name}` has {sizes[each.name]} bytes instead of {each.size}")
    unknown = {n for n in sizes if n.endswith(".safetensors")} - {
        each.name for each in manifest.files
    }
    if unknown:
        raise ValueError(f"`{min(unknown)}` does not belong to it")
    return manifest


def check_hash(folder: str, entry: FileEntry) -> str | None:
    """Return what is wrong with a file; None if it is as it was written."""
    try:
        same = hash_file(os.path.join(folder, entry.name)) == entry.xxh3
    except OSError as error:
        return f"`{entry.name}` cannot be read ({error.strerror})"
    return None if same else f"`{entry.name}` is not as it was written"


def checkpoints(path: str | os.PathLike[str]) -> list[Checkpoint]:
    """Return what a directory holds, the newest first, with what is wrong with those that cannot be loaded.

    Effects: pure. Looks at manifests and sizes, on this machine; `load` compares hashes too.

    Examples:
        >>> checkpoints("no/such/place")
        []
    """
    path = os.path.abspath(path)
    try:
        names = [each.name for each in os.scandir(path) if each.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise CheckpointError(
            "checkpoints are kept in a directory", got=f"`{path}`, a file", fix="name another"
        ) from None
    found = [(int(m[1]), int(m[2] or 0), m[0]) for name in names if (m := _NAME.fullmatch(name))]
    return [_look(os.path.join(path, name), step) for step, _, name in sorted(found, reverse=True)]


def _look(folder: str, step: int) -> Checkpoint:
    try:
        manifest = read_manifest(folder)
        if manifest.step != step:
            raise ValueError(f"the manifest is that of step {manifest.step}")
    except ValueError as error:
        return Checkpoint(folder, step, problem=str(error))
    return checkpoint_of(folder, manifest)


def checkpoint_of(folder: str, manifest: Manifest) -> Checkpoint:
    """Return the record of a committed checkpoint."""
    num_bytes = sum(each.size for each in manifest.files)
    return Checkpoint(
        folder, manifest.step, manifest.world_size, num_bytes, manifest.created_s, manifest.metadata
    )
