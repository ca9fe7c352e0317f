"""Context parallel: each rank of the axis `cp` has one part of a sequence, its chunk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from faccel.checks import one_of
from faccel.comm.pack import describe
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import DataError, ModelError
from faccel.parallel.cp_attention import gather_attention, ring_attention
from faccel.parallel.sequence_layout import num_pieces, part_of_rank
from faccel.parallel.ulysses import ulysses_attention
from faccel.tree import Tree, flatten, is_dtensor, leaf_error, paths


def split_sequence(x: Tree, ctx: DistContext, *, dim: int = 1) -> Tree:
    """Return this rank's chunk of the sequence, of each tensor of `x`.

    Effects: pure. Chunks are equal. With `Config.cp_layout="contiguous"` they are in rank order on
    the axis `cp`. With `"head-tail"` the sequence has twice as many pieces as ranks, and a rank has
    one from its start and one from its end, so that causal attention takes all ranks equally long.

    Split everything that has a value per token: tokens, labels and position ids. Shift labels
    before the split, because the label of a chunk's last token is in the next chunk. Pass position
    ids to the model, because counting from 0 would be wrong for all chunks but the first.

    Args:
        x: The full sequence, equal on all ranks of the axis: a tensor or a tree of tensors.
        ctx: The context.
        dim: The dimension of the sequence; negative counts from the last.

    Returns:
        The same structure: views of `x`, or copies if a chunk has two pieces; `x` itself where the
        axis has one rank.

    Raises:
        DataError: A tensor has no such dimension, or the number of ranks does not divide its
            length; names each such tensor.
        TreeError: A leaf is not a tensor; names it.

    Examples:
        >>> from faccel.testing import fake_context
        >>> tokens = torch.tensor([[5, 6, 7, 8]])
        >>> batch = {"tokens": tokens, "positions": torch.arange(4)[None]}
        >>> split_sequence(batch, fake_context(1, 2, mesh="cp=2"))
        {'tokens': tensor([[7, 8]]), 'positions': tensor([[2, 3]])}
        >>> split_sequence(tokens, fake_context(0, 1)) is tokens
        True
        >>> config = {"cp_layout": "head-tail"}
        >>> split_sequence(tokens, fake_context(0, 2, mesh="cp=2", config=config))
        tensor([[5, 8]])
    """
    require_context(ctx, "faccel.parallel.split_sequence(x, ctx)")
    if ctx.mesh.spec.cp == 1:
        return x
    leaves, rebuild = flatten(x)
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            raise leaf_error(x, index, "`split_sequence` expects tensors", "pass only tensors")
    by_name = dict(zip(paths(x), leaves, strict=True))
    # All invalid tensors are reported at once, before anything is split.
    _check_dim(by_name, dim)
    _check_divides(by_name, dim, ctx)
    return rebuild([part_of_rank(leaf, dim, ctx) for leaf in leaves])


def _check_dim(tensors: Mapping[str, Tensor], dim: int) -> None:
    missing: list[str] = []
    for name, tensor in tensors.items():
        if not -tensor.ndim <= dim < tensor.ndim:
            missing.append(f"`{name}` of shape {list(tensor.shape)}")
    if missing:
        raise DataError(
            f"a tensor has no dim {dim} to split a sequence along",
            got=", ".join(missing),
            fix="pass `dim=`, or leave out tensors without a sequence",
        )


def _check_divides(tensors: Mapping[str, Tensor], dim: int, ctx: DistContext) -> None:
    unit = num_pieces(ctx) * ctx.mesh.spec.cp
    uneven: list[str] = []
    for name, tensor in tensors.items():
        if tensor.shape[dim] % unit:
            uneven.append(f"length {tensor.shape[dim]} of `{name}`")
    if uneven:
        longest = max(tensor.shape[dim] for tensor in tensors.values())
        shorter = longest - longest % unit
        longer = math.ceil(longest / unit) * unit
        multiple = f"cp={ctx.mesh.spec.cp}"
        if unit != ctx.mesh.spec.cp:
            multiple = f"{unit}, two pieces for each rank of cp={ctx.mesh.spec.cp}"
        raise DataError(
            f"the length of a sequence is not a multiple of {multiple}",
            got=", ".join(uneven),
            fix=f"cut it to {shorter}, or, where attention is causal, pad its end to {longer} and "
            "ignore the padding's loss",
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
    """Return this rank's chunk of attention over the full sequence.

    Effects: collective. Every rank of the axis `cp` must call it, with the same shapes, dtypes and
    options, and run backward through it. With one rank on the axis it is
    `F.scaled_dot_product_attention`, and nothing is communicated.

    Args:
        q: This rank's chunk of the queries, `T[batch, heads, length, width]`.
        k: This rank's chunk of the keys, `T[batch, key heads, key length, width]`.
        v: This rank's chunk of the values, `T[batch, key heads, key length, value width]`.
        ctx: The context.
        is_causal: Whether a query sees only keys up to its own position in the full sequence.
        scale: The factor of the scores; None is `width ** -0.5`.
        enable_gqa: Whether several query heads may use one key head.
        method: `"gather"` gathers the keys and values of all ranks once and runs PyTorch's
            kernel. Backward returns the gradients in one exchange. Memory grows with the full
            sequence. `"ring"` has the keys and values of one rank at a time, and merges partial
            results by their log-sum-exp (Liu, Zaharia and Abbeel, 2023). Memory grows with the
            chunk, for twice `cp` steps of communication. `"ulysses"` exchanges tokens for heads:
            a rank has the full sequence of a part of the heads (Jacobs et al., 2023), and
            PyTorch's kernel computes equally much on each. It needs at least `cp` query heads.

    Returns:
        `T[batch, heads, length, value width]`. It has first derivatives; no second ones where the
        axis has several ranks.

    Raises:
        ConfigError: `method` is unknown.
        ModelError: The shapes, dtypes or devices of `q`, `k` and `v` do not match, or `cp` does not
            divide the heads of `"ulysses"`.

    Examples:
        >>> from faccel.testing import simulate
        >>> q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64)
        >>> def run(ctx):
        ...     return attention(*split_sequence((q, k, v), ctx, dim=2), ctx, is_causal=True)
        >>> chunks = simulate(run, 2, mesh="cp=2")
        >>> full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(torch.cat(chunks, 2), full)
        True
    """
    require_context(ctx, "faccel.parallel.attention(q, k, v, ctx)")
    one_of("method", method, _METHODS)
    if ctx.mesh.spec.cp == 1:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    _check_shapes(q, k, v, is_causal=is_causal, enable_gqa=enable_gqa)
    # Cast before communication, so that fewer bytes are sent.
    q, k, v = _as_autocast(q), _as_autocast(k), _as_autocast(v)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ModelError(
            "`q`, `k` and `v` must have the same dtype",
            got=describe([q, k, v]),
            fix="convert them to one dtype, or compute under `faccel.autocast(ctx)`",
        )
    # The default of PyTorch's function; `scale=0.0` is valid.
    factor = scale
    if factor is None:
        factor = float(q.shape[-1]) ** -0.5
    return _METHODS[method](q, k, v, ctx, is_causal=is_causal, scale=factor)


class _Attention(Protocol):
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: DistContext, *, is_causal: bool, scale: float
    ) -> Tensor: ...


_METHODS: Mapping[str, _Attention] = {
    "gather": gather_attention,
    "ring": ring_attention,
    "ulysses": ulysses_attention,
}


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, enable_gqa: bool) -> None:
    got = f"q, k, v: {describe([q, k, v])}"
    if is_dtensor(q) or is_dtensor(k) or is_dtensor(v):
        raise ModelError(
            "`attention` expects local tensors: this rank's chunks",
            got=f"DTensors, {got}",
            fix="call `.to_local()` on them",
        )
    if not q.ndim == k.ndim == v.ndim == 4:
        fix = "add the missing dim, as in `q.unsqueeze(1)` for one head"
        raise ModelError("`attention` expects `[batch, heads, length, width]`", got=got, fix=fix)
    # Widths of keys and values may differ, lengths of queries and keys, too.
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ModelError(
            "the shapes of `q`, `k` and `v` do not match",
            got=got,
            fix="pass keys and values of the same batch, heads and length, and queries with the "
            "batch and width of the keys",
        )
    _check_heads(q.shape[1], k.shape[1], got, enable_gqa=enable_gqa)
    # The diagonal of the mask is the position in the full sequence.
    if is_causal and q.shape[2] != k.shape[2]:
        fix = "pass chunks of one sequence, or `is_causal=False`"
        raise ModelError("a causal mask needs as many queries as keys", got=got, fix=fix)


def _check_heads(num_heads: int, num_key_heads: int, got: str, *, enable_gqa: bool) -> None:
    if num_heads == num_key_heads:
        return
    problem = f"{num_key_heads} key heads do not match {num_heads} query heads"
    if not enable_gqa:
        raise ModelError(problem, got=got, fix="pass `enable_gqa=True`")
    if num_key_heads == 0 or num_heads % num_key_heads:
        fix = f"use a number of key heads that divides {num_heads}"
        raise ModelError(problem, got=got, fix=fix)


def _as_autocast(x: Tensor) -> Tensor:
    """Cast `x` as autocast casts the arguments of PyTorch's attention."""
    device_type = x.device.type
    # Autocast leaves float64 as it is.
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def context_parallel(ctx: DistContext, *, method: str = "gather") -> AbstractContextManager[object]:
    """Return a context in which `F.scaled_dot_product_attention` attends over the full sequence.

    Effects: pure. Inside, PyTorch's function calls `attention` in this thread, so it is
    collective. With one rank on the axis `cp` nothing changes.

    It is for models that have no code for context parallel. They must take position ids as an
    argument: pass those of `split_sequence`. With activation checkpointing, run backward inside,
    too, because it runs forward again; outside it raises PyTorch's `CheckpointError`.

    Args:
        ctx: The context.
        method: As for `attention`.

    Raises:
        ConfigError: `method` is unknown.
        ModelError: Inside, where the model passes a mask or dropout to attention. Or it attends
            through another function of PyTorch, which would see only this rank's chunk
            (`nn.MultiheadAttention`, flex attention).

    Examples:
        >>> from faccel.testing import fake_context
        >>> x = torch.ones(1, 2, 4, 8)
        >>> with context_parallel(fake_context(0, 1)):
        ...     F.scaled_dot_product_attention(x, x, x, is_causal=True).shape
        torch.Size([1, 2, 4, 8])
    """
    require_context(ctx, "faccel.parallel.context_parallel(ctx)")
    one_of("method", method, _METHODS)
    if ctx.mesh.spec.cp == 1:
        return nullcontext()
    return _AttentionMode(ctx, method)


