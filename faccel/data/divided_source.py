"""Batches of all ranks together, which a loader yields ready-made: each rank takes its rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence

import attrs
import numpy as np
import torch

from faccel.comm.all_or_error import Failure, raise_first
from faccel.comm.objects import scatter_objects
from faccel.comm.row_count import RowCount
from faccel.context import DistContext
from faccel.data.batch import BatchInfo, Source, empty_error
from faccel.data.order import Cursor, Rows, divide_rows
from faccel.errors import DataError
from faccel.tree import Tree, flatten, is_tensordict, map_leaves

_Item = tuple[BatchInfo, Tree]


@attrs.frozen(eq=False)
class DividedSource:
    """A source whose batches are divided over the ranks along their rows.

    Args:
        base: Yields the batches of all ranks together, on every rank the same. A cursor counts
            them, so that it resumes on any number of ranks.
        ctx: The world.
        tail: For the rows that the ranks do not divide: `"pad"` repeats fewer than `W` rows of the
            same batch, `"uneven"` none, `"drop"` leaves such a batch out.
        dispatch: Whether rank 0 reads the batches, and sends each rank its rows.
    """

    base: Source
    ctx: DistContext
    tail: str
    dispatch: bool

    @property
    def name(self) -> str:
        """See `Source`."""
        return self.base.name

    def num_steps(self, epoch: int, start: int) -> int:
        """See `Source`; unknown where a batch may give this rank no rows."""
        # A TypeError, as for other unknown lengths: `list(loader)` ignores only that class.
        if self.tail != "pad":
            raise TypeError(f'the number of steps with `tail="{self.tail}"` depends on the batches')
        return self.base.num_steps(epoch, start)

    def start_of(self, epoch: int, step: int) -> int:
        """See `Source`; a step is a batch of the loader, also where this rank has no rows of it."""
        return self.base.start_of(epoch, step)

    def read(self, cursor: Cursor) -> Iterator[_Item]:
        """See `Source`; collective if rank 0 dispatches."""
        items = self._items(cursor)
        # One step ahead: a later batch may have no rows for this rank.
        current = next(items, None)
        if current is None and not cursor.samples_consumed and self.tail != "uneven":
            raise empty_error(
                f"batches of which none has a multiple of {self.ctx.data_world_size} rows",
                'write `tail="pad"`, or make the batches larger',
            )
        while current is not None:
            ahead = next(items, None)
            info, data = current
            if ahead is None:
                # The position is the end of the epoch where the batches that follow are dropped by
                # all ranks. With "uneven", other ranks may have rows of them.
                is_end = info.is_end or self.tail == "drop"
                info = attrs.evolve(info, is_last=True, is_end=is_end)
            yield info, data
            current = ahead

    def _items(self, cursor: Cursor) -> Iterator[_Item]:
        """Yield this rank's rows of each batch that has some for it."""
        # Every rank reads every batch: no communication, as with `mode="split"` of a stream.
        if not self.dispatch:
            for info, data in self.base.read(cursor):
                yield from self._part(info, data, self.ctx.data_rank)
            return
        batches: Iterator[_Item] | None = None
        if self.ctx.data_rank == 0:
            batches = self.base.read(cursor)
        while True:
            sent, error = None, None
            if batches is not None:
                sent, error = self._next_parts(batches)
            # One exchange for rows, the end and a failure: the other ranks cannot predict which.
            part, failure = scatter_objects(sent, self.ctx)
            raise_first([failure], error, self.ctx, "read the data")
            if part is None:
                return
            yield from part

    def _next_parts(self, batches: Iterator[_Item]) -> tuple[list[Tree], Exception | None]:
        """Return `(part, failure)` for each rank, parts None at the end, and this rank's error."""
        world_size = self.ctx.data_world_size
        try:
            item = next(batches, None)
            if item is None:
                return [(None, None)] * world_size, None
            return [(_copied(self._part(*item, rank)), None) for rank in range(world_size)], None
        except Exception as error:  # the other ranks wait for their rows
            return [(None, Failure.of(error, self.ctx))] * world_size, error

    def _part(self, info: BatchInfo, data: Tree, rank: int) -> list[_Item]:
        """Return a rank's rows of a batch; an empty list where it has none."""
        world_size = self.ctx.data_world_size
        num_rows = rows_of(data)
        if self.tail == "drop" and num_rows % world_size:
            return []
        rows = divide_rows(num_rows, num_rows, rank, world_size, self.tail)
        if rows.num_valid + rows.num_repeats == 0:
            return []
        # The rows of rank 0, by which `gather` pads without a further collective. A plain number
        # where all ranks have as many rows, which is the case in most steps.
        largest = -(-num_rows // world_size)
        num_valid: int = rows.num_valid
        if num_rows % world_size:
            num_valid = RowCount(num_valid, largest)
        return [(attrs.evolve(info, num_valid=num_valid), _take(data, num_rows, rows))]


def _copied(items: list[_Item]) -> list[_Item]:
    """Return the items with copies of their tensors.

    A pickle of a view has the memory of the full batch.
    """

    def copied(leaf: Tree) -> Tree:
        if isinstance(leaf, torch.Tensor):
            return leaf.clone()
        return leaf

    return [(info, map_leaves(copied, data)) for info, data in items]


def rows_of(data: Tree) -> int:
    """Return the number of rows of a batch.

    Effects: pure.

    Raises:
        DataError: It has no rows, or tensors with other numbers of rows.

    Examples:
        >>> rows_of({"x": torch.zeros(4, 2), "names": ["a", "b", "c", "d"], "epoch": 3})
        4
    """
    # Tensors decide; a list beside them may have any length, such as the names of classes.
    lengths = sorted({len(leaf) for leaf in flatten(data)[0] if _has_rows(leaf)})
    if not lengths:
        lengths = sorted({len(column) for column in _columns(data)})
    if len(lengths) != 1:
        raise DataError(
            "`split_batches` divides the rows of a batch, whose tensors must have one length along "
            "dim 0",
            got=f"a {type(data).__name__} with the lengths {lengths}",
            fix="leave `split_batches` out: each rank then takes whole batches",
        )
    return lengths[0]


def _has_rows(leaf: Tree) -> bool:
    return isinstance(leaf, torch.Tensor | np.ndarray) and leaf.ndim > 0


def _is_column(value: Tree) -> bool:
    """Return whether a value is a list of one item for each row, such as texts, without tensors."""
    if not isinstance(value, list):
        return False
    return not any(_has_rows(leaf) for leaf in flatten(value)[0])


def _columns(data: Tree) -> Iterator[list[Tree]]:
    for value in _fields(data):
        if _is_column(value):
            yield value


def _fields(data: Tree) -> Sequence[Tree]:
    """Return the values of a mapping or of a tuple; a batch of another kind is its only field."""
    if isinstance(data, Mapping):
        return list(data.values())
    if isinstance(data, tuple | list) and not _is_column(data):
        return data
    return [data]


def _take(data: Tree, num_rows: int, rows: Rows) -> Tree:
    """Return the rows of a rank, of a batch with `num_rows`; views where nothing repeats."""
    # It indexes all of its tensors at once, and keeps its batch size.
    if is_tensordict(data):
        return _rows_of_leaf(data, rows)
    # A mapping and a list are containers, or columns of the batch: only here, at the top.
    if isinstance(data, Mapping):
        fields: dict[Tree, Tree] = {}
        for key, value in data.items():
            fields[key] = _take_field(value, num_rows, rows)
        if type(data) is dict or not isinstance(data, MutableMapping):
            return fields
        result = copy.copy(data)  # keeps the class of a tokenizer's `BatchEncoding`
        result.update(fields)
        return result
    if isinstance(data, tuple | list) and not _is_column(data):
        values = [_take_field(value, num_rows, rows) for value in data]
        if hasattr(data, "_fields"):  # a named tuple takes its fields one by one
            return type(data)(*values)
        return type(data)(values)
    return _take_field(data, num_rows, rows)


def _take_field(value: Tree, num_rows: int, rows: Rows) -> Tree:
    if _is_column(value):
        if len(value) != num_rows:  # not one item for each row
            return value
        valid = value[rows.begin : rows.begin + rows.num_valid]
        return valid + value[rows.repeat : rows.repeat + rows.num_repeats]

    def take(leaf: Tree) -> Tree:
        if _has_rows(leaf):
            return _rows_of_leaf(leaf, rows)
        return leaf

    return map_leaves(take, value)


def _rows_of_leaf(leaf: Tree, rows: Rows) -> Tree:
    valid = leaf[rows.begin : rows.begin + rows.num_valid]
    # A view, without a copy, in all batches that the ranks divide.
    if not rows.num_repeats:
        return valid
    repeats = leaf[rows.repeat : rows.repeat + rows.num_repeats]
    if isinstance(leaf, np.ndarray):
        return np.concatenate([valid, repeats])
    return torch.cat([valid, repeats])
