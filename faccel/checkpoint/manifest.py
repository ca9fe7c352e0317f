"""The manifest of a checkpoint, and what a directory of checkpoints contains."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import xxhash

from faccel.checkpoint.arguments import folder_argument
from faccel.checkpoint.codec import Node
from faccel.checkpoint.files import FileEntry, hash_file, read_regular_file
from faccel.checkpoint.json_values import json_problem
from faccel.errors import CheckpointError, short_text

MANIFEST = "manifest.json"
TEMPORARY_PREFIX = ".tmp-step-"
_VERSION = 1  # of the format; a change needs a new number and a reader of the old format
_FIRST_WORDS = b"faccel checkpoint "
# `step-000000100`, or `step-000000100-1` if a corrupt checkpoint has the first name.
_FOLDER_NAME = re.compile(r"step-(\d{9,})(?:-(\d+))?")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_SHARD_NAME = re.compile(r"shard.*\.safetensors")
_HASH = re.compile(r"[0-9a-f]{32}")


class NewerFormatError(ValueError):
    """A manifest is of a later version of the format: it is valid, but cannot be read."""


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
        is_newer_format: Whether a newer version of faccel has written it. Then it is valid, `load`
            and `latest` raise instead of returning an older one, and `save` never deletes it.
    """

    path: str
    step: int
    world_size: int = 0
    num_bytes: int = 0
    created_s: float = 0.0
    metadata: Mapping[str, Any] = attrs.field(factory=dict)
    problem: str | None = None
    is_newer_format: bool = False


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
        fields = attrs.asdict(self, recurse=False)  # recursion would need a call per level
        fields["files"] = [attrs.asdict(entry) for entry in self.files]
        # `allow_nan=False`: NaN is no JSON, and the codec of floats stores it as a string
        text = json.dumps(fields, separators=(",", ":"), allow_nan=False)
        body = text.encode() + b"\n"
        digest = xxhash.xxh3_128(body).hexdigest()
        return _FIRST_WORDS + f"{_VERSION} {digest}\n".encode() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read what `to_bytes` returned.

        Only `check_nodes` looks into the nodes of the state.

        Raises:
            NewerFormatError: It was written by a later version of faccel.
            ValueError: It is not a manifest, its bytes have changed, or a field is invalid.
        """
        first_line, _, body = data.partition(b"\n")
        words = first_line.split(b" ")
        if not first_line.startswith(_FIRST_WORDS) or len(words) != 4:
            raise ValueError("the manifest is not faccel's")
        version, digest = words[2:]
        # The hash first: a flipped bit in the version must not be reported as another version.
        if digest != xxhash.xxh3_128(body).hexdigest().encode():
            raise ValueError("the manifest is corrupt: its hash differs")
        if version != str(_VERSION).encode():
            text = version[:20].decode(errors="replace")
            message = f"version {text} of the format, this faccel reads {_VERSION}"
            if text.isdecimal() and int(text) > _VERSION:
                raise NewerFormatError(message)
            raise ValueError(message)
        try:
            fields = json.loads(
                body, parse_constant=_refuse_constant, object_pairs_hook=_unique_fields
            )
        except RecursionError:
            raise ValueError("the manifest is nested too deeply") from None
        return cls._of_fields(fields)

    @classmethod
    def _of_fields(cls, fields: object) -> Manifest:
        """Return the record of JSON fields, after a check of each of them."""
        # The hash was valid, so another version or another program has written other fields.
        if not isinstance(fields, dict) or fields.keys() != _FIELDS.keys():
            raise ValueError(f"the fields of the manifest are not {', '.join(_FIELDS)}")
        for name, is_valid in _FIELDS.items():
            if not is_valid(fields[name]):
                raise ValueError(f"the field `{name}` of the manifest is invalid")
        files = list(map(_file_entry, fields["files"]))
        if len({entry.name for entry in files}) != len(files):
            raise ValueError("the manifest names a file twice")
        fields["files"] = tuple(files)
        return cls(**fields)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"the manifest contains {text}, which is no JSON")


def _unique_fields(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("the manifest has two fields of one name")
    return fields


def _is_int(value: object, at_least: int) -> bool:
    return type(value) is int and value >= at_least  # a bool is an int in Python


def _is_time(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < 1e18  # JSON has infinite numbers, such as 1e999


def _is_mesh(value: object) -> bool:
    return isinstance(value, dict) and all(_is_int(extent, 1) for extent in value.values())


_FIELDS = {
    "step": lambda value: _is_int(value, 0),
    "world_size": lambda value: _is_int(value, 1),
    "mesh": _is_mesh,
    "created_s": _is_time,
    "metadata": lambda value: isinstance(value, dict) and json_problem(value) is None,
    "files": lambda value: isinstance(value, list),
    "state": lambda value: True,
}
"""Whether a value of each field of a manifest is valid."""


def _file_entry(fields: object) -> FileEntry:
    if not isinstance(fields, dict) or fields.keys() != {"name", "size", "xxh3"}:
        raise ValueError("a file of the manifest has other fields than name, size and xxh3")
    name, size, xxh3 = fields["name"], fields["size"], fields["xxh3"]
    # A name such as `../x` would read outside the folder.
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
        raise ValueError("the manifest names a file outside its folder")
    is_hash = isinstance(xxh3, str) and _HASH.fullmatch(xxh3) is not None
    if not _is_int(size, 0) or not is_hash:
        raise ValueError(f"the manifest has an invalid size or hash of `{short_text(name)}`")
    return FileEntry(name, size, xxh3)


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
        NewerFormatError: It was written by a later version of faccel.
        ValueError: The manifest is invalid, or a file is missing, additional or of another size;
            the message names it.
    """
    try:
        data = read_regular_file(os.path.join(folder, MANIFEST))
    except OSError as error:
        raise ValueError(f"no manifest ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"the manifest is invalid: {error}") from None
    manifest = Manifest.from_bytes(data)
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


def is_written_by_faccel(folder: str) -> bool:
    """Return whether a folder has a manifest that faccel has begun.

    Effects: ambient. Only such folders are renamed or deleted.
    """
    try:
        data = read_regular_file(os.path.join(folder, MANIFEST), len(_FIRST_WORDS))
    except (OSError, ValueError):
        return False
    return data == _FIRST_WORDS


def _has_files_of_checkpoint(folder: str) -> bool:
    """Return whether a folder has a file that is named as those of a checkpoint."""
    try:
        names = os.listdir(folder)
    except OSError:  # it may be a checkpoint: its problem is reported
        return True
    return MANIFEST in names or any(map(_SHARD_NAME.fullmatch, names))


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


def checkpoints(path: str | os.PathLike[str]) -> list[Checkpoint]:
    """Return the checkpoints of a directory, newest first, with the problems of invalid ones.

    Effects: pure. Reads manifests and sizes of files on this node; `load` compares hashes too.

    Examples:
        >>> checkpoints("missing/directory")
        []
    """
    path = folder_argument(path)
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise CheckpointError(
            "`path` must be a directory of checkpoints",
            got=f"`{path}`, a file",
            fix="pass a directory, as in `path='runs/first'`",
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"`path` cannot be listed: {error.strerror}",
            got=f"`{path}`",
            fix="pass a directory that this user can read, as in `path='runs/first'`",
        ) from None
    folders: list[tuple[int, int, str]] = []
    for name in names:
        match = _FOLDER_NAME.fullmatch(name)
        folder = os.path.join(path, name)
        # A link to a folder is read as the folder. Another program may have used such a name.
        if match is not None and os.path.isdir(folder) and _has_files_of_checkpoint(folder):
            folders.append((int(match[1]), int(match[2] or 0), name))
    folders.sort(reverse=True)  # by step, then by attempt
    return [_checkpoint_at(os.path.join(path, name), step) for step, _, name in folders]


def newest_committed(existing: Sequence[Checkpoint]) -> Checkpoint | None:
    """Return the first checkpoint without a problem; None if there is none.

    Effects: pure.

    Raises:
        CheckpointError: One before it was written by a newer version of faccel.
    """
    for checkpoint in existing:
        check_format(checkpoint)
        if checkpoint.problem is None:
            return checkpoint
    return None


def check_format(checkpoint: Checkpoint) -> None:
    """Raise if a checkpoint was written by a newer version of faccel.

    Effects: pure.

    Raises:
        CheckpointError: It was. An older checkpoint in its place would lose progress silently.
    """
    if checkpoint.is_newer_format:
        raise CheckpointError(
            f"the checkpoint `{checkpoint.path}` was written by a newer version of faccel",
            got=checkpoint.problem or "",
            fix="run `pip install --upgrade faccel`, or use another directory; "
            "`load(..., step=step)` loads an older checkpoint",
        )


def _checkpoint_at(folder: str, step: int) -> Checkpoint:
    try:
        manifest = read_manifest(folder)
        if manifest.step != step:  # a folder that was copied or renamed by hand
            raise ValueError(f"the manifest is of step {manifest.step}")
    except ValueError as error:
        is_newer = isinstance(error, NewerFormatError)
        return Checkpoint(folder, step, problem=str(error), is_newer_format=is_newer)
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
