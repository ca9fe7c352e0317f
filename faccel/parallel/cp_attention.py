"""Attention over a sequence that is sharded over the axis `cp`: by one gather, or around a ring."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from faccel.context import DistContext
from faccel.parallel.sequence_layout import AXIS, chunk_index, in_order, pieces_of
from faccel.protocols import Collectives


def gather_attention(
    q: Tensor, k: Tensor, v: Tensor, ctx: DistContext, *, is_causal: bool, scale: float
) -> Tensor:
    """Gather the keys and values of all ranks once, and run PyTorch's attention."""
    gathered: Tensor = _Gather.apply(torch.cat([k, v], -1), ctx.comm)  # type: ignore[assignment]
    keys, values = gathered.split([k.shape[-1], v.shape[-1]], -1)
    if not is_causal:
        return _torch_attention(q, keys, values, None, scale=scale)
    keys, values = in_order(keys, 2, ctx), in_order(values, 2, ctx)
    pieces = pieces_of(chunk_index(ctx), ctx)
    outs: list[Tensor] = []
    for piece, queries in zip(pieces, q.tensor_split(len(pieces), 2), strict=True):
        # Later keys get zero gradients from this rank. They stay in the exchange of backward, so
        # that every rank communicates the same.
        num_keys = (piece + 1) * queries.shape[2]
        visible = keys[:, :, :num_keys], values[:, :, :num_keys]
        outs.append(_torch_attention(queries, *visible, piece, scale=scale))
    if len(outs) == 1:
        return outs[0]
    return torch.cat(outs, 2)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, piece: int | None, *, scale: float) -> Tensor:
    """Return PyTorch's attention; causal if the queries are that piece of the sequence."""
    mask = None
    if piece:  # PyTorch's causal kernel is for the first piece, whose queries start at 0
        mask = _causal_mask(q.shape[2], k.shape[2], q.device)
    # Without torch functions, because an open `context_parallel` would call this function again.
    with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=piece == 0, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )


def _causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return `bool[num_queries, num_keys]`: the keys visible to the last queries of a sequence."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril(num_keys - num_queries)


class _Gather(torch.autograd.Function):
    """Concatenates every rank's `T[batch, heads, length, width]` along the length.

    Backward returns to each rank the sum of all ranks' gradients of its chunk.
    """

    @staticmethod
    def forward(node: Any, x: Tensor, comm: Collectives) -> Tensor:
        node.comm = comm
        # [ranks, batch, heads, length, width]: the rank is the outer index of the length.
        return comm.all_gather(x.contiguous(), AXIS).movedim(0, 2).flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        node: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        by_rank = grad.unflatten(2, (node.comm.size(AXIS), -1)).movedim(2, 0)
        return node.comm.all_to_all(by_rank.contiguous(), AXIS).sum(0), None


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, ctx: DistContext, *, is_causal: bool, scale: float
) -> Tensor:
    """Attend to one rank's keys and values at a time, and merge the results.

    Ring attention (Liu, Zaharia and Abbeel, 2023, arXiv:2310.01889).
    """
    keys_values = torch.cat([k, v], -1)
    return _Ring.apply(q, keys_values, ctx, is_causal, scale)  # type: ignore[return-value]


