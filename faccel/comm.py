"""Collectives over nested values: everything of a call travels packed, in one collective of the axis."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import attrs
import torch

from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError, DataError, RankFailedError, nearest
from faccel.protocols import DATA, WORLD
from faccel.tree import Tree, flatten, reject

P = ParamSpec("P")
T = TypeVar("T")

_ALIGNMENT = 16  # bytes; the widest dtype is complex128
REDUCE_OPS = ("sum", "mean", "min", "max", "prod")


@attrs.frozen(eq=False)
class _Packed:
    """Leaves as one row of bytes, widest dtype first, so that every leaf is aligned."""

    row: torch.Tensor  # uint8[num_bytes]
    offsets: list[int]  # of each leaf, in the order of the leaves
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]

    def read(self, rows: torch.Tensor, leaf: int) -> torch.Tensor:
        """Return leaf number `leaf` of each of `rows: uint8[w, num_bytes]` as `T[w, ...]`, a view where possible."""
        start = self.offsets[leaf]
        dtype, shape = self.dtypes[leaf], self.shapes[leaf]
        end = start + shape.numel() * dtype.itemsize
        return rows[:, start:end].view(dtype).reshape(rows.shape[0], *shape)


def _pack(leaves: list[torch.Tensor]) -> _Packed:
    order = sorted(range(len(leaves)), key=lambda i: -leaves[i].dtype.itemsize)
    offsets, end, parts = [0] * len(leaves), 0, list[torch.Tensor]()
    for i in order:
        offsets[i] = end
        end += leaves[i].nbytes
        parts.append(leaves[i].reshape(-1).view(torch.uint8))
    if end % _ALIGNMENT:
        parts.append(parts[0].new_zeros(_ALIGNMENT - end % _ALIGNMENT))
    row = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    return _Packed(row, offsets, [x.shape for x in leaves], [x.dtype for x in leaves])


def _tensors(tree: Tree, ctx: DistContext) -> tuple[list[torch.Tensor], Callable[[Sequence[Any]], Tree]]:
    """Return the leaves, detached, on the device of `ctx` and contiguous; refuse by name what is not a dense tensor."""
    leaves, rebuild = flatten(tree)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            raise reject(tree, i, "only tensors travel in this collective", "use `gather_objects` for anything else")
        if leaf.layout != torch.strided:
            raise reject(tree, i, f"a {leaf.layout} tensor cannot be packed", "call `.to_dense()` on it")
        leaves[i] = leaf.detach().to(ctx.device).contiguous()
    return leaves, rebuild


@effectful(COLLECTIVE)
def gather(x: Tree, ctx: DistContext, *, num_valid: int | None = None, ragged: bool = False, axis: str = DATA) -> Tree:
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
        TreeError: A leaf is not a dense tensor; names it.

    Examples:
        >>> import torch
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: gather(torch.tensor([ctx.rank, -1]), ctx, num_valid=1), 3)[0]
        tensor([0, 1, 2])
    """
    leaves, rebuild = _tensors(x, ctx)
    is_row = [leaf.ndim == 0 for leaf in leaves]
    leaves = [leaf.reshape(1) if row else leaf for leaf, row in zip(leaves, is_row, strict=True)]
    if num_valid is not None or ragged:
        num_rows = _num_rows(x, leaves, is_row)
        count = num_rows if num_valid is None else num_valid
        if not 0 <= count <= num_rows:
            raise DataError(
                "`num_valid` counts the rows of this rank's part that are not padding",
                saw=f"num_valid={num_valid} of {num_rows} rows",
                fix="pass `Batch.num_valid` of the batch that `x` was computed from",
            )
        if ragged:
            leaves = _pad_to_longest(leaves, is_row, count, ctx, axis)
        leaves.append(torch.tensor([count], device=ctx.device))
    packed = _pack(leaves)
    rows = ctx.comm.all_gather(packed.row, axis)
    parts = [packed.read(rows, i) for i in range(len(leaves))]
    if num_valid is None and not ragged:
        return rebuild([part.reshape(-1, *part.shape[2:]) for part in _fresh(parts, rows)])
    counts: list[int] = parts.pop().flatten().tolist()
    return rebuild(
        [
            part.reshape(-1).clone() if row else torch.cat([part[r, :n] for r, n in enumerate(counts)])
            for part, row in zip(parts, is_row, strict=True)
        ]
    )


