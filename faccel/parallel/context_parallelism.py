"""Context parallel: the ranks of the mesh axis `cp` share one sequence, in contiguous equal chunks in rank order."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from faccel.comm.pack import describe
from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError, DataError, ModelError, nearest
from faccel.protocols import Collectives
from faccel.tree import Tree, flatten, is_dtensor, leaf_error, paths

_AXIS = "cp"


def _place(ctx: DistContext) -> int:
    """Return which chunk of the sequence this rank has."""
    return ctx.mesh.spec.coordinates(ctx.rank)[_AXIS]


def split_sequence(x: Tree, ctx: DistContext, *, dim: int = 1) -> Tree:
    """Return this rank's chunk of the sequence, of each tensor of `x`.

    Effects: pure. Chunks are contiguous, equal and in rank order on the axis `cp`.

    Whatever runs along the sequence is split: tokens, labels (shifted before they are split: the label of a chunk's
    last token is in the next chunk), and the position ids, since a model that counts from 0 itself would give every
    chunk the positions of the first.

    Args:
        x: The whole sequence, the same on all ranks of the axis: a tensor, or any nesting of them.
        ctx: The world.
        dim: The dimension that runs along the sequence; negative counts from the last.

    Returns:
        The same structure of views; `x` itself where the axis has one rank.

    Raises:
        DataError: A tensor has no such dimension, or the ranks do not divide its length; names each such tensor.
        TreeError: A leaf is not a tensor; names it.

    Examples:
        >>> from faccel.testing import fake_context
        >>> tokens = torch.tensor([[5, 6, 7, 8]])
        >>> batch = {"tokens": tokens, "positions": torch.arange(4)[None]}
        >>> split_sequence(batch, fake_context(1, 2, mesh="cp=2"))
        {'tokens': tensor([[7, 8]]), 'positions': tensor([[2, 3]])}
        >>> split_sequence(tokens, fake_context(0, 1)) is tokens
        True
    """
    size = ctx.mesh.spec.cp
    if size == 1:
        return x
    leaves, rebuild = flatten(x)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            raise leaf_error(x, i, "`split_sequence` splits tensors", "pass the tensors only")
    _check_divides(leaves, paths(x), dim, size)
    return rebuild([leaf.tensor_split(size, dim)[_place(ctx)] for leaf in leaves])


def _check_divides(leaves: list[Tensor], names: list[str], dim: int, size: int) -> None:
    lengths = [leaf.shape[dim] if -leaf.ndim <= dim < leaf.ndim else None for leaf in leaves]
    named = list(zip(names, leaves, lengths, strict=True))
    lacking = [
        f"`{name}` of shape {list(leaf.shape)}" for name, leaf, length in named if length is None
    ]
    if lacking:
        fix = "pass `dim=`, or leave out what has no sequence"
        raise DataError(
            f"a sequence runs along dim {dim}, which a tensor lacks",
            got=", ".join(lacking),
            fix=fix,
        )
    uneven = [
        f"length {length} of `{name}`"
        for name, _, length in named
        if length is None or length % size
    ]
    if uneven:
        longest = max(length for length in lengths if length is not None)
        raise DataError(
            f"the {size} ranks of `cp` share a sequence in equal chunks",
            got=", ".join(uneven),
            fix=f"cut it to {longest - longest % size}, or, where attention is causal, pad its end to "
            f"{math.ceil(longest / size) * size} and ignore the padding's loss",
        )


@effectful(COLLECTIVE)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ctx: DistContext,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    method: str = "gather",
) -> Tensor:
    """Attend over the whole sequence from this rank's chunk of it: `F.scaled_dot_product_attention` for `cp`.

    Effects: collective. Every rank of the axis `cp` must call it, with the same shapes, dtypes and options, and run
    backward through it; which keys a causal mask hides changes what is computed, never what is communicated. With one
    rank on the axis it is torch's own function, and nothing is communicated.

    Args:
        q: This rank's chunk of the queries, `T[batch, heads, length, width]`.
        k: This rank's chunk of the keys, `T[batch, key heads, key length, width]`.
        v: This rank's chunk of the values, `T[batch, key heads, key length, value width]`.
        ctx: The world.
        is_causal: Whether a query sees the keys up to its own place in the whole sequence only.
        scale: What scores are multiplied with; None is `width ** -0.5`.
        enable_gqa: Whether several query heads may share a key head.
        method: `"gather"`: keys and values of all ranks are gathered once, torch's own kernel attends, and backward
            returns the gradients in one exchange; memory grows with the whole sequence. `"ring"`: one rank's keys and
            values are there at a time, forward and backward, and partial results are merged by their log-sum-exp
            (Liu, Zaharia and Abbeel, 2023); memory grows with the chunk, in exchange for twice `cp` steps.

    Returns:
        `T[batch, heads, length, value width]`, the chunk of what attention over the whole sequence gives, with its
        gradient (not with second derivatives, where the axis has several ranks).

    Raises:
        ConfigError: `method` is none of those.
        ModelError: The shapes, dtypes or devices of `q`, `k` and `v` do not fit each other.

    Examples:
        >>> from faccel.testing import simulate
        >>> whole = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64)
        >>> def run(ctx):
        ...     return attention(*split_sequence(tuple(whole), ctx, dim=2), ctx, is_causal=True)
        >>> chunks = simulate(run, 2, mesh="cp=2")
        >>> torch.allclose(torch.cat(chunks, 2), F.scaled_dot_product_attention(*whole, is_causal=True))
        True
    """
    _check_method(method)
    if ctx.mesh.spec.cp == 1:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _check_fit(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)
    q, k, v = (_as_autocast(x) for x in (q, k, v))
    if q.dtype != k.dtype or q.dtype != v.dtype:
        fix = "convert them to one dtype, or compute under `faccel.autocast(ctx)`"
        raise ModelError(
            "queries, keys and values have one dtype", got=describe([q, k, v]), fix=fix
        )
    return _METHODS[method](
        q, k, v, ctx, is_causal=is_causal, scale=q.shape[-1] ** -0.5 if scale is None else scale
    )


def _check_method(method: str) -> None:
    if method not in _METHODS:
        fix = nearest(str(method), _METHODS)
        raise ConfigError("`method` is not a way to share a sequence", got=repr(method), fix=fix)


def _check_fit(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, enable_gqa: bool) -> None:
    got = f"q, k, v: {describe([q, k, v])}"
    if any(map(is_dtensor, (q, k, v))):
        raise ModelError(
            "attention takes this rank's chunks",
            got=f"DTensors, {got}",
            fix="call `.to_local()` on them",
        )
    if {x.ndim for x in (q, k, v)} != {4}:
        fix = "add the missing one, as in `q.unsqueeze(1)` for one head"
        raise ModelError("attention takes `[batch, heads, length, width]`", got=got, fix=fix)
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        fix = "give keys and values the same batch, heads and length, and queries the batch and width of the keys"
        raise ModelError("queries, keys and values do not fit each other", got=got, fix=fix)
    _check_heads(q.shape[1], k.shape[1], got, enable_gqa=enable_gqa)
    if is_causal and q.shape[2] != k.shape[2]:
        fix = "pass chunks of one sequence, or `is_causal=False`"
        raise ModelError("a causal mask needs as many queries as keys", got=got, fix=fix)


def _check_heads(num_heads: int, num_key_heads: int, got: str, *, enable_gqa: bool) -> None:
    if num_heads == num_key_heads or (
        enable_gqa and num_key_heads and num_heads % num_key_heads == 0
    ):
        return
    fix = (
        f"use a number of key heads that divides {num_heads}"
        if enable_gqa
        else "pass `enable_gqa=True`"
    )
    raise ModelError(
        f"{num_key_heads} key heads do not serve {num_heads} query heads", got=got, fix=fix
    )


def _as_autocast(x: Tensor) -> Tensor:
    """Return `x` as torch's function would take it where autocast is on: before it travels, not after."""
    kind = x.device.type
    return (
        x.to(torch.get_autocast_dtype(kind))
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        else x
    )


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, ctx: DistContext, *, is_causal: bool, scale: float
) -> Tensor:
    everything: Any = _Gather.apply(torch.cat([k, v], -1), ctx.comm)
    keys, values = everything.split([k.shape[-1], v.shape[-1]], -1)
    mask, is_first = None, _place(ctx) == 0
    if is_causal:
        seen = (_place(ctx) + 1) * q.shape[
            2
        ]  # later keys get no gradient from here, but take part in its exchange
        keys, values = keys[:, :, :seen], values[:, :, :seen]
        mask = None if is_first else _mask(q.shape[2], seen, q.device)
    with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage] (an open `context_parallel`)
        options: dict[str, Any] = {
            "is_causal": is_causal and is_first,
            "enable_gqa": q.shape[1] != k.shape[1],
        }
        return F.scaled_dot_product_attention(q, keys, values, mask, scale=scale, **options)


