"""`shard`: this rank's share of a `DataLoader`, at any place of any epoch in constant time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from faccel.context import DistContext
from faccel.data.fetch import Reader
from faccel.data.order import Cursor, Order, ShardPlan, check_tail
from faccel.effects import AMBIENT, effectful
from faccel.errors import DataError
from faccel.tree import Tree, map_leaves


@attrs.frozen(eq=False)
class Batch:
    """One rank's batch of one step.

    Args:
        data: What the loader's `collate_fn` made, on the device of the context.
        num_valid: Rows that are not repeats, `0 <= num_valid <= rows`: the first ones.
        step: Number of the batch in its epoch.
        is_last: Whether it is this rank's last one of the epoch.
        cursor: The place after it: what to save in order to go on behind it.
    """

    data: Tree
    num_valid: int
    step: int
    is_last: bool
    cursor: Cursor


@attrs.frozen(eq=False)
class ShardedLoader:
    """This rank's share of a `DataLoader`; made by `shard`.

    `.at`, `.resume` and `.epochs` give new records in constant time. A plain `for` yields the data of each batch,
    repeats included; `faccel.batches` yields `Batch` records that tell them apart.

    Args:
        loader: The user's.
        ctx: The world it is shared among.
        plan: How this rank reads an epoch.
        seed: Of the order.
        shuffle: Whether the order is shuffled.
        epoch: The epoch this record stands in; None until it is placed.
        start: Samples of the epoch's order that come before it.
    """

    loader: DataLoader[Any] = attrs.field(repr=False)
    ctx: DistContext = attrs.field(repr=False)
    plan: ShardPlan
    seed: int
    shuffle: bool
    epoch: int | None
    start: int
    _place: Callable[[Any], Any] | None = attrs.field(repr=False, alias="place")
    _reader: Reader = attrs.field(repr=False, alias="reader")

    @property
    def dataset(self) -> Any:
        """The user's data set, whole."""
        return self.loader.dataset

    @property
    def order(self) -> Order:
        """The global order of this record's epoch."""
        return Order(self.plan.num_samples, self.seed, self._epoch, self.shuffle)

    @property
    def cursor(self) -> Cursor:
        """Where this record starts."""
        return Cursor(self._epoch, self.start)

    @property
    def _epoch(self) -> int:
        if self.epoch is None:
            raise DataError(
                "a shuffled loader has another order in every epoch, and this one is in none",
                saw="a loader straight from `shard`",
                fix="write `for batch in loader.at(epoch)` or `for epoch, part in loader.epochs(num_epochs)`",
            )
        return self.epoch

    def at(self, epoch: int, step: int = 0) -> ShardedLoader:
        """Return the same loader in `epoch`, behind its first `step` steps."""
        return self.resume(Cursor(epoch, step * self.plan.global_batch_size))

    def resume(self, cursor: Cursor) -> ShardedLoader:
        """Return the same loader at `cursor`, which may come from another world size.

        Raises:
            DataError: The cursor lies behind the end of this data set.
        """
        if cursor.samples_consumed > max(self.plan.num_samples, 0):
            raise DataError(
                f"the cursor lies behind the end of a data set of {self.plan.num_samples} samples",
                saw=str(cursor),
                fix="resume with the data set that the cursor was taken from",
            )
        return attrs.evolve(self, epoch=cursor.epoch, start=cursor.samples_consumed)

    def epochs(self, stop: int, *, start: Cursor | None = None) -> Iterator[tuple[int, ShardedLoader]]:
        """Yield `(epoch, loader)` up to epoch `stop`, the first one from `start` on."""
        cursor = Cursor() if start is None else start
        for epoch in range(cursor.epoch, stop):
            yield epoch, self.resume(cursor if epoch == cursor.epoch else Cursor(epoch))

    def __len__(self) -> int:
        """Return how many batches this rank reads from this record."""
        return self.plan.num_steps(self.start)

    def __iter__(self) -> Iterator[Tree]:
        epoch = self._epoch
        token = object()
        if self.plan.tail == "uneven" and self.plan.world_size > 1:
            self.ctx.uneven_iterations.append(token)
        try:
            rows = self.plan.batches(self.order, self.start)
            data = self._reader.read(rows, epoch, self.start)
            yield from data if self._place is None else map(self._place, data)
        finally:
            if token in self.ctx.uneven_iterations:
                self.ctx.uneven_iterations.remove(token)


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
    plan, epoch, start = loader.plan, loader.cursor.epoch, loader.start
    num_steps, first = len(loader), start // plan.global_batch_size
    for step, data in enumerate(loader):
        yield Batch(
            data, plan.num_valid(start, step), first + step, step + 1 == num_steps, plan.cursor(epoch, start, step)
        )


