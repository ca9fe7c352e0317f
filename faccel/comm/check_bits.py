"""Reductions with a hash of the call, so that ranks that make other calls find out."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

from faccel.call_site import call_site
from faccel.comm.pack import describe
from faccel.errors import DesyncError

_NUM_BITS = 32  # of the hash
_MAX_RANKS = 256  # with more, the sum of bits may be inexact: bfloat16 has 8 bits of precision


def check_bits(call: str, dtype: torch.dtype, num_ranks: int) -> torch.Tensor:
    """Return `T[64]` to append to a tensor in a reduction: a hash, in bits and inverted.

    If all ranks send the same bits, any reduction returns them (a sum: times the number of ranks,
    which is exact in any dtype up to 256). If two differ, each rank gets a bit that it did not
    send. Empty for more than 256 ranks.

    Effects: pure.

    Examples:
        >>> bits = check_bits("sum", torch.float32, 2)
        >>> (bits[:32] + bits[32:]).unique()
        tensor([1.])
        >>> len(check_bits("sum", torch.float32, 1000))
        0
    """
    if num_ranks > _MAX_RANKS:
        return torch.empty(0, dtype=dtype, device="cpu")
    # Not `hash(call)`, which differs between processes.
    number = zlib.crc32(call.encode())
    bits = [number >> i & 1 for i in range(_NUM_BITS)]
    # Let ranks send 0 and 1 in one place. "min" and "prod" give 0, "max" gives 1: one of them gets
    # what it sent. In the inverted place it is the other one that does.
    inverted_bits = [1 - bit for bit in bits]
    # The device, because the user may have set another default.
    return torch.tensor(bits + inverted_bits, dtype=dtype, device="cpu")


def reduced_with_bits(
    x: torch.Tensor,
    op: str,
    bits: torch.Tensor,
    num_ranks: int,
    all_reduce: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return the reduction of `x`, sent with the bits; a copy.

    Effects: collective.

    Args:
        x: The tensor.
        op: The operation.
        bits: From `check_bits`.
        num_ranks: How many ranks reduce.
        all_reduce: Reduces a tensor in place, and returns it.

    Raises:
        DesyncError: A rank has sent other bits.

    Examples:
        >>> x = torch.ones(2)
        >>> reduced_with_bits(x, "sum", check_bits("sum", x.dtype, 2), 2, lambda out: 2 * out)
        tensor([2., 2.])
    """
    # A copy: a reduction in place would write into the caller's tensor.
    out = all_reduce(torch.cat([x.reshape(-1), bits]))
    expected = bits
    if op == "sum":
        # Modulo 2^n for an n-bit integer dtype, on both sides of the comparison.
        expected = bits * num_ranks
    if not torch.equal(out[x.numel() :], expected):
        raise DesyncError(
            "ranks disagree about operation, leaves, shapes or dtypes in one reduction",
            got=f"{op} of {describe([x])} at {call_site()} on this rank, another call on others",
            fix="make the same call on every rank; `FACCEL_DEBUG=1` prints that of each rank",
        )
    # A view would keep the bits alive, and `torch.save` would write them with the result.
    return out[: x.numel()].clone().view(x.shape)