def _mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """Return `bool[num_queries, num_keys]`: which keys the last queries of a sequence see."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(
        num_keys - num_queries
    )


class _Gather(torch.autograd.Function):
    """Every rank's `T[batch, heads, length, width]` along the length; backward sums for each rank what all found."""

    @staticmethod
    def forward(node: Any, x: Tensor, comm: Collectives) -> Tensor:
        node.comm = comm
        return comm.all_gather(x.contiguous(), _AXIS).movedim(0, 2).flatten(2, 3)

    @staticmethod
    @once_differentiable
    def backward(node: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = grad.unflatten(2, (node.comm.size(_AXIS), -1)).movedim(2, 0).contiguous()
        return node.comm.all_to_all(rows, _AXIS).sum(0), None


def _ringed(
    q: Tensor, k: Tensor, v: Tensor, ctx: DistContext, *, is_causal: bool, scale: float
) -> Tensor:
    out: Any = _Ring.apply(q, torch.cat([k, v], -1), ctx, is_causal, scale)
    return out


class _Ring(torch.autograd.Function):
    """Attention to one rank's keys and values at a time, computed in fp32 at least.

    Query heads that share a key head are laid behind each other along the length (`_fold`), so that each product of
    matrices sums over them. What a rank needs not see it receives all the same: every rank makes the same calls.
    """

    @staticmethod
    def forward(
        node: Any, q: Tensor, kv: Tensor, ctx: DistContext, is_causal: bool, scale: float
    ) -> Tensor:
        kv, comm, place = kv.contiguous(), ctx.comm, _place(ctx)
        with torch.autocast(q.device.type, enabled=False):
            queries = _fold(q, kv.shape[1])
            width, diagonal = kv.shape[-1] - q.shape[-1], q.shape[2] if is_causal else None
            out = queries.new_zeros(*queries.shape[:-1], width)
            lse = queries.new_full((*queries.shape[:-1], 1), -math.inf)
            for src in range(comm.size(_AXIS)):
                keys, values = _receive(kv, src, comm, q.shape[-1])
                if is_causal and src > place:
                    continue
                scores = _scores(queries, keys, scale, diagonal if src == place else None)
                part = scores.logsumexp(-1, keepdim=True)
                merged = torch.logaddexp(lse, part)
                out = out * (lse - merged).exp() + (scores - merged).exp() @ values
                lse = merged
        node.save_for_backward(q, kv, out, lse)
        node.ctx, node.is_causal, node.scale = ctx, is_causal, scale
        return out.reshape(*q.shape[:-1], width).to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(node: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, kv, out, lse = node.saved_tensors
        comm, place = node.ctx.comm, _place(node.ctx)
        grad_kv, diagonal = torch.empty_like(kv), q.shape[2] if node.is_causal else None
        with torch.autocast(q.device.type, enabled=False):
            queries, grad = _fold(q, kv.shape[1]), _fold(grad_out, kv.shape[1])
            grad_q, inner = torch.zeros_like(queries), (grad * out).sum(-1, keepdim=True)
            for src in range(comm.size(_AXIS)):
                keys, values = _receive(kv, src, comm, q.shape[-1])
                found = torch.zeros(kv.shape, dtype=queries.dtype, device=kv.device)
                if not (node.is_causal and src > place):
                    scores = _scores(queries, keys, node.scale, diagonal if src == place else None)
                    weights = (scores - lse).exp()
                    slopes = weights * (grad @ values.mT - inner) * node.scale
                    grad_q += slopes @ keys
                    found = torch.cat([slopes.mT @ queries, weights.mT @ grad], -1)
                total = comm.all_reduce(found, "sum", _AXIS)
                if src == place:
                    grad_kv.copy_(total)
        return grad_q.reshape(q.shape).to(q.dtype), grad_kv, None, None, None


def _fold(x: Tensor, num_key_heads: int) -> Tensor:
    """Return `[batch, heads, length, width]` as `[batch, key heads, heads per key head * length, width]`, in fp32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.reshape(x.shape[0], num_key_heads, -1, x.shape[-1])


def _receive(kv: Tensor, src: int, comm: Collectives, width: int) -> tuple[Tensor, Tensor]:
    """Return keys and values of rank `src` of the axis, in fp32 at least."""
    block = comm.broadcast(kv, src, _AXIS)
    block = block.to(torch.promote_types(block.dtype, torch.float32))
    return block[..., :width], block[..., width:]


def _scores(queries: Tensor, keys: Tensor, scale: float, diagonal: int | None) -> Tensor:
    """Return the scores of folded queries; where `diagonal` is their length, later keys of this chunk are hidden."""
    scores = queries @ keys.mT * scale
    if diagonal is None:
        return scores
    hidden = ~_mask(diagonal, diagonal, keys.device).repeat(queries.shape[2] // diagonal, 1)
    return scores.masked_fill(hidden, -math.inf)


_METHODS: dict[str, Callable[..., Tensor]] = {"gather": _gathered, "ring": _ringed}


def context_parallel(ctx: DistContext, *, method: str = "gather") -> AbstractContextManager[object]:
    """Make a context in which `F.scaled_dot_product_attention` attends over the sequence that the ranks of `cp` share.

    Effects: pure. Inside, torch's function of this thread is `attention`, hence collective, for models that know
    nothing of context parallel. With one rank on the axis nothing changes.

    The model must take its position ids as an argument; give it those of `split_sequence`. Where activations are
    checkpointed run backward inside, too, since it computes forward again; outside it ends in torch's
    `CheckpointError`.

    Args:
        ctx: The world.
        method: As for `attention`.

    Raises:
        ConfigError: `method` is none of those.
        ModelError: Inside, where the model passes a mask or dropout to attention, or attends by a function of torch
            that would not see the other chunks (`nn.MultiheadAttention`, flex attention).

    Examples:
        >>> from faccel.testing import fake_context
        >>> x = torch.ones(1, 2, 4, 8)
        >>> with context_parallel(fake_context(0, 1)):
        ...     F.scaled_dot_product_attention(x, x, x, is_causal=True).shape
        torch.Size([1, 2, 4, 8])
    """
    _check_method(method)
    return nullcontext() if ctx.mesh.spec.cp == 1 else _Shared(ctx, method)


_LOCAL_ONLY = {
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "flex_attention",
    "multi_head_attention_forward",
}
"""Functions of torch that attend by themselves, and would to this rank's chunk alone."""


class _Shared(TorchFunctionMode):
    """Sends torch's attention to `attention`; what that calls in turn does not come here again."""

    def __init__(self, ctx: DistContext, method: str) -> None:
        super().__init__()
        self._ctx, self._method = ctx, method

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is Tensor.backward or func is torch.autograd.backward:
            return self._backward(*args, **kwargs)
        if getattr(func, "__name__", None) in _LOCAL_ONLY:
            raise ModelError(
                "this attention would see this rank's chunk of the sequence only",
                got=f"`{func.__name__}`",
                fix="write the model with `F.scaled_dot_product_attention`, or call `faccel.parallel.attention` in it",
            )
        return func(*args, **kwargs)

    def _backward(
        self, tensors: Any, gradient: Any = None, *, inputs: Any = None, **options: Any
    ) -> None:
        """Run backward with this mode on, which it is not inside `__torch_function__`: forward may be computed again.

        torch comes here again for tensors, and not for the edges of the graph that they stand for.
        """
        roots: list[Any] = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        grads = options.pop("grad_tensors", gradient)
        if inputs is not None:
            torch.autograd.backward(roots, grads, inputs=inputs, **options)
            return
        edges = [get_gradient_edge(root) if isinstance(root, Tensor) else root for root in roots]
        with self:
            torch.autograd.backward(edges, grads, **options)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 (torch's own signature)
        **options: Any,
    ) -> Tensor:
        if attn_mask is not None:
            got = f"a mask of {describe([attn_mask])}"
            fix = "pass `is_causal=True` for a causal mask; leave a mask of padding out, and ignore the padding's loss"
            raise ModelError(
                "a sequence that ranks share is attended without a mask", got=got, fix=fix
            )
        if dropout_p:
            fix = "set the dropout of attention to 0; other dropout may stay"
            raise ModelError(
                "a sequence that ranks share is attended without dropout",
                got=f"dropout_p={dropout_p}",
                fix=fix,
            )
        return attention(
            query, key, value, self._ctx, is_causal=is_causal, method=self._method, **options
        )
