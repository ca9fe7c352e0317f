"""`shard`: this rank's share of a loader, at any place of any epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import torch

from faccel.context import DistContext
from faccel.data.order import Cursor, Order, check_tail
from faccel.data.select_source import pick_source
from faccel.data.source import Batch, OrderedSource, Source
from faccel.effects import AMBIENT, effectful
from faccel.errors import DataError
from faccel.tree import Tree, map_leaves


@attrs.frozen(eq=False)
class ShardedLoader:
    """This rank's share of a loader; made by `shard`.

    `.at`, `.resume` and `.epochs` give new records in constant time. A plain `for` yields the data of each batch,
    repeats included; `faccel.batches` yields `Batch` records that tell them apart.

    Args:
        loader: The user's.
        ctx: The world it is shared among.
        source: Where this rank's batches come from.
        epoch: The epoch this record stands in; None until it is placed.
        start: Samples of the epoch that come before it (batches, where the loader yields whole ones).
        state: The data set's own state at that place, where it has one.
    """

    loader: Iterable[Any] = attrs.field(repr=False)
    ctx: DistContext = attrs.field(repr=False)
    source: Source
    epoch: int | None
    start: int = 0
    state: Any = attrs.field(default=None, repr=False)
    _place: Callable[[Any], Any] | None = attrs.field(default=None, repr=False, alias="place")

    @property
    def dataset(self) -> Any:
        """The user's data set, whole."""
        return getattr(self.loader, "dataset", self.loader)

    @property
    def order(self) -> Order:
        """The global order of this record's epoch, where it is faccel's own."""
        if not isinstance(self.source, OrderedSource):
            raise DataError(
                "this loader has an order of its own",
                got=repr(self.source),
                fix="read it to see it",
            )
        return self.source.order(self._epoch)

    @property
    def cursor(self) -> Cursor:
        """Where this record starts."""
        return Cursor(self._epoch, self.start, self.state, self.source.name)

    @property
    def _epoch(self) -> int:
        if self.epoch is None:
            raise DataError(
                "a shuffled loader has another order in every epoch, and this one is in none",
                got="a loader straight from `shard`",
                fix="write `for batch in loader.at(epoch)` or `for epoch, part in loader.epochs(num_epochs)`",
            )
        return self.epoch

    def at(self, epoch: int, step: int = 0) -> ShardedLoader:
        """Return the same loader in `epoch`, behind its first `step` steps."""
        return self.resume(Cursor(epoch, self.source.start_of(step)))

    def resume(self, cursor: Cursor) -> ShardedLoader:
        """Return the same loader at `cursor`, which may come from another world size.

        Raises:
            DataError: It is no cursor, or a place inside the epoch of another order.
        """
        _check_cursor(cursor, self.source.name)
        return attrs.evolve(
            self, epoch=cursor.epoch, start=cursor.samples_consumed, state=cursor.state
        )

    def epochs(
        self, stop: int, *, start: Cursor | None = None
    ) -> Iterator[tuple[int, ShardedLoader]]:
        """Yield `(epoch, loader)` up to epoch `stop`, the first one from `start` on."""
        cursor = Cursor() if start is None else start
        _check_cursor(cursor, self.source.name)
        for epoch in range(cursor.epoch, stop):
            yield epoch, self.resume(cursor if epoch == cursor.epoch else Cursor(epoch))

    def __len__(self) -> int:
        """Return how many batches this rank reads from this record. Raises TypeError where nobody can know."""
        return self.source.num_steps(self.start)

    def __iter__(self) -> Iterator[Tree]:
        data = self.source.data(self.cursor)
        return self._guarded(data if self._place is None else map(self._place, data))

    def _guarded(self, items: Iterator[Any]) -> Iterator[Any]:
        """Yield `items`; while they come from an uneven tail, the context knows."""
        if self.source.tail != "uneven" or self.ctx.data_world_size == 1:
            return items
        return _while_uneven(items, self.ctx)


def _check_cursor(cursor: Any, name: str) -> None:
    if not isinstance(cursor, Cursor):
        raise DataError(
            "a place in the data is a cursor",
            got=repr(cursor),
            fix="pass `batch.cursor`, `window.cursor` or `faccel.Cursor(epoch)`, or write `loader.at(epoch, step)`",
        )
    if cursor.samples_consumed and cursor.of not in (None, name):
        raise DataError(
            "this cursor is a place inside the epoch of another order, so other samples would follow",
            got=f"a place in {cursor.of}, for {name}",
            fix="resume with the data set, the seed and the shuffling that it was taken from, or start an epoch anew "
            "with `loader.at(cursor.epoch)`",
        )


