"""Collectives of few bytes on the CPU: one message from each rank to each other, of a fixed size.

gloo gathers and reduces in a ring of many rounds, in which 4 ranks take twice to seven times as
long. A hash of the call goes with the data, so that ranks that make other calls find out at once:
all messages have the same size, whatever the call, and each rank receives all hashes.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence

import attrs
import torch

from faccel.call_site import call_site, describe_ranks
from faccel.errors import DesyncError

NUM_BYTES = 256
_NUM_HASH_BYTES = 8
_MAX_BYTES = NUM_BYTES - _NUM_HASH_BYTES
_MAX_RANKS = 256  # with more, there are too many messages

# Two rows at a time, in the order of the ranks: on each processor the same result, which a sum over
# a dimension does not promise. Minimum and maximum of a NaN are NaN on every rank.
_OPERATORS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
    "prod": torch.mul,
}
# Those that gloo reduces as they are.
_REDUCED_DTYPES = frozenset(
    (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
    )
)


def is_small(x: torch.Tensor, num_ranks: int) -> bool:
    """Return whether a tensor fits into a row.

    Effects: pure.

    Examples:
        >>> is_small(torch.zeros(62), 4), is_small(torch.zeros(63), 4)
        (True, False)
    """
    return x.nbytes <= _MAX_BYTES and num_ranks <= _MAX_RANKS


def can_reduce(x: torch.Tensor) -> bool:
    """Return whether `reduced` supports the dtype.

    Effects: pure.
    """
    return x.dtype in _REDUCED_DTYPES


def to_row(x: torch.Tensor, call: str) -> torch.Tensor:
    """Return `uint8[256]`: the elements of `x`, and at the end a hash of the call.

    Effects: pure.
    """
    # The device for each new tensor, because the user may have set another default.
    row = torch.zeros(NUM_BYTES, dtype=torch.uint8, device="cpu")
    # Not a view of `x` as bytes, which strides and conjugation make impossible.
    row[: x.nbytes].view(x.dtype).view(x.shape).copy_(x.detach())
    # Not `hash(call)`, which differs between processes.
    row[-_NUM_HASH_BYTES:].view(torch.int64).fill_(zlib.crc32(call.encode()))
    return row


def have_equal_calls(rows: torch.Tensor) -> bool:
    """Return whether all rows have the same hash; the same on every rank.

    Effects: pure.

    Examples:
        >>> x = torch.ones(2)
        >>> have_equal_calls(torch.stack([to_row(x, "reduce"), to_row(x, "gather")]))
        False
    """
    hashes = rows[:, -_NUM_HASH_BYTES:]
    return bool((hashes == hashes[0]).all())


def values_of(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `T[num_ranks, ...]` in the dtype and shape of `like`; a copy.

    Effects: pure.

    Examples:
        >>> x = torch.tensor([1.0, 2.0])
        >>> values_of(torch.stack([to_row(x, ""), to_row(10 * x, "")]), x)
        tensor([[ 1.,  2.],
                [10., 20.]])
    """
    values = rows.view(like.dtype)[:, : like.numel()]
    # A copy, because gloo's threads may still reference `rows`; contiguous, for `view`.
    copy = values.clone(memory_format=torch.contiguous_format)
    return copy.view(len(rows), *like.shape)


def reduced(values: torch.Tensor, op: str) -> torch.Tensor:
    """Return the reduction of `T[num_ranks, ...]` over the ranks.

    Effects: pure.

    Examples:
        >>> reduced(torch.tensor([[1, 2], [10, 20]]), "sum")
        tensor([11, 22])
    """
    return functools.reduce(_OPERATORS[op], values.unbind())


@attrs.frozen(eq=False)
class Exchange:
    """A call of this rank with few bytes, in which each rank sends a row to each other.

    Args:
        call: Describes the call, for the error of ranks that make another one.
        ranks: The ranks, in the order of their rows.
        send: Returns the row of each rank, `uint8[num_ranks, 256]`, which is not kept. Collective.
    """

    call: Callable[[], str]
    ranks: Sequence[int]
    send: Callable[[torch.Tensor], torch.Tensor]

    def values(self, x: torch.Tensor, compared: str) -> torch.Tensor:
        """Return `T[num_ranks, ...]`, the `x` of each rank; raise if `compared` differs."""
        rows = self.send(to_row(x, compared))
        if not have_equal_calls(rows):
            # All ranks come here, because each has the rows of all.
            texts = self.send(text_row(self.call(), call_site()))
            raise disagreement(texts, self.ranks)
        return values_of(rows, x)


def text_row(call: str, call_site: str) -> torch.Tensor:
    """Return a call and its line as `uint8[256]`, for `disagreement`.

    Effects: pure.
    """
    site = call_site.encode()[-NUM_BYTES // 2 :]  # the end of a path has the file and the line
    start = f"{call} at ".encode()
    if len(start) + len(site) > NUM_BYTES:  # a tree of many leaves
        start = start[: NUM_BYTES - len(site) - 7] + b"... at "
    return torch.frombuffer(bytearray((start + site).ljust(NUM_BYTES)), dtype=torch.uint8)


def disagreement(rows: torch.Tensor, ranks: Sequence[int]) -> DesyncError:
    """Return the error of ranks that make other calls, from the `text_row` of each rank.

    Effects: pure.

    Examples:
        >>> rows = [text_row("reduce(sum)", "train.py:3"), text_row("gather", "train.py:5")]
        >>> disagreement(torch.stack(rows), [0, 1]).got
        'rank 0: reduce(sum) at train.py:3, rank 1: gather at train.py:5'
    """
    calls: dict[int, str] = {}
    for rank, row in zip(ranks, rows, strict=True):
        calls[rank] = row.numpy().tobytes().decode(errors="replace").rstrip()
    return DesyncError(
        "ranks disagree about the next collective",
        got=describe_ranks(dict(sorted(calls.items()))),
        fix="make the same call on every rank, with the same operation, leaves, shapes and dtypes; "
        "look for an `if ctx.is_main` around these lines",
    )