class _Ring(torch.autograd.Function):
    """Attention to the chunks of all ranks, one after the other, in at least fp32.

    Query heads with the same key head are concatenated along the length (`_fold`), so that each
    matrix product sums over them. A rank also receives the chunks that its causal mask hides:
    every rank makes the same calls.
    """

    @staticmethod
    def forward(
        node: Any,
        q: Tensor,
        kv: Tensor,
        ctx: DistContext,
        is_causal: bool,  # noqa: FBT001 (the signature of `apply`)
        scale: float,
    ) -> Tensor:
        # Keys and values together, so that each step is one collective.
        kv = kv.contiguous()
        comm = ctx.comm
        pieces = _pieces_by_rank(ctx, is_causal=is_causal)
        value_width = kv.shape[-1] - q.shape[-1]
        with torch.autocast(q.device.type, enabled=False):
            queries = _fold(q, kv.shape[1], len(pieces[0]))
            out = queries.new_zeros(*queries.shape[:-1], value_width)
            lse = queries.new_full((*queries.shape[:-1], 1), -math.inf)
            for rank, key_pieces in enumerate(pieces):
                keys, values = _receive(kv, rank, comm, q.shape[-1], len(key_pieces))
                for i, j, is_diagonal in _visible(pieces[chunk_index(ctx)], key_pieces, is_causal):
                    scores = queries[i] @ keys[j].mT * scale
                    if is_diagonal:
                        scores = _mask_later_keys(scores, q.shape[2] // len(key_pieces))
                    # out = sum_chunks exp(scores - lse) @ values, with lse = logsumexp over all
                    # chunks so far: the earlier sum is rescaled to the new lse.
                    merged = torch.logaddexp(lse[i], scores.logsumexp(-1, keepdim=True))
                    out[i] = out[i] * (lse[i] - merged).exp() + (scores - merged).exp() @ values[j]
                    lse[i] = merged
        # No scores are saved: backward computes them from `lse`, chunk by chunk.
        node.save_for_backward(q, kv, out, lse)
        node.ctx = ctx
        node.is_causal = is_causal
        node.scale = scale
        return _unfold(out, q.shape[1]).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        node: Any, grad_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = node.saved_tensors
        comm: Collectives = node.ctx.comm
        own_chunk = chunk_index(node.ctx)
        pieces = _pieces_by_rank(node.ctx, is_causal=node.is_causal)
        num_pieces = len(pieces[0])
        grad_kv = torch.empty_like(kv)
        with torch.autocast(q.device.type, enabled=False):
            # Autocast would compute the products in low precision.
            queries = _fold(q, kv.shape[1], num_pieces)
            grad = _fold(grad_out, kv.shape[1], num_pieces)
            grad_q = torch.zeros_like(queries)
            # The derivative of softmax: dS = P * (dP - D), where dP = dO @ V.T and
            # D = rowsum(dO * O) (Dao et al., FlashAttention, 2022, algorithm 4).
            row_sums = (grad * out).sum(-1, keepdim=True)
            for rank, key_pieces in enumerate(pieces):
                keys, values = _receive(kv, rank, comm, q.shape[-1], num_pieces)
                partial = torch.zeros(kv.shape, dtype=queries.dtype, device=kv.device)
                grad_keys, grad_values = _by_piece(partial, q.shape[-1], num_pieces)
                for i, j, is_diagonal in _visible(pieces[own_chunk], key_pieces, node.is_causal):
                    scores = queries[i] @ keys[j].mT * node.scale
                    if is_diagonal:
                        scores = _mask_later_keys(scores, q.shape[2] // num_pieces)
                    probs = (scores - lse[i]).exp()
                    grad_scores = probs * (grad[i] @ values[j].mT - row_sums[i]) * node.scale
                    grad_q[i] += grad_scores @ keys[j]
                    grad_keys[j] += grad_scores.mT @ queries[i]
                    grad_values[j] += probs.mT @ grad[i]
                # Every rank contributes to the gradients of this chunk's keys and values.
                total = comm.all_reduce(partial, "sum", AXIS)
                if rank == own_chunk:
                    grad_kv.copy_(total)
        return _unfold(grad_q, q.shape[1]).to(q.dtype), grad_kv, None, None, None


def _pieces_by_rank(ctx: DistContext, *, is_causal: bool) -> list[tuple[int, ...]]:
    """Return the pieces of each rank; without a mask one piece, because the order is irrelevant."""
    ranks = range(ctx.comm.size(AXIS))
    if not is_causal:
        return [(index,) for index in ranks]
    return [pieces_of(index, ctx) for index in ranks]


def _visible(
    queries: Sequence[int],
    keys: Sequence[int],
    is_causal: bool,  # noqa: FBT001
) -> Iterator[tuple[int, int, bool]]:
    """Return the pieces that attend to each other, and whether the mask cuts through them."""
    for i, query_piece in enumerate(queries):
        for j, key_piece in enumerate(keys):
            # All keys of a later piece are later than all queries of this one.
            if key_piece <= query_piece or not is_causal:
                yield i, j, is_causal and key_piece == query_piece


def _fold(x: Tensor, num_key_heads: int, num_pieces: int) -> Tensor:
    """Concatenate the query heads of each key head along the length, in at least fp32.

    `[batch, heads, length, width]` becomes `[pieces, batch, key heads, heads / key heads *
    length / pieces, width]`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pieces = wide.unflatten(2, (num_pieces, -1)).movedim(2, 0)
    return pieces.reshape(num_pieces, x.shape[0], num_key_heads, -1, x.shape[-1])


def _unfold(x: Tensor, num_heads: int) -> Tensor:
    """Reverse `_fold`, except for its dtype."""
    num_pieces, batch, _, _, width = x.shape
    by_head = x.reshape(num_pieces, batch, num_heads, -1, width)
    return by_head.movedim(0, 2).flatten(2, 3)


def _receive(
    kv: Tensor, src: int, comm: Collectives, width: int, num_pieces: int
) -> tuple[Tensor, Tensor]:
    """Return the keys and values of rank `src` of the axis, by piece, in at least fp32."""
    block = comm.broadcast(kv, src, AXIS)
    block = block.to(torch.promote_types(block.dtype, torch.float32))
    return _by_piece(block, width, num_pieces)


def _by_piece(kv: Tensor, width: int, num_pieces: int) -> tuple[Tensor, Tensor]:
    """Return views of keys and values as `[pieces, batch, key heads, length / pieces, width]`."""
    by_piece = kv.unflatten(2, (num_pieces, -1)).movedim(2, 0)
    return by_piece[..., :width], by_piece[..., width:]


def _mask_later_keys(scores: Tensor, num_queries: int) -> Tensor:
    """Hide the later keys of this rank's chunk from its folded queries, of `num_queries` each."""
    visible = _causal_mask(num_queries, scores.shape[-1], scores.device)
    # Folded queries are `num_queries` of each head, one head after the other.
    hidden = ~visible.repeat(scores.shape[-2] // num_queries, 1)
    return scores.masked_fill(hidden, -math.inf)
