"""Batches of all ranks together, which a loader yields ready-made: each rank takes its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    leaves, _ = flatten(data, is_leaf=_is_column)
    # Tensors decide; a list beside them may have any length, such as the names of classes.
    lengths = sorted({len(leaf) for leaf in leaves if _has_rows(leaf)})
    if not lengths:
        lengths = sorted({len(leaf) for leaf in leaves if isinstance(leaf, list | tuple)})
    if len(lengths) != 1:
        raise DataError(
            "`split_batches` divides the rows of a batch, whose tensors must have one length along "
            "dim 0",
            got=f"a {type(data).__name__} with the lengths {lengths}",
            fix="leave `split_batches` out: each rank then takes whole batches",
        )
    return lengths[0]


def _has_rows(value: Tree) -> bool:
    is_array = isinstance(value, torch.Tensor | np.ndarray) or is_tensordict(value)
    return is_array and value.ndim > 0


def _is_column(value: Tree) -> bool:
    """Return whether a value may have one item for each row, such as texts, and has no tensors."""
    # `default_collate` makes tuples of texts. Other tuples hold the fields of a batch, or a shape.
    if type(value) is tuple:
        return bool(value) and all(isinstance(item, str | bytes) for item in value)
    return isinstance(value, list) and not any(map(_has_rows, flatten(value)[0]))


def _take(data: Tree, num_rows: int, rows: Rows) -> Tree:
    """Return the rows of a rank, of a batch with `num_rows`; views where nothing repeats."""

    # One rule for every container and every depth. A list of another length may contain columns.
    def is_leaf(value: Tree) -> bool:
        if isinstance(value, list | tuple):
            return len(value) == num_rows and _is_column(value)
        # A TensorDict indexes all of its tensors at once, and keeps its batch size.
        return is_tensordict(value) and _has_rows(value)

    leaves, rebuild = flatten(data, is_leaf=is_leaf)
    divided: list[Tree] = []
    for leaf in leaves:
        value = leaf
        if isinstance(leaf, list | tuple):
            _check_column(leaf, num_rows)
            value = _rows_of_leaf(leaf, rows)
        elif _has_rows(leaf):
            value = _rows_of_leaf(leaf, rows)
        divided.append(value)
    return rebuild(divided)


def _check_column(column: Sequence[Tree], num_rows: int) -> None:
    """Raise for a list of as many lists as each has items: its rows may be either."""
    # With one row, both are equal.
    if num_rows == 1:
        return
    if all(_is_column(item) and len(item) == num_rows for item in column):
        raise DataError(
            "`split_batches` divides lists with one item per row; in a square of lists the rows "
            "may be the lists or their items",
            got=f"{num_rows} lists of {num_rows} items in a batch of {num_rows} rows",
            fix='name the lists in a dict, such as `{"question": [...], "answer": [...]}`, or pass '
            "`numpy.array(rows, dtype=object)`",
        )


def _rows_of_leaf(leaf: Tree, rows: Rows) -> Tree:
    valid = leaf[rows.begin : rows.begin + rows.num_valid]
    # A view, without a copy, in all batches that the ranks divide.
    if not rows.num_repeats:
        return valid
    repeats = leaf[rows.repeat : rows.repeat + rows.num_repeats]
    if isinstance(leaf, list | tuple):
        return valid + repeats
    if isinstance(leaf, np.ndarray):
        return np.concatenate([valid, repeats])
    return torch.cat([valid, repeats])
