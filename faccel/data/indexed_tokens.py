"""Megatron-LM's indexed datasets: tokens in `NAME.bin`, and where sequences begin in `NAME.idx`.

`megatron/core/datasets/indexed_dataset.py` of Megatron-core 0.16 defines the format, whose version
is 1. All numbers are little-endian:

| bytes of the index | content |
| --- | --- |
| 9 | `MMIDIDX`, and two zero bytes |
| 8 | `uint64`: the version, 1 |
| 1 | `uint8`: the type of the tokens, a key of `_DTYPES` |
| 8 | `uint64`: number of sequences `n` |
| 8 | `uint64`: number of document boundaries `m` |
| `4 * n` | `int32[n]`: tokens of each sequence |
| `8 * n` | `int64[n]`: its first byte in the other file |
| `8 * m` | `int64[m]`: the first sequence of each document, and `n` |
| 0 or `n` | `int8[n]`: modes, of multimodal datasets only |
"""

from __future__ import annotations

import operator
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np
import torch

from faccel.errors import DataError, short_repr, short_text
from faccel.validators import construct

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_VERSION = 1
_DTYPES: Mapping[int, str] = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
# Floating point numbers are no tokens.
_FLOATS = (6, 7)


def _prefix(value: object) -> str:
    if not isinstance(value, str | os.PathLike):
        raise DataError(
            "`prefix` must be the path of two files, without `.bin` and `.idx`",
            got=short_repr(value),
            fix='write `faccel.data.IndexedTokens("corpus_text_document")`',
        )
    # Megatron-LM's flags have no suffix, and shells complete one.
    path = os.fspath(value)
    return str(path).removesuffix(".bin").removesuffix(".idx")


@attrs.frozen(eq=False)
class _Files:
    """The memory-mapped content of both files."""

    lengths: np.ndarray[Any, Any]
    pointers: np.ndarray[Any, Any]
    documents: np.ndarray[Any, Any]
    tokens: np.ndarray[Any, Any]


