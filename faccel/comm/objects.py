"""Collectives over anything that can be pickled."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from faccel.comm.pack import check_rank
from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError
from faccel.protocols import DATA, WORLD

T = TypeVar("T")


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
    lengths: list[int] = ctx.comm.all_gather(
        torch.tensor(len(row), device=ctx.device), axis
    ).tolist()
    padded = row.new_zeros(max(lengths))
    padded[: len(row)] = row
    return [
        _from_bytes(r[:n]) for r, n in zip(ctx.comm.all_gather(padded, axis), lengths, strict=True)
    ]


@effectful(COLLECTIVE)
def broadcast_objects(
    objs: list[T], ctx: DistContext, *, src: int = 0, axis: str = WORLD
) -> list[T]:
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
    check_rank(src, ctx, axis)
    row = (
        _to_bytes(objs, ctx)
        if ctx.comm.rank(axis) == src
        else torch.zeros(0, dtype=torch.uint8, device=ctx.device)
    )
    length = int(ctx.comm.broadcast(torch.tensor(len(row), device=ctx.device), src, axis))
    return _from_bytes(ctx.comm.broadcast(row if len(row) else row.new_zeros(length), src, axis))


@effectful(COLLECTIVE)
def scatter_objects(
    objs: Sequence[T] | None, ctx: DistContext, *, src: int = 0, axis: str = DATA
) -> T:
    """Give each rank of the axis its own item of rank `src`'s sequence, and nothing else.

    Effects: collective. Two collectives, whatever the items.

    Args:
        objs: On `src` one item per rank, of anything that can be pickled; on the others it is ignored.
        ctx: The world to scatter over.
        src: The rank on the axis that gives the items.
        axis: `"data"`, `"world"` or an axis of the mesh.

    Returns:
        This rank's item, a copy even at one rank.

    Raises:
        ConfigError: There are more or fewer items than ranks; on `src`, before anything is sent.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: scatter_objects(["a", {"b": 1}] if ctx.is_main else None, ctx), 2)
        ('a', {'b': 1})
    """
    check_rank(src, ctx, axis)
    size, rows = ctx.comm.size(axis), None
    lengths = torch.zeros(size, dtype=torch.int64, device=ctx.device)
    if ctx.comm.rank(axis) == src:
        given = list(objs or ())
        if len(given) != size:
            raise ConfigError(
                "`scatter_objects` takes one item per rank",
                got=f"{len(given)} for {size} ranks",
                fix="add them",
            )
        packed = [_to_bytes(obj, ctx) for obj in given]
        lengths += torch.tensor([len(row) for row in packed], device=ctx.device)
        rows = torch.nn.utils.rnn.pad_sequence(packed, batch_first=True)
    counts: list[int] = ctx.comm.broadcast(lengths, src, axis).tolist()
    like = torch.empty(max(counts), dtype=torch.uint8, device=ctx.device)
    return _from_bytes(ctx.comm.scatter(rows, like, src, axis)[: counts[ctx.comm.rank(axis)]])