def shard(
    loader: DataLoader[Any],
    ctx: DistContext,
    *,
    tail: str = "pad",
    seed: int | None = None,
    split_batches: bool = False,
    device_placement: bool | None = None,
    non_blocking: bool = True,
) -> ShardedLoader:
    """Return this rank's share of `loader`.

    Effects: pure.

    Args:
        loader: A `DataLoader` over a map-style data set. Its workers, `collate_fn`, pinning and prefetching are kept;
            `shuffle=True` becomes an order that is a function of `(seed, epoch)` alone.
        ctx: The world. Ranks that share data (tensor and pipeline parallel) read the same.
        tail: `"pad"`: the last step wraps around to the start of the order, so that every rank takes equally many full
            steps. `"drop"`: no partial step (as with the loader's own `drop_last=True`). `"uneven"`: no repeats;
            ranks may differ in the last step, so it is for evaluation.
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
    _check_loader(loader)
    batch_size: int = loader.batch_size or 1
    if split_batches:
        if batch_size % ctx.data_world_size:
            raise DataError(
                "`split_batches` divides the loader's batch size among the ranks",
                saw=f"a batch size of {batch_size} for {ctx.data_world_size} ranks",
                fix=f"use a batch size of {-(-batch_size // ctx.data_world_size) * ctx.data_world_size}",
            )
        batch_size //= ctx.data_world_size
    shuffle = isinstance(loader.sampler, RandomSampler)
    place = ctx.config.device_placement if device_placement is None else device_placement
    order_seed = ctx.config.seed if seed is None else seed
    return ShardedLoader(
        loader=loader,
        ctx=ctx,
        plan=ShardPlan(
            num_samples=len(loader.dataset),  # type: ignore[arg-type]
            batch_size=batch_size,
            rank=ctx.data_rank,
            world_size=ctx.data_world_size,
            tail="drop" if loader.drop_last else tail,
        ),
        seed=order_seed,
        shuffle=shuffle,
        epoch=None if shuffle else 0,
        start=0,
        place=_placer(ctx.device, non_blocking) if place else None,
        reader=Reader(loader, order_seed),
    )


def _placer(device: torch.device, non_blocking: bool) -> Callable[[Any], Any] | None:  # noqa: FBT001
    if device.type == "cpu":
        return None  # loaders make CPU tensors: nothing to move, nothing to walk

    def move(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=non_blocking) if hasattr(leaf, "to") else leaf

    return lambda data: move(data) if hasattr(data, "to") else map_leaves(move, data)


def _check_loader(loader: Any) -> None:
    if not isinstance(loader, DataLoader):
        raise DataError(
            "`shard` takes a torch `DataLoader`",
            saw=f"a {type(loader).__name__}",
            fix="write `faccel.shard(DataLoader(dataset, batch_size=32), ctx)`",
        )
    sampler: Any = loader.sampler
    if isinstance(sampler, DistributedSampler):
        raise DataError(
            "`shard` splits the data itself",
            saw="a loader with a DistributedSampler",
            fix="leave the sampler out and write `shuffle=True` or `shuffle=False`",
        )
    if isinstance(loader.dataset, IterableDataset):
        raise DataError(
            "`shard` needs a data set with a length and an index for now",
            saw=f"the IterableDataset {type(loader.dataset).__name__}",
            fix="give it `__len__` and `__getitem__`",
        )
    is_plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    )
    if not is_plain or type(loader.batch_sampler) is not BatchSampler:
        own = loader.batch_sampler if is_plain else sampler
        raise DataError(
            "`shard` makes the order itself for now",
            saw=f"a loader with its own {type(own).__name__}, batch_size={loader.batch_size}",
            fix="use `batch_size=` with `shuffle=True` or `shuffle=False`",
        )
