"""`shard`: this rank's batches of a loader, from any position of any epoch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TypeVar

import attrs
import torch

from faccel.checks import instance_of
from faccel.context import DistContext
from faccel.data.batch import Batch, Source
from faccel.data.order import Cursor, Order, check_tail
from faccel.data.ordered_source import OrderedSource
from faccel.data.select_source import select_source
from faccel.data.shard_checks import check_same_dataset, order_seed
from faccel.device_table import is_host
from faccel.effects import AMBIENT, COLLECTIVE, effectful
from faccel.errors import DataError
from faccel.lifetime import Lifetime, WaitTimes
from faccel.tree import Tree, to_device

T = TypeVar("T")


def _unchanged(data: Tree) -> Tree:
    return data


@attrs.frozen(eq=False)
class ShardedLoader:
    """This rank's batches of a loader; `shard` returns it.

    `.at`, `.resume` and `.epochs` return new records in constant time. A plain `for` yields the
    data of each batch, repeats included. `faccel.batches` yields `Batch` records, which count the
    rows that are not repeats.

    Args:
        loader: The user's loader.
        ctx: The world over which it is split.
        source: Finds and reads this rank's batches.
        epoch: The epoch; None for a shuffled loader before `.at`.
        start: Samples of the epoch before this record (batches, if the loader yields whole ones).
        state: The dataset's own state at `start`, if it has one.
    """

    loader: Iterable[Tree] = attrs.field(repr=False)
    ctx: DistContext = attrs.field(repr=False)
    source: Source
    epoch: int | None
    start: int = 0
    state: Tree = attrs.field(default=None, repr=False)
    _to_device: Callable[[Tree], Tree] = attrs.field(
        default=_unchanged, repr=False, alias="to_device"
    )

    @property
    def dataset(self) -> Tree:
        """The user's dataset, with the samples of all ranks."""
        return getattr(self.loader, "dataset", self.loader)

    @property
    def order(self) -> Order:
        """The global order of this record's epoch, if faccel computes it.

        Raises:
            DataError: The loader has a custom sampler, or reads a stream.
        """
        if isinstance(self.source, OrderedSource):
            return self.source.order(self._known_epoch)
        raise DataError(
            f"`order` is unknown for {self.source.name}",
            got=f"a {type(self.source).__name__}",
            fix="iterate over the loader, or use one without a custom sampler",
        )

    @property
    def cursor(self) -> Cursor:
        """The position of this record."""
        return Cursor(self._known_epoch, self.start, self.state, self.source.name)

    @property
    def _known_epoch(self) -> int:
        # No default of 0: a loop that forgets `.at(epoch)` would read the same order each epoch.
        if self.epoch is None:
            raise DataError(
                "`loader` is shuffled and has no epoch yet, so its order is unknown",
                got="a `ShardedLoader` that `shard` returned",
                fix="write `for batch in loader.at(epoch)` or "
                "`for epoch, part in loader.epochs(num_epochs)`",
            )
        return self.epoch

    def at(self, epoch: int, step: int = 0) -> ShardedLoader:
        """Return the same loader in `epoch`, after its first `step` steps."""
        return self.resume(Cursor(epoch, self.source.start_of(epoch, step)))

    def resume(self, cursor: Cursor) -> ShardedLoader:
        """Return the same loader at `cursor`, which may come from another world size.

        Raises:
            DataError: It is not a cursor, or a position in an epoch of another order.
        """
        _check_cursor(cursor, self.source.name)
        # `evolve` shares the source, and with it persistent workers, between all records.
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
            yield epoch, self.resume(cursor)
            # Only the first epoch begins in the middle.
            cursor = Cursor(epoch + 1)

    def __len__(self) -> int:
        """Return the number of batches from this record on. Raises TypeError if it is unknown."""
        return self.source.num_steps(self.epoch or 0, self.start)

    def __iter__(self) -> Iterator[Tree]:
        """Yield the data of each batch, on the device of the context."""
        move = self._to_device
        return self._marked(move(data) for _, data in self.source.read(self.cursor))

    def _batches(self, cursor: Cursor) -> Iterator[Batch]:
        name, move = self.source.name, self._to_device
        for info, data in self.source.read(cursor):
            after = info.cursor(cursor.epoch, name)
            yield Batch(move(data), info.num_valid, info.step, info.is_last, after)

    def _marked(self, batches: Iterator[Tree]) -> Iterator[Tree]:
        """Yield `batches`; while the tail is uneven, `scaled_backward` raises outside of `join`.

        With a meter, the time of each `next` is counted.
        """
        # Asked once per iteration: without a meter a step costs nothing more.
        waits = self.ctx.lifetime.waits
        if waits is not None:
            batches = _timed(batches, waits)
        if self.ctx.lifetime.has_spans:
            batches = _spanned(batches, self.ctx.lifetime)
        # Training on an uneven tail would hang: ranks with more batches wait for gradients of the
        # other ranks, which never come. A single rank waits for none.
        if self.source.tail != "uneven" or self.ctx.data_world_size == 1:
            return batches
        return _while_uneven(batches, self.ctx)


