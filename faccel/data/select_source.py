"""Which source reads a loader."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import TYPE_CHECKING

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.data.distributed import DistributedSampler

from faccel.checks import one_of, shown
from faccel.context import DistContext
from faccel.data.batch import Source
from faccel.data.fetch import Reader
from faccel.data.ordered_source import OrderedSource
from faccel.errors import DataError
from faccel.tree import Tree

if TYPE_CHECKING:
    from faccel.data.rank_stream import RankStreamSource

# The other sources are imported in functions: most loaders are read in faccel's own order, and
# importing the rest would double the time of importing `shard`.

MODES = ("auto", "dispatch", "local", "shards", "split")


def select_source(
    loader: Iterable[Tree],
    ctx: DistContext,
    *,
    tail: str,
    mode: str,
    seed: int,
    split_batches: bool,
) -> tuple[Source, bool]:
    """Return the source of a loader, and whether it needs no epoch because all epochs are the same.

    Effects: collective with `mode="local"`, else pure.

    Raises:
        DataError: No source reads it.
    """
    mode = _checked_mode(loader, mode, ctx)
    world_size = ctx.data_world_size
    if mode == "local" and world_size > 1:
        return _local(loader, ctx, tail, seed, split_batches=split_batches)
    is_dispatched = mode == "dispatch"
    if mode == "shards":
        return _file_shards(loader, ctx, tail, seed, split_batches=split_batches), True
    if split_batches and _yields_batches(loader):
        return _divided(loader, ctx, tail, seed, dispatch=is_dispatched)
    if not isinstance(loader, DataLoader):
        # Any iterable yields whole batches, so a unit of the plan is a batch: size 1.
        return _stream(loader, ctx, 1, tail, seed, dispatch=is_dispatched), True
    tail, size = _tail_and_size(loader, world_size, tail, split_batches=split_batches)
    if isinstance(loader.dataset, IterableDataset):
        return _stream(loader, ctx, size or 1, tail, seed, dispatch=is_dispatched), True
    if is_dispatched:
        raise _not_dispatched(loader)
    return _map_style(loader, ctx, tail, size, seed, split_batches=split_batches)


def _not_dispatched(loader: DataLoader[Tree]) -> DataError:
    # Every rank can read any index of a map-style dataset, so sending samples has no purpose.
    return DataError(
        '`mode="dispatch"` expects an iterable of batches, or a loader of an `IterableDataset`',
        got=f"a map-style {type(loader.dataset).__name__}",
        fix="leave `mode` out",
    )


def _yields_batches(loader: Iterable[Tree]) -> bool:
    """Return whether the loader yields ready-made batches, whose size it does not determine."""
    if not isinstance(loader, DataLoader):
        return True
    # A batch sampler yields lists of indices, which are divided before they are read.
    return loader.batch_size is None and own_batch_sampler(loader) is None


def _divided(
    loader: Iterable[Tree], ctx: DistContext, tail: str, seed: int, *, dispatch: bool
) -> tuple[Source, bool]:
    """Return the source of ready-made batches that are divided over the ranks by rows."""
    from faccel.data.divided_source import DividedSource

    # As in `_tail_and_size`: the loader's own setting is stronger.
    if isinstance(loader, DataLoader) and loader.drop_last:
        tail = "drop"
    # The size of a full batch is unknown at a resume, before the first batch is read again.
    if tail == "full":
        raise DataError(
            '`tail` must be "pad", "drop" or "uneven" with `split_batches` of ready-made batches',
            got='tail="full", and batches of unknown sizes',
            fix='write `tail="pad"`: ranks have equally many rows',
        )
    # Every rank reads every batch, as a world of one rank does.
    base: Source = _stream(loader, ctx, 1, "pad", seed, dispatch=False, world_size=1)
    has_one_order = True
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        if dispatch:
            raise _not_dispatched(loader)
        base, has_one_order = _samples(loader, loader.sampler, 0, 1, "pad", None, seed)
    dispatch = dispatch and ctx.data_world_size > 1
    return DividedSource(base, ctx, tail, dispatch), has_one_order


def _stream(
    loader: Iterable[Tree],
    ctx: DistContext,
    size: int,
    tail: str,
    seed: int,
    *,
    dispatch: bool,
    world_size: int | None = None,
) -> Source:
    from faccel.data.stream_plan import StreamPlan
    from faccel.data.stream_sources import StreamSource

    if world_size is None:
        world_size = ctx.data_world_size
    return StreamSource(loader, ctx, StreamPlan(size, world_size, tail), seed, dispatch)


def _map_style(
    loader: DataLoader[Tree],
    ctx: DistContext,
    tail: str,
    size: int | None,
    seed: int,
    *,
    split_batches: bool,
) -> tuple[Source, bool]:
    rank, world_size = ctx.data_rank, ctx.data_world_size
    sampler = loader.sampler
    if size is not None and is_own_order(sampler):
        reader = Reader(loader, seed, is_single=False)
        assert isinstance(loader.dataset, Sized)
        shuffle = type(sampler) is RandomSampler
        source = OrderedSource(
            loader.dataset, size, rank, world_size, tail, seed, shuffle, reader=reader
        )
        return source, not shuffle
    from faccel.data.sampler_source import SamplerSource
    from faccel.data.stream_plan import StreamPlan

    batch_sampler = own_batch_sampler(loader)
    if batch_sampler is not None:
        reader = Reader(loader, seed, is_single=False)
        # A unit is a list of indices; the cursor counts its samples.
        plan = StreamPlan(1, world_size, tail, count=len)
        source = SamplerSource(batch_sampler, plan, rank, seed, reader, True, split_batches)
        return source, _has_one_order(batch_sampler)
    return _samples(loader, sampler, rank, world_size, tail, size, seed)


def _samples(
    loader: DataLoader[Tree],
    sampler: Iterable[Tree],
    rank: int,
    world_size: int,
    tail: str,
    size: int | None,
    seed: int,
) -> tuple[Source, bool]:
    from faccel.data.sampler_source import SamplerSource
    from faccel.data.stream_plan import StreamPlan

    reader = Reader(loader, seed, is_single=size is None)
    plan = StreamPlan(size or 1, world_size, tail)
    return SamplerSource(sampler, plan, rank, seed, reader, False), _has_one_order(sampler)


def own_batch_sampler(loader: DataLoader[Tree]) -> Iterable[Tree] | None:
    """Return the batch sampler that the user passed, None if the loader has another one or none."""
    # `DataLoader` sets `batch_size` to None for a batch sampler of the user. If the user passes
    # `batch_size=None` there is no batch sampler either, and each item of the dataset is a batch.
    if loader.batch_size is None:
        return loader.batch_sampler
    return None


def _has_one_order(sampler: object) -> bool:
    """Return whether the order is the same in all epochs, so that it needs no epoch."""
    if type(sampler) is BatchSampler:
        sampler = sampler.sampler
    # Exact classes: a subclass may read the epoch or draw. A list yields the same in each epoch.
    return type(sampler) in (SequentialSampler, list, tuple, range)


def _file_shards(
    loader: Iterable[Tree], ctx: DistContext, tail: str, seed: int, *, split_batches: bool
) -> RankStreamSource:
    dataset = getattr(loader, "dataset", loader)
    got = ""
    if not isinstance(dataset, IterableDataset):
        got = f"a {type(dataset).__name__}"
    elif not isinstance(loader, DataLoader):
        got = f"a {type(loader).__name__}"
    elif loader.batch_size is None:
        got = "a loader without a `batch_size`"
    if got or not isinstance(loader, DataLoader):
        raise DataError(
            '`mode="shards"` expects a `DataLoader` with a `batch_size` over an `IterableDataset`',
            got=got,
            fix='pass a `DataLoader(stream, batch_size=...)`, or write `mode="split"`',
        )
    world_size = ctx.data_world_size
    # Fewer shards than ranks would leave a rank without data.
    num_shards = 0
    if callable(getattr(dataset, "shard", None)):
        num_shards = getattr(dataset, "num_shards", 0)
    if num_shards < world_size:
        kind = type(dataset).__name__
        raise DataError(
            '`mode="shards"` needs at least one shard of the dataset per rank',
            got=f"{num_shards} shards of a {kind}, for {world_size} ranks that read data",
            fix='write `mode="split"`, or split the data into more files',
        )
    tail, size = _tail_and_size(loader, world_size, tail, split_batches=split_batches)
    if tail == "uneven":
        raise _uneven_stream_error("shards")
    assert size is not None
    from faccel.data.rank_stream import RankStreamSource

    return RankStreamSource(loader, ctx, size, tail, seed, is_local=False)


def _local(
    loader: Iterable[Tree], ctx: DistContext, tail: str, seed: int, *, split_batches: bool
) -> tuple[Source, bool]:
    """Return the source for data that is split already, and whether it needs no epoch."""
    size: int | None = None
    if isinstance(loader, DataLoader):
        tail, size = _tail_and_size(loader, ctx.data_world_size, tail, split_batches=split_batches)
    if size is None and split_batches:
        raise _no_batch_size()
    if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
        return _local_map_style(loader, ctx, tail, size, seed)
    if tail == "uneven":
        raise _uneven_stream_error("local")
    from faccel.data.rank_stream import RankStreamSource

    return RankStreamSource(loader, ctx, size or 1, tail, seed, is_local=True), True


def _local_map_style(
    loader: DataLoader[Tree], ctx: DistContext, tail: str, size: int | None, seed: int
) -> tuple[Source, bool]:
    from faccel.data.local_source import LocalSource, exchange_counts

    assert isinstance(loader.dataset, Sized)
    has_own_order = size is not None and is_own_order(loader.sampler)
    batch_sampler = own_batch_sampler(loader)
    sampler: Iterable[Tree] | None = batch_sampler
    if sampler is None:
        sampler = loader.sampler
    if not isinstance(sampler, Sized):
        raise DataError(
            '`mode="local"` needs a sampler with a length',
            got=f"a {type(sampler).__name__} without `__len__`",
            fix="give the sampler a `__len__`, or pass an `IterableDataset`",
        )
    # The lengths of the other ranks, for `len(loader)`.
    counts = exchange_counts(len(sampler), ctx)
    source = LocalSource(
        dataset=loader.dataset,
        sampler=None if has_own_order else sampler,
        shuffle=type(loader.sampler) is RandomSampler,
        ctx=ctx,
        batch_size=size or 1,
        tail=tail,
        seed=seed,
        reader=Reader(loader, seed, is_single=size is None and batch_sampler is None),
        is_batch_sampler=batch_sampler is not None,
        last_counts=[counts],
    )
    return source, _has_one_order(sampler)


def is_own_order(sampler: object) -> bool:
    """Return whether faccel computes this order: that of the dataset, or a shuffle of all of it."""
    # Exact classes: a subclass may yield another order.
    if type(sampler) is SequentialSampler:
        return True
    if type(sampler) is not RandomSampler or sampler.replacement:
        return False
    return sampler.num_samples == len(sampler.data_source)


def _tail_and_size(
    loader: DataLoader[Tree], world_size: int, tail: str, *, split_batches: bool
) -> tuple[str, int | None]:
    """Return the tail and the batch size per rank; None for a loader without a batch size."""
    # `drop_last=True` of the loader has priority over `tail`, whose default is "pad".
    if loader.drop_last:
        tail = "drop"
    size = loader.batch_size
    if not split_batches:
        return tail, size
    if size is None:
        return tail, None  # each list of a batch sampler is divided when it is read
    if size % world_size:
        # Rounded up to a multiple of the number of ranks.
        nearest_size = -(-size // world_size) * world_size
        raise DataError(
            "`split_batches` needs a batch size that the number of ranks divides",
            got=f"a batch size of {size} for {world_size} ranks",
            fix=f"write `DataLoader(dataset, batch_size={nearest_size})`",
        )
    return tail, size // world_size


def _no_batch_size() -> DataError:
    return DataError(
        "`split_batches` divides the loader's batch size, and this loader has none",
        got="a loader that yields its own batches",
        fix="pass a `batch_size` to the loader, or leave `split_batches` out",
    )


def _uneven_stream_error(mode: str) -> DataError:
    # The ranks exchange their progress before each step, so all must take part in it.
    return DataError(
        f'`tail` must be "pad", "full" or "drop" for a stream with `mode="{mode}"`',
        got='tail="uneven"',
        fix='write `tail="pad"`; `batch.num_valid` counts the rows without repeats',
    )


def _checked_mode(loader: Iterable[Tree], mode: str, ctx: DistContext) -> str:
    """Return the mode of a loader, "local" where its library has split it."""
    one_of("mode", mode, MODES, DataError)
    if not isinstance(loader, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(
            "`loader` must be a `DataLoader` or an iterable of batches",
            got=shown(loader),
            fix="write `faccel.shard(DataLoader(dataset, batch_size=32), ctx)`",
        )
    if mode != "local":
        _check_no_distributed_sampler(loader)
    # `split_dataset_by_node` of the `datasets` library stores the rank in a stream, for which there
    # is no public name. A table of it has no mark: it is shorter only.
    split: Tree = getattr(getattr(loader, "dataset", loader), "_distributed", None)
    if not hasattr(split, "world_size"):
        return mode
    if (split.rank, split.world_size) != (ctx.data_rank, ctx.data_world_size):
        raise DataError(
            "the dataset of `loader` is split for another rank or another number of ranks",
            got=f"rank {split.rank} of {split.world_size}, on data rank {ctx.data_rank} of "
            f"{ctx.data_world_size}",
            fix="write `split_dataset_by_node(dataset, ctx.data_rank, ctx.data_world_size)`, or "
            "pass the dataset before it is split",
        )
    if mode not in ("auto", "local"):
        raise DataError(
            '`mode` must be "local": the dataset of `loader` is split by node already',
            got=f'mode="{mode}"',
            fix='write `mode="local"`, or pass the dataset before `split_dataset_by_node`',
        )
    return "local"


def _check_no_distributed_sampler(loader: Iterable[Tree]) -> None:
    # A DistributedSampler yields one rank's indices; splitting those again would lose samples. It
    # may also be inside a batch sampler of the user.
    batch_sampler = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            raise DataError(
                "`loader` must not have a DistributedSampler: `shard` splits the data over ranks",
                got="a loader with a DistributedSampler",
                fix="leave the sampler out and write `shuffle=True` or `shuffle=False`, or write "
                '`mode="local"` to keep it',
            )
