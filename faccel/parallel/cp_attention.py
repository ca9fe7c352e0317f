"""Attention over a sequence that is sharded over the axis `cp`: by one gather, or around a ring."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from faccel.context import DistContext
from faccel.protocols import Collectives

AXIS = "cp"


def chunk_index(ctx: DistContext) -> int:
    """Return the index of this rank's chunk of the sequence."""
    return ctx.mesh.spec.coordinates(ctx.rank)[AXIS]


def gather_attention(
    q: Tensor, k: Tensor, v: Tensor, ctx: DistContext, *, is_causal: bool, scale: float
) -> Tensor:
    """Gather the keys and values of all ranks once, and run PyTorch's attention."""
    gathered: Tensor = _Gather.apply(torch.cat([k, v], -1), ctx.comm)  # type: ignore[assignment]
    keys, values = gathered.split([k.shape[-1], v.shape[-1]], -1)
    mask = None
    is_first_chunk = chunk_index(ctx) == 0
    if is_causal:
        # Later keys get zero gradients from this rank. They stay in the exchange of backward, so
        # that every rank communicates the same.
        num_keys = (chunk_index(ctx) + 1) * q.shape[2]
        keys = keys[:, :, :num_keys]
        values = values[:, :, :num_keys]
        if not is_first_chunk:
            mask = _causal_mask(q.shape[2], num_keys, q.device)
    # Without torch functions, because an open `context_parallel` would call this function again.
    with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
        return F.scaled_dot_product_attention(
            q,
            keys,
            values,
            mask,
            is_causal=is_causal and is_first_chunk,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
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
        own_chunk = chunk_index(ctx)
        value_width = kv.shape[-1] - q.shape[-1]
        with torch.autocast(q.device.type, enabled=False):
            queries = _fold(q, kv.shape[1])
            out = queries.new_zeros(*queries.shape[:-1], value_width)
            lse = queries.new_full((*queries.shape[:-1], 1), -math.inf)
            for chunk in range(comm.size(AXIS)):
                keys, values = _receive(kv, chunk, comm, q.shape[-1])
                if is_causal and chunk > own_chunk:
                    continue  # all its keys are later than all queries here
                scores = queries @ keys.mT * scale
                if is_causal and chunk == own_chunk:
                    scores = _mask_later_keys(scores, q.shape[2])
                # out = sum_chunks exp(scores - lse) @ values, with lse = logsumexp over all chunks
                # so far: the earlier sum is rescaled to the new lse.
                merged = torch.logaddexp(lse, scores.logsumexp(-1, keepdim=True))
                out = out * (lse - merged).exp() + (scores - merged).exp() @ values
                lse = merged
        # No scores are saved: backward computes them from `lse`, chunk by chunk.
        node.save_for_backward(q, kv, out, lse)
        node.ctx = ctx
        node.is_causal = is_causal
        node.scale = scale
        return out.reshape(*q.shape[:-1], value_width).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        node: Any, grad_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = node.saved_tensors
        comm: Collectives = node.ctx.comm
        own_chunk = chunk_index(node.ctx)
        grad_kv = torch.empty_like(kv)
        with torch.autocast(q.device.type, enabled=False):
            # Autocast would compute the products in low precision.
            queries = _fold(q, kv.shape[1])
            grad = _fold(grad_out, kv.shape[1])
            grad_q = torch.zeros_like(queries)
            # The derivative of softmax: dS = P * (dP - D), where dP = dO @ V.T and
            # D = rowsum(dO * O) (Dao et al., FlashAttention, 2022, algorithm 4).
            row_sums = (grad * out).sum(-1, keepdim=True)
            for chunk in range(comm.size(AXIS)):
                keys, values = _receive(kv, chunk, comm, q.shape[-1])
                partial = torch.zeros(kv.shape, dtype=queries.dtype, device=kv.device)
                if not node.is_causal or chunk <= own_chunk:
                    scores = queries @ keys.mT * node.scale
                    if node.is_causal and chunk == own_chunk:
                        scores = _mask_later_keys(scores, q.shape[2])
                    probs = (scores - lse).exp()
                    grad_scores = probs * (grad @ values.mT - row_sums) * node.scale
                    grad_q += grad_scores @ keys
                    partial = torch.cat([grad_scores.mT @ queries, probs.mT @ grad], -1)
                # Every rank contributes to the gradients of this chunk's keys and values.
                total = comm.all_reduce(partial, "sum", AXIS)
                if chunk == own_chunk:
                    grad_kv.copy_(total)
        return grad_q.reshape(q.shape).to(q.dtype), grad_kv, None, None, None


def _fold(x: Tensor, num_key_heads: int) -> Tensor:
    """Concatenate the query heads of each key head along the length, in at least fp32.

    `[batch, heads, length, width]` becomes `[batch, key heads, heads / key heads * length, width]`.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.reshape(x.shape[0], num_key_heads, -1, x.shape[-1])


def _receive(kv: Tensor, src: int, comm: Collectives, width: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values of rank `src` of the axis, in at least fp32."""
    block = comm.broadcast(kv, src, AXIS)
    block = block.to(torch.promote_types(block.dtype, torch.float32))
    return block[..., :width], block[..., width:]


def _mask_later_keys(scores: Tensor, num_queries: int) -> Tensor:
    """Hide the later keys of this rank's chunk from its folded queries, of `num_queries` each."""
    visible = _causal_mask(num_queries, scores.shape[-1], scores.device)
    # Folded queries are `num_queries` of each head, one head after the other.
    hidden = ~visible.repeat(scores.shape[-2] // num_queries, 1)
    return scores.masked_fill(hidden, -math.inf)