def _check_cursor(cursor: Cursor, name: str) -> None:
    fix = (
        "pass `batch.cursor`, `window.cursor` or `faccel.Cursor(epoch)`, "
        "or write `loader.at(epoch, step)`"
    )
    instance_of("cursor", cursor, Cursor, fix=fix, error=DataError)
    # The start of an epoch is a position in every order. A cursor without a name, such as one that
    # the user wrote, is not compared.
    if cursor.samples_consumed and cursor.of is not None and _current_name(cursor.of) != name:
        raise DataError(
            "`cursor` is a position in another order, so it would repeat and leave out samples",
            got=f"a position in {cursor.of}, for {name}",
            fix="resume with the dataset, the seed and the shuffling that it was taken from, or "
            "start the epoch again with `loader.at(cursor.epoch)`",
        )


def _current_name(name: str) -> str:
    """Return today's name of an order: cursors of earlier versions have another one."""
    return name.replace(" of an own sampler", " of a custom sampler")


def _while_uneven(batches: Iterator[Tree], ctx: DistContext) -> Iterator[Tree]:
    # A generator, so that the mark is set at the first batch and removed at the end or a `break`.
    with ctx.lifetime.uneven_iteration():
        yield from batches


def _spanned(batches: Iterator[T], lifetime: Lifetime) -> Generator[T]:
    """Yield `batches`, and name each `next` in the profile, as long as it is open."""
    with closing(batches):  # pyright: ignore[reportArgumentType]
        while True:
            try:
                with lifetime.span("data"):
                    batch = next(batches)
            except StopIteration:
                return
            yield batch


def _timed(batches: Iterator[T], waits: WaitTimes) -> Generator[T]:
    """Yield `batches`, and count the time of each `next` in `waits`."""
    clock = waits.clock
    # `closing`, because the readers below end worker processes when they are closed.
    with closing(batches):  # pyright: ignore[reportArgumentType]
        while True:
            start_s = clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                waits.data_s += clock() - start_s
            waits.num_batches += 1
            yield batch


@effectful(AMBIENT)
def batches(loader: ShardedLoader) -> Iterator[Batch]:
    """Yield this rank's batches with their step, number of valid rows and cursor.

    Effects: ambient. Reads the dataset, in the loader's workers if it has any.

    Args:
        loader: From `shard`; a shuffled one needs an epoch: `loader.at(epoch)`.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from faccel.testing import fake_context
        >>> loader = shard(DataLoader(range(5), batch_size=2), fake_context(1, 2))
        >>> [(b.data.tolist(), b.num_valid) for b in batches(loader)]
        [([2, 3], 2), ([0], 0)]
    """
    fix = "write `faccel.batches(faccel.shard(loader, ctx).at(epoch))`"
    instance_of("loader", loader, ShardedLoader, fix=fix, error=DataError)
    records = loader._batches(loader.cursor)  # pyright: ignore[reportPrivateUsage]
    return loader._marked(records)  # pyright: ignore[reportPrivateUsage]