@attrs.frozen(eq=False)
class IndexedTokens:
    """The sequences of `PREFIX.bin` and `PREFIX.idx`, as Megatron-LM's `preprocess_data.py` writes.

    A dataset of `int64[length]`. Opening takes the same time and memory for every size: both files
    are memory-mapped. Megatron-LM is not needed.

    Args:
        prefix: Path of the two files without `.bin` and `.idx`.

    Raises:
        DataError: A file is missing, is no indexed dataset, or the two do not fit each other.

    Examples:
        >>> IndexedTokens("missing")
        Traceback (most recent call last):
        faccel.errors.DataError: `missing.idx` cannot be read. Got No such file or directory.
        To fix: pass the path of both files without `.bin` and `.idx`.
    """

    prefix: str = attrs.field(converter=_prefix)
    _files: _Files = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "_files", _open(self.prefix))

    # A worker that was spawned maps the files again: a pickled map is a copy of the file.
    def __reduce__(self) -> tuple[Callable[..., IndexedTokens], tuple[object, ...]]:
        return construct, (IndexedTokens, {"prefix": self.prefix})

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return len(self._files.tokens)

    @property
    def num_documents(self) -> int:
        """Number of documents, each of one sequence or more."""
        return len(self._files.documents) - 1

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """`int32[n]`: number of tokens of each sequence, memory-mapped."""
        return self._files.lengths

    def first_token(self, sequence: int) -> int:
        """Return the position of a sequence in the tokens of all; for `n`, that after the last."""
        if sequence == len(self):
            return self.num_tokens
        position, remainder = divmod(
            int(self._files.pointers[sequence]), self._files.tokens.itemsize
        )
        if remainder:
            raise damaged(f"{self.prefix}.idx", f"sequence {sequence} in the middle of a token")
        return position

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Return the tokens `int64[end - begin]` at these positions of all tokens."""
        # A slice would be shorter, and the sample, too.
        if not 0 <= begin <= end <= self.num_tokens:
            got = f"tokens {begin} to {end} of {self.num_tokens}"
            raise damaged(f"{self.prefix}.idx", got)
        # A copy: a view of the file could not be written, and would keep it open.
        return torch.from_numpy(self._files.tokens[begin:end].astype(np.int64))

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self._files.lengths)

    def __getitem__(self, sequence: int) -> torch.Tensor:
        """Return the tokens of one sequence."""
        index = range(len(self))[operator.index(sequence)]  # IndexError after the end, as of a list
        begin = self.first_token(index)
        return self.read(begin, begin + int(self._files.lengths[index]))


def _open(prefix: str) -> _Files:
    index_path, tokens_path = f"{prefix}.idx", f"{prefix}.bin"
    header = _read_header(index_path)
    code, num_sequences, num_boundaries = header
    index = np.memmap(index_path, mode="r", dtype=np.uint8)
    # int32 lengths, int64 pointers and int64 boundaries.
    sizes = (4 * num_sequences, 8 * num_sequences, 8 * num_boundaries)
    expected = _HEADER.size + sum(sizes)
    if len(index) not in (expected, expected + num_sequences):
        raise damaged(index_path, f"{len(index)} bytes, and {expected} by its header")
    ends = _HEADER.size + np.cumsum(sizes)
    lengths = index[_HEADER.size : ends[0]].view("<i4")
    pointers = index[ends[0] : ends[1]].view("<i8")
    documents = index[ends[1] : ends[2]].view("<i8")
    tokens = _map_tokens(tokens_path, _DTYPES[code])
    if num_sequences == 0 or len(tokens) == 0:
        raise DataError(
            f"`{prefix}` has no tokens",
            got=f"{num_sequences} sequences",
            fix="pass another dataset",
        )
    # The first and the last sequence only, so that opening reads two pages of a large file.
    end = int(pointers[-1]) + int(lengths[-1]) * tokens.itemsize
    if pointers[0] != 0 or end != tokens.nbytes:
        raise damaged(tokens_path, f"{tokens.nbytes} bytes, and {end} by `{index_path}`")
    if len(documents) == 0 or (documents[0], documents[-1]) != (0, num_sequences):
        got = f"documents from {documents[:1]} to {documents[-1:]} of {num_sequences} sequences"
        raise damaged(index_path, got)
    return _Files(lengths, pointers, documents, tokens)


def _read_header(path: str) -> tuple[int, int, int]:
    """Return the code of the type, the number of sequences, and that of boundaries."""
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise _unreadable(path, error) from None
    if not header.startswith(_MAGIC) or len(header) < _HEADER.size:
        raise DataError(
            f"`{path}` is not the index of an indexed dataset",
            got=f"a file that begins with {short_repr(header[:9])}",
            fix="pass files that Megatron-LM's `tools/preprocess_data.py` has written",
        )
    _, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
    if version != _VERSION or code not in _DTYPES:
        kind = "a type that has no tokens" if code in _FLOATS else "an unknown type"
        raise DataError(
            f"`{path}` has an unknown version or {kind}",
            got=f"version {version}, type {code}",
            fix=f"write it as version {_VERSION} with integers",
        )
    return code, num_sequences, num_boundaries


def _map_tokens(path: str, dtype: str) -> np.ndarray[Any, Any]:
    try:
        num_bytes = os.path.getsize(path)
        if num_bytes == 0:  # which has no map
            return np.empty(0, dtype)
        if num_bytes % np.dtype(dtype).itemsize:
            raise damaged(path, f"{num_bytes} bytes, no multiple of {np.dtype(dtype).itemsize}")
        return np.memmap(path, mode="r", dtype=dtype)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: OSError | ValueError) -> DataError:
    return DataError(
        f"`{short_text(path)}` cannot be read",
        got=getattr(error, "strerror", None) or str(error),
        fix="pass the path of both files without `.bin` and `.idx`",
    )


def damaged(path: str, got: str) -> DataError:
    """Return the error of a file whose content does not fit the other file.

    Effects: pure.
    """
    return DataError(
        f"`{path}` is incomplete, or not of this dataset",
        got=got,
        fix="copy both files again, or write them with `tools/preprocess_data.py`",
    )