def _fresh(parts: list[torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
    """Copy the parts that are views of the gathered bytes, so that no result keeps the others alive."""
    here = rows.untyped_storage().data_ptr()
    return [part.clone() if part.untyped_storage().data_ptr() == here else part for part in parts]


def _num_rows(x: Tree, leaves: list[torch.Tensor], is_row: list[bool]) -> int:
    sized = [i for i, row in enumerate(is_row) if not row]
    if not sized:
        raise DataError("`num_valid` and `ragged` need rows to count", saw="only 0-d tensors", fix="leave them out")
    num_rows = leaves[sized[0]].shape[0]
    for i in sized:
        if leaves[i].shape[0] != num_rows:
            error = reject(x, i, f"every leaf must have the same {num_rows} rows", "gather it in a call of its own")
            raise DataError(error.what, saw=error.saw, fix=error.fix)
    return num_rows


def _pad_to_longest(
    leaves: list[torch.Tensor], is_row: list[bool], count: int, ctx: DistContext, axis: str
) -> list[torch.Tensor]:
    longest = int(ctx.comm.all_reduce(torch.tensor(count, device=ctx.device), "max", axis))
    padded = [leaf if row else leaf.new_zeros(longest, *leaf.shape[1:]) for leaf, row in zip(leaves, is_row, strict=True)]
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
        TreeError: A leaf is not a dense tensor; names it.

    Examples:
        >>> import torch
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: reduce({"n": torch.tensor(ctx.rank)}, ctx, op="mean"), 4)[0]
        {'n': tensor(1.5000)}
    """
    if op not in REDUCE_OPS:
        raise ConfigError("`op` is not a reduction", saw=repr(op), fix=nearest(str(op), REDUCE_OPS))
    leaves, rebuild = _tensors(x, ctx)
    size = ctx.comm.size(axis)
    wire = [_to_wire(leaf, op) for leaf in leaves]
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
    return leaf.to(torch.int64) if leaf.dtype == torch.bool or (whole and op == "mean") else leaf


def _from_wire(reduced: torch.Tensor, dtype: torch.dtype, op: str, size: int) -> torch.Tensor:
    if op == "mean":
        return reduced / size
    return reduced.to(dtype) if dtype == torch.bool and op != "sum" else reduced


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
    _check_rank(src, ctx, axis)
    leaves, rebuild = _tensors(x, ctx)
    packed = _pack(leaves)
    rows = ctx.comm.broadcast(packed.row, src, axis)[None]
    return rebuild([packed.read(rows, i)[0].clone() for i in range(len(leaves))])


def _check_rank(src: int, ctx: DistContext, axis: str) -> None:
    size = ctx.comm.size(axis)
    if not 0 <= src < size:
        raise ConfigError(f"`src` must be a rank of the axis `{axis}`", saw=str(src), fix=f"use 0 to {size - 1}")


def _to_bytes(obj: object, ctx: DistContext) -> torch.Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(obj)), dtype=torch.uint8).to(ctx.device)


def _from_bytes(row: torch.Tensor) -> Any:
    return pickle.loads(row.cpu().numpy().tobytes())


@effectful(COLLECTIVE)
def gather_objects(obj: T, ctx: DistContext, *, axis: str = DATA) -> list[T]:
    """Return every rank's object, in the order of the ranks of the axis.

    Effects: collective. Two collectives, whatever the size of the objects.

    Args:
        obj: Anything that can be pickled. It is unpickled by the other ranks: they trust each other.
        ctx: The world to gather over.
        axis: `"data"`, `"world"` or an axis of the mesh.

    Returns:
        One object per rank, copies even at one rank.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: gather_objects("r" * ctx.rank, ctx), 3)[2]
        ['', 'r', 'rr']
    """
    row = _to_bytes(obj, ctx)
    lengths: list[int] = ctx.comm.all_gather(torch.tensor(len(row), device=ctx.device), axis).tolist()
    padded = row.new_zeros(max(lengths))
    padded[: len(row)] = row
    return [_from_bytes(r[:n]) for r, n in zip(ctx.comm.all_gather(padded, axis), lengths, strict=True)]


@effectful(COLLECTIVE)
def broadcast_objects(objs: list[T], ctx: DistContext, *, src: int = 0, axis: str = WORLD) -> list[T]:
    """Return rank `src`'s list on every rank of the axis.

    Effects: collective. Two collectives; the argument is not written.

    Args:
        objs: A list of anything that can be pickled; of the other ranks it is ignored.
        ctx: The world to broadcast over.
        src: The rank on the axis that gives the list.
        axis: `"world"`, `"data"` or an axis of the mesh.

    Returns:
        A new list.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: broadcast_objects([{"from": ctx.rank}], ctx, src=1), 2)[0]
        [{'from': 1}]
    """
    _check_rank(src, ctx, axis)
    row = _to_bytes(objs, ctx) if ctx.comm.rank(axis) == src else torch.zeros(0, dtype=torch.uint8, device=ctx.device)
    length = int(ctx.comm.broadcast(torch.tensor(len(row), device=ctx.device), src, axis))
    return _from_bytes(ctx.comm.broadcast(row if len(row) else row.new_zeros(length), src, axis))


@effectful(COLLECTIVE)
def barrier(ctx: DistContext, *, axis: str = WORLD) -> None:
    """Return when every rank of the axis has called it.

    Effects: collective.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: barrier(ctx), 2).trace[0].op
        'barrier'
    """
    ctx.comm.barrier(axis)


@attrs.frozen
class Verdict:
    """What the ranks decided together: the same on all of them. `verdict.nan` and `verdict["nan"]` are one thing.

    Args:
        raised_by: For each flag the lowest rank of the axis that raised it, None where nobody did.

    Examples:
        >>> verdict = Verdict({"nan": 2, "stop": None})
        >>> verdict.nan, verdict["stop"], verdict.any
        (True, False, True)
    """

    raised_by: dict[str, int | None]

    def __getitem__(self, flag: str) -> bool:
        if flag not in self.raised_by:
            raise ConfigError(f"`{flag}` was not among the flags of this `agree`", fix=nearest(flag, self.raised_by))
        return self.raised_by[flag] is not None

    def __getattr__(self, flag: str) -> bool:
        if flag.startswith("__"):
            raise AttributeError(flag)
        return self[flag]

    @property
    def any(self) -> bool:
        """Whether any rank raised any flag."""
        return any(rank is not None for rank in self.raised_by.values())


@effectful(COLLECTIVE)
def agree(ctx: DistContext, *, axis: str = WORLD, **flags: bool | torch.Tensor) -> Verdict:
    """Decide together: a flag is raised on every rank as soon as one rank raises it.

    Effects: collective. One all-reduce of an int64 per flag; the host waits for the result.

    Args:
        ctx: The world that decides.
        axis: `"world"`, `"data"` or an axis of the mesh.
        **flags: The same names on every rank; booleans or 0-d tensors.

    Returns:
        The verdict, which also says which rank raised a flag first.

    Examples:
        >>> from faccel.testing import simulate
        >>> verdict = simulate(lambda ctx: agree(ctx, nan=ctx.rank > 1, stop=False), 4)[0]
        >>> verdict.nan, verdict.raised_by
        (True, {'nan': 2, 'stop': None})
    """
    names = sorted(flags)
    if not names:
        return Verdict({})
    size = ctx.comm.size(axis)
    mine = size - ctx.comm.rank(axis)  # the largest of these is the lowest rank's
    raised = torch.stack([torch.as_tensor(flags[name], device=ctx.device).bool() for name in names])
    lowest: list[int] = ctx.comm.all_reduce(raised.long() * mine, "max", axis).tolist()
    return Verdict({name: size - n if n else None for name, n in zip(names, lowest, strict=True)})


@effectful(COLLECTIVE)
@contextmanager
def main_first(ctx: DistContext, *, local: bool = False) -> Iterator[None]:
    """Run the body on rank 0 first, then on the others; for downloads and caches.

    Effects: collective.

    Args:
        ctx: The world.
        local: Whether the first process of every machine goes first, instead of rank 0 of the world.

    Raises:
        RankFailedError: On the waiting ranks, where the body raised on the rank that went first.

    Examples:
        >>> from faccel.testing import simulate
        >>> order = []
        >>> def fn(ctx):
        ...     with main_first(ctx):
        ...         order.append(ctx.rank)
        >>> _ = simulate(fn, 3)
        >>> order[0]
        0
    """
    if ctx.is_local_main if local else ctx.is_main:
        problem = "it left the body"  # by `return`, `break` or an exit that is not an Exception
        try:
            yield
            problem = ""
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            raise
        finally:
            gather_objects(problem, ctx, axis=WORLD)
        return
    problems = gather_objects("", ctx, axis=WORLD)
    failed = [(rank, problem) for rank, problem in enumerate(problems) if problem]
    if failed:
        rank, problem = failed[0]
        raise RankFailedError(f"rank {rank} failed in `main_first`", saw=problem, fix=f"mend the error of rank {rank}")
    yield


def on_rank(rank: int, ctx: DistContext) -> Callable[[Callable[P, T]], Callable[P, T | None]]:
    """Make a decorator: the function runs on one rank, on the others it returns None.

    Effects: pure. The decorated function must not call a collective.

    Args:
        rank: The rank of the world that runs it.
        ctx: The world.

    Examples:
        >>> from faccel.testing import fake_context
        >>> on_rank(1, fake_context(0, 2))(lambda: "ran")() is None
        True
    """
    _check_rank(rank, ctx, WORLD)

    def decorate(fn: Callable[P, T]) -> Callable[P, T | None]:
        @functools.wraps(fn)
        def run(*args: P.args, **kwargs: P.kwargs) -> T | None:
            return fn(*args, **kwargs) if ctx.rank == rank else None

        return run

    return decorate


def on_main(ctx: DistContext) -> Callable[[Callable[P, T]], Callable[P, T | None]]:
    """Make a decorator: the function runs on rank 0, on the others it returns None.

    Effects: pure. The decorated function must not call a collective.

    Examples:
        >>> from faccel.testing import fake_context
        >>> on_main(fake_context(0, 2))(lambda: "ran")()
        'ran'
    """
    return on_rank(0, ctx)


