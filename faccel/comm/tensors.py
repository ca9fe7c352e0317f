"""Collectives over nested tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from faccel.comm.pack import check_rank, describe, digest, pack
from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError, DataError, DesyncError, nearest
from faccel.protocols import DATA, WORLD
from faccel.tree import Tree, flatten, leaf_error

REDUCE_OPS = ("sum", "mean", "min", "max", "prod")


def tensor_leaves(
    tree: Tree, ctx: DistContext
) -> tuple[list[torch.Tensor], Callable[[Sequence[Any]], Tree]]:
    """Return the leaves, detached, on the device of `ctx` and contiguous; refuse by name what is not a dense tensor."""
    leaves, rebuild = flatten(tree)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            raise leaf_error(
                tree,
                i,
                "only tensors travel in this collective",
                "use `gather_objects` for anything else",
            )
        if leaf.layout != torch.strided:
            raise leaf_error(
                tree, i, f"a {leaf.layout} tensor cannot be packed", "call `.to_dense()` on it"
            )
        leaves[i] = leaf.detach().to(ctx.device).resolve_conj().resolve_neg().contiguous()
    return leaves, rebuild


@effectful(COLLECTIVE)
def gather(
    x: Tree,
    ctx: DistContext,
    *,
    num_valid: int | None = None,
    ragged: bool = False,
    axis: str = DATA,
) -> Tree:
    """Concatenate `x` from every rank of the axis along dim 0, in data order.

    Effects: collective. Every rank of the axis must call it, with the same structure, trailing shapes and dtypes. One
    collective for the whole tree; a second one where `ragged`.

    Args:
        x: This rank's part: a tensor `T[n, ...]`, or any nesting of them. A 0-d leaf counts as one row and is never
            dropped.
        ctx: The world to gather over.
        num_valid: Rows of this rank's part that are not padding (`Batch.num_valid`), `0 <= num_valid <= n`. The
            others are dropped. May differ between ranks.
        ragged: Whether `n` differs between ranks.
        axis: `"data"`, `"world"` or an axis of the mesh. Ranks that share data count once on `"data"`.

    Returns:
        The same structure, each leaf `T[sum of valid rows, ...]`, equal on every rank, detached from the graph, on the
        device of `ctx`. Always fresh: `x` is neither written nor aliased, even when there is one rank.

    Raises:
        DataError: `num_valid` is out of range, or a leaf has another number of rows than the others.
        DesyncError: Ranks sent other shapes or dtypes (off the CPU only seen where rows are counted).
        TreeError: A leaf is not a dense tensor; names it.

    Examples:
        >>> import torch
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: gather(torch.tensor([ctx.rank, -1]), ctx, num_valid=1), 3)[0]
        tensor([0, 1, 2])
    """
    leaves, rebuild = tensor_leaves(x, ctx)
    is_row = [leaf.ndim == 0 for leaf in leaves]
    leaves = [leaf.reshape(1) if row else leaf for leaf, row in zip(leaves, is_row, strict=True)]
    counts_rows, count = num_valid is not None or ragged, 0
    if counts_rows:
        num_rows = _num_rows(x, leaves, is_row)
        count = num_rows if num_valid is None else num_valid
        if not isinstance(count, int) or not 0 <= count <= num_rows:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DataError(
                "`num_valid` counts the rows of this rank's part that are not padding",
                got=f"num_valid={num_valid} of {num_rows} rows",
                fix="pass `Batch.num_valid` of the batch that `x` was computed from",
            )
        if ragged:  # parts of several lengths are not announced: they are right
            leaves = _pad_to_longest(leaves, is_row, count, ctx, axis)
    packed = pack([*leaves, torch.tensor([digest(leaves), count], device=ctx.device)])
    if not ragged:
        ctx.comm.set_call_label("gather", x)
    rows = ctx.comm.all_gather(packed.row, axis)
    *parts, headers = [packed.read(rows, i) for i in range(len(leaves) + 1)]
    if not counts_rows:
        if ctx.device.type == "cpu":  # elsewhere reading it would make the host wait
            _check_same([d for d, _ in headers.tolist()], leaves, ctx, axis)
        return rebuild([part.flatten(0, 1) for part in _fresh(parts, rows)])
    digests, counts = zip(*headers.tolist(), strict=True)
    _check_same(digests, leaves, ctx, axis)
    return rebuild(
        [
            part.flatten().clone()
            if row
            else torch.cat([part[r, :n] for r, n in enumerate(counts)])
            for part, row in zip(parts, is_row, strict=True)
        ]
    )


def _check_same(
    digests: Sequence[int], leaves: list[torch.Tensor], ctx: DistContext, axis: str
) -> None:
    """Raise on every rank where ranks have sent tensors of other shapes or dtypes."""
    if len(set(digests)) > 1:
        groups = [
            [r for r, d in enumerate(digests) if d == each] for each in dict.fromkeys(digests)
        ]
        raise DesyncError(
            "ranks disagree about shapes or dtypes in one collective",
            got=f"ranks that agree with each other: {groups}; rank {ctx.comm.rank(axis)} sent {describe(leaves)}",
            fix="send the same shapes and dtypes, pass `ragged=True`, or `num_valid=` with rows padded alike",
        )


def _fresh(parts: list[torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
    """Copy the parts that are views of the gathered bytes, so that no result keeps the others alive."""
    here = rows.untyped_storage().data_ptr()
    return [part.clone() if part.untyped_storage().data_ptr() == here else part for part in parts]


def _num_rows(x: Tree, leaves: list[torch.Tensor], is_row: list[bool]) -> int:
    sized = [i for i, row in enumerate(is_row) if not row]
    if not sized:
        raise DataError(
            "`num_valid` and `ragged` need rows to count",
            got="only 0-d tensors",
            fix="leave them out",
        )
    num_rows = leaves[sized[0]].shape[0]
    for i in sized:
        if leaves[i].shape[0] != num_rows:
            error = leaf_error(
                x,
                i,
                f"every leaf must have the same {num_rows} rows",
                "gather it in a call of its own",
            )
            raise DataError(error.problem, got=error.got, fix=error.fix)
    return num_rows


def _pad_to_longest(
    leaves: list[torch.Tensor], is_row: list[bool], count: int, ctx: DistContext, axis: str
) -> list[torch.Tensor]:
    longest = int(ctx.comm.all_reduce(torch.tensor(count, device=ctx.device), "max", axis))
    padded = [
        leaf if row else leaf.new_zeros(longest, *leaf.shape[1:])
        for leaf, row in zip(leaves, is_row, strict=True)
    ]
    for new, leaf, row in zip(padded, leaves, is_row, strict=True):
        if not row:
            new[:count] = leaf[:count]
    return padded


@effectful(COLLECTIVE)
def reduce(x: Tree, ctx: DistContext, *, op: str = "sum", axis: str = DATA) -> Tree:
    """Reduce `x` over the ranks of the axis, element by element.

    Effects: collective. Every rank of the axis must call it, with the same structure, shapes and dtypes. One
    collective per dtype in the tree.

    Args:
        x: A tensor `T[...]`, or any nesting of them.
        ctx: The world to reduce over.
        op: `"sum"`, `"mean"`, `"min"`, `"max"` or `"prod"`. The mean of integers is a float of the default dtype, the
            sum of booleans an int64.
        axis: `"data"`, `"world"` or an axis of the mesh.

    Returns:
        The same structure and shapes, equal on every rank, fresh and detached, on the device of `ctx`.

    Raises:
        ConfigError: `op` is none of those.
        DesyncError: Ranks asked for another operation, or sent other leaves, shapes or dtypes (seen on the CPU; a rank
            that gloo itself aborts cannot say so, see debug mode).
        TreeError: A leaf is not a dense tensor; names it.

    Examples:
        >>> import torch
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: reduce({"n": torch.tensor(ctx.rank)}, ctx, op="mean"), 4)[0]
        {'n': tensor(1.5000)}
    """
    if op not in REDUCE_OPS:
        raise ConfigError("`op` is not a reduction", got=repr(op), fix=nearest(str(op), REDUCE_OPS))
    leaves, rebuild = tensor_leaves(x, ctx)
    size = ctx.comm.size(axis)
    wire = [_to_wire(leaf, op) for leaf in leaves]
    if leaves:
        ctx.comm.set_call_label(f"reduce({op})", x)
    results: list[torch.Tensor] = list(leaves)
    for dtype in sorted({x.dtype for x in wire}, key=str):
        members = [i for i, x in enumerate(wire) if x.dtype == dtype]
        flat = torch.cat([wire[i].reshape(-1) for i in members])
        reduced = ctx.comm.all_reduce(flat, "sum" if op == "mean" else op, axis)
        for i, part in zip(members, reduced.split([wire[i].numel() for i in members]), strict=True):
            part = part.clone() if len(members) > 1 else part
            results[i] = _from_wire(part.view(leaves[i].shape), leaves[i].dtype, op, size)
    return rebuild(results)


def _to_wire(leaf: torch.Tensor, op: str) -> torch.Tensor:
    whole = not (leaf.is_floating_point() or leaf.is_complex())
    if leaf.dtype == torch.bool or (whole and op == "mean"):
        return leaf.to(torch.int64)
    return leaf.to(torch.int32) if leaf.dtype == torch.int16 else leaf  # gloo has no int16


def _from_wire(reduced: torch.Tensor, dtype: torch.dtype, op: str, size: int) -> torch.Tensor:
    if op == "mean":
        return reduced / size
    return reduced if dtype == torch.bool and op == "sum" else reduced.to(dtype)


@effectful(COLLECTIVE)
def broadcast(x: Tree, ctx: DistContext, *, src: int = 0, axis: str = WORLD) -> Tree:
    """Return rank `src`'s value of `x` on every rank of the axis.

    Effects: collective. Every rank of the axis must call it, with the same structure, shapes and dtypes. One
    collective for the whole tree.

    Args:
        x: A tensor `T[...]`, or any nesting of them; of the other ranks only shapes and dtypes count.
        ctx: The world to broadcast over.
        src: The rank on the axis that gives the values.
        axis: `"world"`, `"data"` or an axis of the mesh.

    Returns:
        The same structure, fresh and detached, on the device of `ctx`.

    Raises:
        ConfigError: `src` is not a rank of the axis.
        TreeError: A leaf is not a dense tensor; names it.

    Examples:
        >>> import torch
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: broadcast(torch.tensor(ctx.rank), ctx, src=2), 3)
        (tensor(2), tensor(2), tensor(2))
    """
    check_rank(src, ctx, axis)
    leaves, rebuild = tensor_leaves(x, ctx)
    mine = digest(leaves)
    ctx.comm.set_call_label(f"broadcast(src={src})", x)
    packed = pack([*leaves, torch.tensor([mine], device=ctx.device)])
    rows = ctx.comm.broadcast(packed.row, src, axis)[None]
    if ctx.device.type == "cpu":
        _check_same([mine, int(packed.read(rows, len(leaves)))], leaves, ctx, axis)
    return rebuild([packed.read(rows, i)[0].clone() for i in range(len(leaves))])
