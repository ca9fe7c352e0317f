"""The headers of safetensors files, and whether the slices in them are complete tensors."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs

from faccel.checkpoint.coverage import Box, first_gap
from faccel.checkpoint.files import FULL_SHAPE, SAFETENSORS_DTYPES, SAVED_OFFSETS, SHARDING
from faccel.errors import short_text

# Other programs write the last two.
_DTYPES = frozenset({*SAFETENSORS_DTYPES.values(), "F8_E4M3FNUZ", "F8_E5M2FNUZ"})


@attrs.frozen
class StoredSlice:
    """A block of a tensor in a safetensors file.

    Args:
        key: Name of the tensor.
        dtype: As in the header.
        sizes: Of the block, in each dim.
        offsets: Index of its first element in the full tensor.
        full_shape: Of the full tensor; None in a file that does not state it.
    """

    key: str
    dtype: str
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    full_shape: tuple[int, ...] | None


def read_slices(folder: str, names: Iterable[str]) -> list[StoredSlice]:
    """Return the slices in safetensors files.

    Effects: ambient.

    Raises:
        ValueError: A file or its header is invalid; the message names the file.
    """
    slices: list[StoredSlice] = []
    for name in names:
        if not name.endswith(".safetensors"):
            continue
        try:
            slices += _slices_of_file(os.path.join(folder, name))
        # The parsers are other libraries', and the bytes may be anything.
        except Exception as error:
            raise ValueError(f"`{name}` has an invalid header: {short_text(str(error))}") from error
    return slices


def _slices_of_file(path: str) -> list[StoredSlice]:
    from safetensors import safe_open

    # The library would wait for the writer of a pipe, and Ctrl-C could not end that.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")
    slices: list[StoredSlice] = []
    with safe_open(path, framework="pt") as file:
        sharding = _sharding(file.metadata())
        for key in file.keys():  # noqa: SIM118 (a file cannot be iterated)
            stored = file.get_slice(key)
            sizes = tuple(stored.get_shape())
            offsets, full_shape = (0,) * len(sizes), None
            if sharding is not None:
                offsets, full_shape = _place(sharding[key])
                if len(offsets) != len(sizes):
                    raise ValueError(f"`{key}` has offsets {offsets} and shape {sizes}")
            dtype = stored.get_dtype()
            if dtype not in _DTYPES:
                raise ValueError(f"`{key}` has the unsupported dtype {dtype}")
            slices.append(StoredSlice(key, dtype, sizes, offsets, full_shape))
    return slices


def _sharding(metadata: Mapping[str, str] | None) -> dict[str, Any] | None:
    """Return where each slice belongs, by its key; None for a file of full tensors."""
    text = (metadata or {}).get(SHARDING)
    if not text:
        return None
    sharding = json.loads(text)
    if not isinstance(sharding, dict):
        raise ValueError(f"`{SHARDING}` is no JSON object")
    return sharding


def _place(fields: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    offsets = _extents(SAVED_OFFSETS, fields[SAVED_OFFSETS])
    full_shape = None
    if FULL_SHAPE in fields:  # older versions and PyTorch do not write it
        full_shape = _extents(FULL_SHAPE, fields[FULL_SHAPE])
    return offsets, full_shape


def _extents(field: str, values: object) -> tuple[int, ...]:
    is_valid = isinstance(values, list)
    for value in values if isinstance(values, list) else ():
        # a bool is an int in Python; torch has 64-bit sizes
        is_valid = is_valid and type(value) is int and 0 <= value < 2**63
    if not is_valid:
        raise ValueError(f"`{field}` must be a list of ints of at least 0")
    return tuple(values)  # type: ignore[arg-type]


def check_slices(slices: Sequence[StoredSlice]) -> None:
    """Raise unless every element of every tensor is in a slice.

    Effects: pure.

    Raises:
        ValueError: The slices of a tensor do not fit each other, or one is missing.
    """
    by_key: dict[str, list[StoredSlice]] = {}
    for piece in slices:
        by_key.setdefault(piece.key, []).append(piece)
    for key, pieces in by_key.items():
        problem = _problem(pieces)
        if problem is not None:
            raise ValueError(f"the slices of `{short_text(key)}` {problem}")


def _problem(pieces: Sequence[StoredSlice]) -> str | None:
    first = pieces[0]
    boxes: list[Box] = []
    sizes_by_offsets: dict[tuple[int, ...], tuple[int, ...]] = {}
    for piece in pieces:
        if (piece.dtype, len(piece.sizes)) != (first.dtype, len(first.sizes)):
            return "have different dtypes or numbers of dims"
        if piece.full_shape != first.full_shape:
            return "state different shapes of the full tensor"
        # PyTorch's reader finds the file of a slice by its offsets.
        if sizes_by_offsets.setdefault(piece.offsets, piece.sizes) != piece.sizes:
            return f"overlap: two with other sizes are at {list(piece.offsets)}"
        boxes.append(Box.of(piece.offsets, piece.sizes))
    bounds = tuple(map(max, *(box.end for box in boxes), first.offsets))
    shape = bounds if first.full_shape is None else first.full_shape
    if len(shape) != len(bounds) or any(a > b for a, b in zip(bounds, shape, strict=True)):
        return f"reach {list(bounds)}, outside of the shape {list(shape)}"
    gap = first_gap(shape, boxes)
    if gap is not None:
        return f"are incomplete: none has the element {list(gap)} of the shape {list(shape)}"
    return None