# PyTorch's functions that compute attention themselves, and would see only this rank's chunk.
_LOCAL_ONLY = {
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
    "flex_attention",
    "multi_head_attention_forward",
}


class _AttentionMode(TorchFunctionMode):
    """Replaces PyTorch's attention by `attention`. Calls inside of that do not come here again."""

    def __init__(self, ctx: DistContext, method: str) -> None:
        super().__init__()
        self._ctx = ctx
        self._method = method

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is Tensor.backward or func is torch.autograd.backward:
            return self._backward(*args, **kwargs)
        # By name, because importing flex attention for a comparison would import its compiler.
        if getattr(func, "__name__", None) in _LOCAL_ONLY:
            raise ModelError(
                "this attention would see only this rank's chunk of the sequence",
                got=f"`{func.__name__}`",
                fix="write the model with `F.scaled_dot_product_attention`, or call "
                "`faccel.parallel.attention` in it",
            )
        return func(*args, **kwargs)

    def _backward(
        self,
        tensors: Tensor | Sequence[Tensor],
        gradient: Any = None,
        *,
        inputs: Any = None,
        **options: Any,
    ) -> None:
        """Run backward with this mode on, because activation checkpointing runs forward again.

        A mode is off inside its `__torch_function__`. Turned on again, it would intercept
        `backward` of tensors without end; torch does not intercept that of gradient edges.
        """
        roots: list[Any] = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        # `Tensor.backward` has `gradient`, `torch.autograd.backward` has `grad_tensors`.
        grads = options.pop("grad_tensors", gradient)
        if inputs is not None:
            torch.autograd.backward(roots, grads, inputs=inputs, **options)
            return
        edges: list[Any] = []
        for root in roots:
            # Callers may pass edges already; those are kept.
            if isinstance(root, Tensor):
                edges.append(get_gradient_edge(root))
            else:
                edges.append(root)
        with self:
            torch.autograd.backward(edges, grads, **options)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 (torch's signature)
        **options: Any,
    ) -> Tensor:
        # A mask is over the full sequence, and dropout would need one generator for all ranks.
        if attn_mask is not None:
            raise ModelError(
                "`attn_mask` is unsupported inside `context_parallel`",
                got=f"a mask of {describe([attn_mask])}",
                fix="pass `is_causal=True` for a causal mask; leave a padding mask out, and ignore "
                "the padding's loss",
            )
        if dropout_p:
            raise ModelError(
                "dropout of attention is unsupported inside `context_parallel`",
                got=f"dropout_p={dropout_p}",
                fix="set the dropout of attention to 0; other dropout may stay",
            )
        return attention(
            query, key, value, self._ctx, is_causal=is_causal, method=self._method, **options
        )
