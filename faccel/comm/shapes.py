"""Sharing work and evening out shapes: what inference across ranks needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch.nn.functional import pad

from faccel.comm.pack import pack
from faccel.comm.tensors import tensor_leaves
from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import DataError
from faccel.protocols import DATA, WORLD
from faccel.tree import Tree, leaf_error


def split(xs: Any, ctx: DistContext, *, pad: bool = False, axis: str = DATA) -> Any:
    """Return this rank's slice of a list, tuple or tensor, or of each of those in a dict; for inference.

    Effects: pure. The slices are contiguous and in rank order; the first `n % W` ranks get one item more.

    Args:
        xs: What every rank has. All values of a dict must have the same length.
        ctx: The world.
        pad: Whether shorter slices repeat the last item of `xs`, so that every rank has equally many; the last
            `-n % W` ranks are padded by one.
        axis: `"data"`, `"world"` or an axis of the mesh.

    Returns:
        The same kind of container, new; a view where `xs` is a tensor and nothing is padded.

    Raises:
        DataError: Something without a length, values of different lengths, or nothing to pad with.

    Examples:
        >>> from faccel.testing import fake_context
        >>> [split(list("abcde"), fake_context(rank, 3)) for rank in range(3)]
        [['a', 'b'], ['c', 'd'], ['e']]
        >>> split({"x": ("a", "b", "c")}, fake_context(1, 2), pad=True)
        {'x': ('c', 'c')}
    """
    if isinstance(xs, Mapping):
        lengths = {key: len(value) for key, value in xs.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                "all values must have the same length",
                got=str(lengths),
                fix="split them one by one",
            )
        parts = {key: split(value, ctx, pad=pad, axis=axis) for key, value in xs.items()}
        if type(xs) is dict or not isinstance(xs, MutableMapping):
            return parts
        like = copy.copy(xs)  # a tokenizer's encodings stay what they are
        like.update(parts)
        return like
    if not isinstance(xs, (list, tuple, torch.Tensor)):
        raise DataError(
            "`split` takes a list, a tuple, a tensor or a dict",
            got=type(xs).__name__,
            fix="convert it",
        )
    rank, size = (
        (ctx.data_rank, ctx.data_world_size)
        if axis == DATA
        else (ctx.comm.rank(axis), ctx.comm.size(axis))
    )
    each, more = divmod(len(xs), size)
    start = rank * each + min(rank, more)
    part = xs[start : start + each + (rank < more)]
    if not pad or not more or rank < more:
        return part
    return torch.cat([part, xs[-1:]]) if isinstance(xs, torch.Tensor) else part + xs[-1:]  # type: ignore[operator]


@effectful(COLLECTIVE)
def pad_across(
    x: Tree,
    ctx: DistContext,
    *,
    dim: int = 0,
    value: float = 0,
    first: bool = False,
    axis: str = DATA,
) -> Tree:
    """Pad every tensor along `dim` to the longest that any rank of the axis has.

    Effects: collective. Every rank must call it with the same structure; one small all-reduce for the whole tree.

    Args:
        x: A tensor, or any nesting of them; leaves that have no dimension `dim` come back as they are.
        ctx: The world.
        dim: Along which dimension; negative counts from the last.
        value: What to fill with.
        first: Whether to fill in front.
        axis: `"data"`, `"world"` or an axis of the mesh.

    Returns:
        The same structure, fresh, detached, on the device of `ctx`.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: pad_across(torch.ones(ctx.rank + 1), ctx), 3)[0]
        tensor([1., 0., 0.])
    """
    leaves, rebuild = tensor_leaves(x, ctx)
    dims = [dim if -leaf.ndim <= dim < leaf.ndim else None for leaf in leaves]
    mine = [0 if d is None else leaf.shape[d] for leaf, d in zip(leaves, dims, strict=True)]
    longest: list[int] = ctx.comm.all_reduce(
        torch.tensor(mine, device=ctx.device), "max", axis
    ).tolist()
    return rebuild(
        [
            leaf.clone() if d is None else _padded(leaf, d, to - have, value, first)
            for leaf, d, have, to in zip(leaves, dims, mine, longest, strict=True)
        ]
    )


def _padded(leaf: torch.Tensor, dim: int, missing: int, value: float, first: bool) -> torch.Tensor:  # noqa: FBT001
    before_last = leaf.ndim - 1 - dim % leaf.ndim
    widths = [0, 0] * before_last + ([missing, 0] if first else [0, missing])
    return pad(leaf, widths, value=value) if missing else leaf.clone()


@effectful(COLLECTIVE)
def all_to_all(x: Tree, ctx: DistContext, *, axis: str = WORLD) -> Tree:
    """Exchange rows: row `j` of rank `i` becomes row `i` of rank `j`.

    Effects: collective. Every rank of the axis must call it, with the same structure, shapes and dtypes. One
    collective for the whole tree.

    Args:
        x: A tensor `T[size, ...]` with one row per rank of the axis, or any nesting of them.
        ctx: The world.
        axis: `"world"`, `"data"` or an axis of the mesh.

    Returns:
        The same structure and shapes, fresh and detached, on the device of `ctx`.

    Raises:
        TreeError: A leaf has not one row per rank.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: all_to_all(10 * ctx.rank + torch.arange(2), ctx).tolist(), 2)
        ([0, 10], [1, 11])
    """
    leaves, rebuild = tensor_leaves(x, ctx)
    size = ctx.comm.size(axis)
    for i, leaf in enumerate(leaves):
        if leaf.ndim == 0 or leaf.shape[0] != size:
            raise leaf_error(
                x, i, "`all_to_all` exchanges one row per rank", f"give it {size} rows"
            )
    packed = pack(leaves, num_rows=size)
    ctx.comm.set_call_label("all_to_all", x)
    rows = ctx.comm.all_to_all(packed.row, axis)
    return rebuild([packed.read(rows, i).clone() for i in range(len(leaves))])
