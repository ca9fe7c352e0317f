"""Attention with all tokens of some of the heads on each rank: DeepSpeed-Ulysses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from faccel.comm.pack import describe
from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.parallel.sequence_layout import AXIS, by_rank, in_order
from faccel.protocols import Collectives


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, ctx: DistContext, *, is_causal: bool, scale: float
) -> Tensor:
    """Exchange tokens for heads, run PyTorch's attention on the full sequence, and exchange back.

    DeepSpeed-Ulysses (Jacobs et al., 2023, arXiv:2309.14509).
    """
    size = ctx.comm.size(AXIS)
    if q.shape[1] % size:
        raise ModelError(
            f"`ulysses` divides the heads over cp={size}, which does not divide {q.shape[1]}",
            got=f"q, k, v: {describe([q, k, v])}",
            fix="use another method, `ring` or `gather`, or a `cp` that divides the heads",
        )
    # As many key heads as each rank needs: a group of query heads may be on several ranks.
    num_copies = size // math.gcd(k.shape[1], size)
    if num_copies > 1:
        k = k.repeat_interleave(num_copies, 1)
        v = v.repeat_interleave(num_copies, 1)
    # The gradients of the copies are added by autograd, outside of the exchange.
    queries, keys, values = _Exchange.apply(ctx.comm, True, q, k, v)  # type: ignore[misc]
    # Without a mask, the order of the keys does not matter.
    if is_causal:
        queries, keys, values = (in_order(x, 2, ctx) for x in (queries, keys, values))
    # Without torch functions, because an open `context_parallel` would call `attention` again.
    with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
        out = F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
    if is_causal:
        out = by_rank(out, 2, ctx)
    (chunk,) = _Exchange.apply(ctx.comm, False, out)  # type: ignore[misc]
    return chunk


class _Exchange(torch.autograd.Function):
    """Exchanges a part of the sequence of all heads for the sequence of a part of the heads.

    `T[batch, heads, length, width]` becomes `T[batch, heads / ranks, ranks * length, width]`, or
    the reverse. The exchange only permutes elements, so backward is the reverse exchange.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        node: Any,
        comm: Collectives,
        to_sequence: bool,  # noqa: FBT001 (the signature of `apply`)
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        node.comm = comm
        node.to_sequence = to_sequence
        return _exchanged(xs, comm, to_sequence=to_sequence)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        node: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, None, *_exchanged(grads, node.comm, to_sequence=not node.to_sequence)


def _exchanged(xs: Sequence[Tensor], comm: Collectives, *, to_sequence: bool) -> tuple[Tensor, ...]:
    size = comm.size(AXIS)
    # The dimension that is cut into a block for each rank, and the one in which blocks are joined.
    cut, joined = (1, 2) if to_sequence else (2, 1)
    blocks = [x.unflatten(cut, (size, -1)).movedim(cut, 0) for x in xs]
    # All tensors in one collective: `[ranks, elements]`.
    flat = torch.cat([block.reshape(size, -1) for block in blocks], 1)
    received = comm.all_to_all(flat, AXIS)
    results: list[Tensor] = []
    for block, elements in zip(
        blocks, received.split([block[0].numel() for block in blocks], 1), strict=True
    ):
        by_source = elements.reshape(block.shape)
        results.append(by_source.movedim(0, joined).flatten(joined, joined + 1))
    return tuple(results)
