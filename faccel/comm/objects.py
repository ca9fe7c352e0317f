"""Collectives over any picklable objects, and over values of JSON."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from faccel.comm.pack import check_rank, pad_to
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError
from faccel.mesh import DATA, WORLD
from faccel.tree import Tree

T = TypeVar("T")


def _to_bytes(obj: object, ctx: DistContext) -> torch.Tensor:
    # `bytearray`, because PyTorch warns about the read-only buffer of `bytes`. On the device of the
    # context, because NCCL sends tensors of the GPU only.
    buffer = io.BytesIO()
    _Pickler(buffer).dump(obj)
    return torch.frombuffer(bytearray(buffer.getbuffer()), dtype=torch.uint8).to(ctx.device)


class _Pickler(pickle.Pickler):
    """Pickles the elements of a tensor, where PyTorch pickles its whole storage.

    A row of a dataset would otherwise be sent with the whole dataset. Tensors that share memory
    do not after that, unless they are one object.
    """

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is pickled; `NotImplemented` for its usual way."""
        # Exact: what a subclass needs is unknown. Other layouts have no storage.
        if type(obj) is not torch.Tensor or obj.layout is not torch.strided:
            return NotImplemented
        if obj.untyped_storage().nbytes() <= obj.nbytes:
            return NotImplemented
        elements = obj.detach().clone().requires_grad_(obj.requires_grad)
        return elements.__reduce_ex__(pickle.DEFAULT_PROTOCOL)


def _from_bytes(row: torch.Tensor) -> Tree:
    return pickle.loads(row.cpu().numpy().tobytes())


@effectful(COLLECTIVE)
def gather_objects(obj: T, ctx: DistContext, *, axis: str = DATA) -> list[T]:
    """Return every rank's object, in the order of the ranks of the axis.

    Effects: collective. Two collectives, whatever the size of the objects.

    Args:
        obj: Anything picklable. The other ranks unpickle it, so all ranks must trust each other.
        ctx: The world to gather over.
        axis: `"data"`, `"world"` or an axis of the mesh.

    Returns:
        One object per rank, copies even on one rank.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: gather_objects("r" * ctx.rank, ctx), 3)[2]
        ['', 'r', 'rr']
    """
    require_context(ctx, "faccel.gather_objects(obj, ctx)")
    return [_from_bytes(row) for row in _gather_rows(_to_bytes(obj, ctx), ctx, axis)]


@effectful(COLLECTIVE)
def gather_json(value: T, ctx: DistContext, *, axis: str = DATA) -> list[T]:
    """Return every rank's value, in the order of the ranks of the axis, without a pickle.

    Ranks exchange faccel's control messages with it: a message of another sender executes nothing.

    Effects: collective. Two collectives, as in `gather_objects`.

    Args:
        value: None, a boolean, a number, text, or a list or dict of them with text as keys.
        ctx: The world to gather over.
        axis: `"data"`, `"world"` or an axis of the mesh.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: gather_json({"rank": ctx.rank}, ctx), 2)[0]
        [{'rank': 0}, {'rank': 1}]
    """
    row = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    rows = _gather_rows(row.to(ctx.device), ctx, axis)
    return [json.loads(row.cpu().numpy().tobytes()) for row in rows]


def _gather_rows(row: torch.Tensor, ctx: DistContext, axis: str) -> list[torch.Tensor]:
    """Return the `uint8[n]` of every rank; `n` may differ."""
    # First collective: the lengths, because an all-gather needs rows of one length.
    own_length = torch.tensor(len(row), device=ctx.device)
    lengths: list[int] = ctx.comm.all_gather(own_length, axis).tolist()
    # Second collective: the bytes. `max(lengths)` is the same on every rank.
    rows = ctx.comm.all_gather(pad_to(row, max(lengths)), axis)
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


@effectful(COLLECTIVE)
def broadcast_objects(
    objs: list[T], ctx: DistContext, *, src: int = 0, axis: str = WORLD
) -> list[T]:
    """Return rank `src`'s list on every rank of the axis.

    Effects: collective. Two collectives; the argument is not changed.

    Args:
        objs: A list of anything picklable; ignored on the other ranks, which unpickle it: they must
            trust `src`.
        ctx: The world to broadcast over.
        src: The rank on the axis whose list is sent.
        axis: `"world"`, `"data"` or an axis of the mesh.

    Returns:
        A new list.

    Raises:
        ConfigError: `src` is not a rank of the axis.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: broadcast_objects([{"from": ctx.rank}], ctx, src=1), 2)[0]
        [{'from': 1}]
    """
    require_context(ctx, "faccel.broadcast_objects(objs, ctx)")
    check_rank("src", src, ctx, axis)
    # Only `src` pickles: the argument of the other ranks is ignored and may be anything.
    row = torch.zeros(0, dtype=torch.uint8, device=ctx.device)
    if ctx.comm.rank(axis) == src:
        row = _to_bytes(objs, ctx)
    length = int(ctx.comm.broadcast(torch.tensor(len(row), device=ctx.device), src, axis))
    if ctx.comm.rank(axis) != src:
        # A broadcast reads only shape and dtype of this row.
        row = row.new_zeros(length)
    return _from_bytes(ctx.comm.broadcast(row, src, axis))


@effectful(COLLECTIVE)
def scatter_objects(
    objs: Sequence[T] | None, ctx: DistContext, *, src: int = 0, axis: str = DATA
) -> T:
    """Send each rank of the axis only its own item of rank `src`'s sequence.

    Effects: collective. Two collectives, whatever the items.

    Args:
        objs: On `src` one picklable item per rank; ignored on the other ranks, which unpickle
            theirs: they must trust `src`.
        ctx: The world to scatter over.
        src: The rank on the axis that sends the items.
        axis: `"data"`, `"world"` or an axis of the mesh.

    Returns:
        This rank's item, a copy even on one rank.

    Raises:
        ConfigError: `src` is not a rank of the axis, or has more or fewer items than there are
            ranks; that is raised on `src` before anything is sent.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: scatter_objects(["a", {"b": 1}] if ctx.is_main else None, ctx), 2)
        ('a', {'b': 1})
    """
    require_context(ctx, "faccel.comm.scatter_objects(objs, ctx)")
    check_rank("src", src, ctx, axis)
    size, rows = ctx.comm.size(axis), None
    # All lengths on every rank: `scatter` needs one shape for all rows, which is the longest one.
    lengths = torch.zeros(size, dtype=torch.int64, device=ctx.device)
    if ctx.comm.rank(axis) == src:
        items = list(objs or ())
        if len(items) != size:
            raise ConfigError(
                f"`objs` must have {size} items, one per rank of the axis `{axis}`",
                got=f"{len(items)} items",
                fix=f"pass a list of {size} items on rank {src}",
            )
        packed = [_to_bytes(item, ctx) for item in items]
        lengths += torch.tensor([len(row) for row in packed], device=ctx.device)
        rows = torch.nn.utils.rnn.pad_sequence(packed, batch_first=True)
    row_lengths: list[int] = ctx.comm.broadcast(lengths, src, axis).tolist()
    like = torch.empty(max(row_lengths), dtype=torch.uint8, device=ctx.device)
    row = ctx.comm.scatter(rows, like, src, axis)
    return _from_bytes(row[: row_lengths[ctx.comm.rank(axis)]])