@effectful(COLLECTIVE)
def shard(
    loader: Iterable[Tree],
    ctx: DistContext,
    *,
    tail: str = "pad",
    mode: str = "auto",
    seed: int | None = None,
    split_batches: bool = False,
    device_placement: bool | None = None,
    non_blocking: bool = True,
) -> ShardedLoader:
    """Split `loader` over the ranks: return this rank's batches.

    Effects: collective. It communicates only if the loader or its sampler has a `generator`, with
    `mode="local"` and in debug mode.

    A `DataLoader` over a map-style dataset is read in an order that depends on `(seed, epoch)`
    alone, from any position at once. A custom `sampler` or `batch_sampler` is kept: step `s` of
    rank `r` is its batch `s * W + r`. The same holds for an `IterableDataset` and for any iterable
    of batches.

    A resume of these reads from the beginning, unless the dataset has `state_dict` and
    `load_state_dict`. (A shuffle buffer of the `datasets` library is not in its state: such a
    stream is read from the beginning, too.)

    Args:
        loader: A `DataLoader`, whose workers, `collate_fn`, pinning and prefetching are kept, or
            any iterable of batches.
        ctx: The world. Ranks of one model replica (tensor and pipeline parallel) read the same.
        tail: For a last step with fewer samples than a global batch, whose rows are divided evenly
            over the ranks. `"pad"`: fewer than `W` samples repeat from the start of the order, so
            that every rank has equally many rows; one process repeats none. `"full"`: samples
            repeat until every batch is full, for static shapes. `"drop"`: no such step (as with the
            loader's own `drop_last=True`). `"uneven"`: no repeats; ranks differ by one row, or some
            have no last batch, which is for evaluation.
        mode: For streams. `"split"`: every rank iterates the whole stream and keeps its batches; it
            must be the same stream on every rank. `"dispatch"`: rank 0 iterates it and sends each
            rank its samples, which must be picklable; reading is collective. `"shards"`: each rank
            reads only its own files, of a dataset with `num_shards` and `.shard(num_shards=,
            index=)`, as in the `datasets` library; reading is collective (one small gather per
            batch), and a cursor resumes on as many ranks. `"local"`: the loader of each rank has
            data that is split already, of any kind; reading is collective (one exchange of lengths
            per epoch, or one small gather per batch of a stream). `"auto"` is `"local"` for a
            stream of `datasets.distributed.split_dataset_by_node`, else `"split"`.
        seed: Seed of the order. None takes the `initial_seed` of rank 0's `generator` of the loader
            or its sampler, and without one the configuration's.
        split_batches: Whether the loader's batch size counts the samples of all ranks together. Of
            ready-made batches (an iterable, or `batch_size=None`) each rank takes its rows then.
        device_placement: Whether to move batches to `ctx.device`; None takes the configuration's.
        non_blocking: Whether the move may overlap with computation.

    Returns:
        A record; iterating over it reads data.

    Raises:
        DataError: The loader cannot be split, the ranks do not divide its batch size, or `tail` or
            `mode` is unknown.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from faccel.testing import fake_context
        >>> loader = shard(DataLoader(range(10), batch_size=2), fake_context(0, 2))
        >>> len(loader), [x.tolist() for x in loader]
        (3, [[0, 1], [4, 5], [8]])
    """
    check_tail(tail)
    instance_of("ctx", ctx, DistContext, fix="write `faccel.shard(loader, ctx)`")
    if isinstance(loader, ShardedLoader):
        raise DataError(
            "`loader` is sharded already",
            got="a loader that `faccel.shard` returned",
            fix="call `faccel.shard(loader, ctx)` once, with the original `DataLoader`",
        )
    if seed is None:
        seed = order_seed(loader, ctx)
    if device_placement is None:
        device_placement = ctx.config.device_placement
    source, has_one_order = select_source(
        loader, ctx, tail=tail, mode=mode, seed=seed, split_batches=split_batches
    )
    if ctx.config.debug and ctx.data_world_size > 1 and _reads_one_dataset(source):
        check_same_dataset(loader, ctx, has_own_order=isinstance(source, OrderedSource))
    move = _unchanged
    if device_placement and not is_host(ctx.device):  # loaders return CPU tensors
        move = _mover(ctx.device, non_blocking=non_blocking)
    ctx.lifetime.add_loader()
    return ShardedLoader(
        loader=loader,
        ctx=ctx,
        source=source,
        epoch=0 if has_one_order else None,
        to_device=move,
    )


def _reads_one_dataset(source: Source) -> bool:
    from faccel.data.local_source import LocalSource

    return not isinstance(source, LocalSource)


def _mover(device: torch.device, *, non_blocking: bool) -> Callable[[Tree], Tree]:
    def move(data: Tree) -> Tree:
        # In place where it has a method for it, as a `BatchEncoding`: the loader has just made it.
        if hasattr(data, "to"):
            return data.to(device, non_blocking=non_blocking)
        return to_device(data, device, non_blocking=non_blocking)

    return move