def _while_uneven(items: Iterator[Any], ctx: DistContext) -> Iterator[Any]:
    with ctx.lifetime.uneven_iteration():
        yield from items


@effectful(AMBIENT)
def batches(loader: ShardedLoader) -> Iterator[Batch]:
    """Yield this rank's batches with what is known about them.

    Effects: ambient. Reads the data set, in the loader's workers if it has any.

    Args:
        loader: From `shard`; a shuffled one placed in an epoch.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from faccel.testing import fake_context
        >>> loader = shard(DataLoader(range(5), batch_size=2), fake_context(1, 2))
        >>> [(b.data.tolist(), b.num_valid) for b in batches(loader)]
        [([2, 3], 2), ([1, 2], 0)]
    """
    if not isinstance(loader, ShardedLoader):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(
            "only a loader from `faccel.shard` knows what is padding",
            got=f"a {type(loader).__name__}",
            fix="write `faccel.shard(loader, ctx)` first",
        )
    place = loader._place  # pyright: ignore[reportPrivateUsage]
    read = loader.source.batches(loader.cursor)
    placed = read if place is None else (attrs.evolve(b, data=place(b.data)) for b in read)
    return loader._guarded(placed)  # pyright: ignore[reportPrivateUsage]


def shard(
    loader: Iterable[Any],
    ctx: DistContext,
    *,
    tail: str = "pad",
    mode: str = "auto",
    seed: int | None = None,
    split_batches: bool = False,
    device_placement: bool | None = None,
    non_blocking: bool = True,
) -> ShardedLoader:
    """Return this rank's share of `loader`.

    Effects: pure.

    A `DataLoader` over a map-style data set is read in an order that is a function of `(seed, epoch)` alone, at any
    place at once. One with its own `sampler` or `batch_sampler` is respected: step `s` of rank `r` is its batch
    `s * W + r`, and so it is for an `IterableDataset` and for any iterable of batches. Those are walked from their
    beginning when they are resumed, unless the data set has `state_dict` and `load_state_dict` (of the `datasets`
    library: without a shuffle buffer, which its state leaves out).

    Args:
        loader: A `DataLoader`, whose workers, `collate_fn`, pinning and prefetching are kept, or any iterable of
            batches.
        ctx: The world. Ranks that share data (tensor and pipeline parallel) read the same.
        tail: `"pad"`: the last step wraps around to the start of the order, so that every rank takes equally many full
            steps. `"drop"`: no partial step (as with the loader's own `drop_last=True`). `"uneven"`: no repeats;
            ranks may differ in the last step, so it is for evaluation.
        mode: For streams. `"split"`: every rank walks the whole stream and keeps its part (it must be the same stream
            on every rank). `"dispatch"`: rank 0 walks it and sends each rank its part, of any picklable samples; then
            reading is collective. `"shards"`: each rank reads files of its own alone, of a data set with `num_shards`
            and `.shard(num_shards=, index=)`, as those of the `datasets` library; reading is collective (one small
            gather a batch), and a cursor resumes on as many ranks. `"auto"` is `"split"`.
        seed: Of the order; None takes the configuration's.
        split_batches: Whether the loader's batch size is that of all ranks together.
        device_placement: Whether batches are moved to `ctx.device`; None takes the configuration's.
        non_blocking: Whether the move may overlap with computation.

    Returns:
        A record; iterating it reads data.

    Raises:
        DataError: A loader that cannot be shared so, a batch size that the ranks cannot divide, an unknown `tail`.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from faccel.testing import fake_context
        >>> part = shard(DataLoader(range(10), batch_size=2), fake_context(0, 2))
        >>> len(part), [x.tolist() for x in part]
        (3, [[0, 1], [4, 5], [8, 9]])
    """
    check_tail(tail)
    if isinstance(loader, ShardedLoader):
        raise DataError(
            "this loader is sharded already",
            got="what `faccel.shard` returned",
            fix="shard it once",
        )
    place = ctx.config.device_placement if device_placement is None else device_placement
    source, is_placed = pick_source(
        loader,
        ctx,
        tail=tail,
        mode=mode,
        seed=ctx.config.seed if seed is None else seed,
        split_batches=split_batches,
    )
    return ShardedLoader(
        loader=loader,
        ctx=ctx,
        source=source,
        epoch=0 if is_placed else None,
        place=_placer(ctx.device, non_blocking) if place else None,
    )


def _placer(device: torch.device, non_blocking: bool) -> Callable[[Any], Any] | None:  # noqa: FBT001
    if device.type == "cpu":
        return None  # loaders make CPU tensors: nothing to move, nothing to walk

    def move(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=non_blocking) if hasattr(leaf, "to") else leaf

    return lambda data: move(data) if hasattr(data, "to") else map_leaves(move, data)
