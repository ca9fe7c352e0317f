"""Samples of one length from documents of any lengths."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import torch

from faccel.checks import integer, is_finite
from faccel.data.indexed_tokens import IndexedTokens, damaged
from faccel.data.order import permute
from faccel.errors import DataError, short_repr
from faccel.validators import construct


def _tokens(value: Any) -> IndexedTokens:
    if isinstance(value, str | os.PathLike):
        return IndexedTokens(value)
    if isinstance(value, IndexedTokens):
        return value
    raise DataError(
        "`tokens` must be an `IndexedTokens` or its path",
        got=short_repr(value),
        fix='write `faccel.data.PackedTokens("corpus_text_document", 1024)`',
    )


def _check_length(instance: object, attribute: attrs.Attribute[int], value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise DataError(
            "`length` must be an int of at least 1",
            got=short_repr(value),
            fix="write `length=1024`",
        )


def _check_split(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    is_pair = isinstance(value, tuple) and len(value) == 2 and all(map(is_finite, value))
    if not is_pair or not 0 <= value[0] < value[1] <= 1:
        raise DataError(
            "`split` must be two increasing fractions from 0 to 1",
            got=short_repr(value),
            fix="write `split=(0.0, 0.969)` for training and `split=(0.969, 1.0)` for evaluation",
        )


def check_seed(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    """Raise unless a field is None or a seed, an int of at least 0."""
    if value is not None:
        integer(attribute.name, value, at_least=0, error=DataError)


@attrs.frozen(eq=False)
class _Stream:
    """The tokens of some sequences, one after the other, of which samples are cut.

    Args:
        begin: Position of the first token.
        num_tokens: Number of tokens.
        starts: `int64[n]`, the first token of each sequence, in their order in the stream; None if
            they are in the order of the file.
        ends: `int64[n]`, the position in the stream after each sequence; None as `starts`.
    """

    begin: int
    num_tokens: int
    starts: np.ndarray[Any, Any] | None = None
    ends: np.ndarray[Any, Any] | None = None


@attrs.frozen(eq=False)
class PackedTokens:
    """Samples of `length` tokens and the next one, from documents one after the other.

    A dataset of `int64[length + 1]`: inputs are `sample[:-1]`, labels `sample[1:]`. Sample `i` has
    the tokens from `i * length` on, so that neighbors share one token and each token but the first
    is a label once. There are `(num_tokens - 1) // length` samples, as many as Megatron-LM's
    `GPTDataset` has in an epoch.

    In the order of the file nothing is computed or kept in memory, whatever the size. Shuffle the
    samples with `DataLoader(..., shuffle=True)`: `faccel.shard` computes the order of each epoch by
    arithmetic.

    Args:
        tokens: An `IndexedTokens`, or its path.
        length: Tokens of a sample.
        split: The part of the sequences that is read, as fractions; rounded as Megatron-LM does.
        document_seed: Puts the sequences into a shuffled order before they are cut, so that a
            sample has documents from all parts of the file. Keeps 16 bytes per sequence in memory.
            None is the order of the file.

    Raises:
        DataError: The part has fewer than `length + 1` tokens, or an argument is invalid.

    Examples:
        >>> PackedTokens("missing", 1024)
        Traceback (most recent call last):
        faccel.errors.DataError: `missing.idx` cannot be read. Got No such file or directory.
        To fix: pass the path of both files without `.bin` and `.idx`.
    """

    tokens: IndexedTokens = attrs.field(converter=_tokens)
    length: int = attrs.field(validator=_check_length)
    split: tuple[float, float] = attrs.field(
        default=(0.0, 1.0), kw_only=True, validator=_check_split
    )
    document_seed: int | None = attrs.field(default=None, kw_only=True, validator=check_seed)
    _stream: _Stream = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        stream = _make_stream(self.tokens, self.split, self.document_seed)
        if stream.num_tokens <= self.length:
            raise DataError(
                "the dataset is shorter than one sample",
                got=f"{stream.num_tokens} tokens, length={self.length}",
                fix="use a smaller `length`, a larger `split` or more documents",
            )
        object.__setattr__(self, "_stream", stream)

    def __reduce__(self) -> tuple[Callable[..., PackedTokens], tuple[object, ...]]:
        names = ("tokens", "length", "split", "document_seed")
        return construct, (PackedTokens, {name: getattr(self, name) for name in names})

    def __len__(self) -> int:
        """Return the number of samples of an epoch."""
        return (self._stream.num_tokens - 1) // self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return one sample."""
        begin = range(len(self))[operator.index(index)] * self.length
        end = begin + self.length + 1
        stream = self._stream
        # In the order of the file a sample is one read, whatever sequences it has.
        if stream.ends is None or stream.starts is None:
            return self.tokens.read(stream.begin + begin, stream.begin + end)
        parts: list[torch.Tensor] = []
        # The sequence with the token at `begin`: the first one that ends after it.
        sequence = int(np.searchsorted(stream.ends, begin, side="right"))
        while begin < end:
            stop = min(int(stream.ends[sequence]), end)
            # From positions in the stream to positions in the file.
            first = stream.ends[sequence - 1] if sequence else 0
            offset = int(stream.starts[sequence]) - int(first)
            parts.append(self.tokens.read(begin + offset, stop + offset))
            begin = stop
            sequence += 1
        return torch.cat(parts)


def _make_stream(
    tokens: IndexedTokens, split: tuple[float, float], document_seed: int | None
) -> _Stream:
    # As `BlendedMegatronDatasetBuilder` rounds the parts of `--split`.
    first, last = (round(fraction * float(len(tokens))) for fraction in split)
    begin = tokens.first_token(first)
    num_tokens = tokens.first_token(last) - begin
    if document_seed is None or first == last:
        return _Stream(begin, num_tokens)
    # Once for all epochs: an order per epoch would take 16 bytes per sequence for each.
    sequences = permute(np.arange(last - first), last - first, document_seed, 0)
    lengths = tokens.lengths[first:last].astype(np.int64)
    # A sample would have tokens of another place.
    if lengths.min() < 0 or lengths.sum() != num_tokens:
        got = f"lengths of {lengths.sum()} tokens, and {num_tokens} between their positions"
        raise damaged(f"{tokens.prefix}.idx", got)
    starts = begin + np.cumsum(lengths) - lengths
    return _Stream(begin, num_tokens, starts[sequences], np.cumsum(lengths[sequences]))
