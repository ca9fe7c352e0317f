"""Which source reads a loader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from faccel.context import DistContext
from faccel.data.fetch import Reader
from faccel.data.order import ShardPlan
from faccel.data.rounds import Deal
from faccel.data.shards import ShardsSource
from faccel.data.source import OrderedSource, SampledSource, Source, StreamSource
from faccel.errors import DataError, nearest

MODES = ("auto", "dispatch", "shards", "split")


def pick_source(
    loader: Iterable[Any], ctx: DistContext, *, tail: str, mode: str, seed: int, split_batches: bool
) -> tuple[Source, bool]:
    """Return the source of a loader, and whether it stands in an epoch already, because every epoch is the same.

    Raises:
        DataError: No source reads it.
    """
    _check(loader, mode)
    world_size = ctx.data_world_size
    if mode == "shards":
        return _shards_source(loader, ctx, tail, seed, split_batches=split_batches), True
    if not isinstance(loader, DataLoader):
        _per_rank(None if split_batches else 1, 1)
        return StreamSource(loader, ctx, Deal(1, world_size, tail), seed, mode == "dispatch"), True
    tail = "drop" if loader.drop_last else tail
    size = _per_rank(loader.batch_size, world_size) if split_batches else loader.batch_size
    if isinstance(loader.dataset, IterableDataset):
        return StreamSource(
            loader, ctx, Deal(size or 1, world_size, tail), seed, mode == "dispatch"
        ), True
    if mode == "dispatch":
        raise DataError(
            '`mode="dispatch"` is for streams',
            got=f"a map-style {type(loader.dataset).__name__}",
            fix="leave it out",
        )
    own_batches = loader.batch_size is None and loader.batch_sampler is not None
    reader = Reader(loader, seed, is_single=loader.batch_size is None and not own_batches)
    if not own_batches and _is_ours(loader.sampler):
        shuffle = type(loader.sampler) is RandomSampler
        num_samples = len(loader.dataset)  # type: ignore[arg-type]
        if loader.batch_size is not None:
            plan = ShardPlan(num_samples, size or 1, ctx.data_rank, world_size, tail)
            return OrderedSource(plan, seed, shuffle, reader), not shuffle
    if own_batches:
        deal = Deal(1, world_size, tail, len)
        return SampledSource(loader.batch_sampler, deal, ctx.data_rank, seed, reader, True), False  # type: ignore[arg-type]
    deal = Deal(size or 1, world_size, tail)
    is_placed = type(loader.sampler) is SequentialSampler
    return SampledSource(loader.sampler, deal, ctx.data_rank, seed, reader, False), is_placed


def _shards_source(
    loader: Any, ctx: DistContext, tail: str, seed: int, *, split_batches: bool
) -> ShardsSource:
    dataset = getattr(loader, "dataset", loader)
    if (
        not isinstance(loader, DataLoader)
        or not isinstance(dataset, IterableDataset)
        or loader.batch_size is None
    ):
        what = (
            "a loader without a `batch_size`"
            if isinstance(loader, DataLoader)
            else f"a {type(loader).__name__}"
        )
        got = what if isinstance(dataset, IterableDataset) else f"a {type(dataset).__name__}"
        fix = 'pass a `DataLoader(stream, batch_size=...)`, or write `mode="split"`'
        raise DataError('`mode="shards"` is for streams that are batched here', got=got, fix=fix)
    count = getattr(dataset, "num_shards", 0) if callable(getattr(dataset, "shard", None)) else 0
    if count < ctx.data_world_size:
        got = f"{count} shards of a {type(dataset).__name__}, for {ctx.data_world_size} ranks that read data"
        fix = 'write `mode="split"`, or spread the data over more files'
        raise DataError('`mode="shards"` gives each rank shards of its own', got=got, fix=fix)
    tail = "drop" if loader.drop_last else tail
    if tail == "uneven":
        fix = 'write `tail="pad"`, whose repeats `batch.num_valid` tells apart'
        raise DataError(
            "ranks that read shards of their own end together", got='tail="uneven"', fix=fix
        )
    size = _per_rank(loader.batch_size, ctx.data_world_size) if split_batches else loader.batch_size
    return ShardsSource(loader, ctx, size, tail, seed)


def _is_ours(sampler: Any) -> bool:
    """Whether the order is one that faccel makes itself: the data set's, or a shuffle of all of it."""
    return type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )


def _per_rank(batch_size: int | None, world_size: int) -> int:
    if batch_size is None:
        raise DataError(
            "`split_batches` divides the loader's batch size, and this one has none",
            got="a loader that yields its own batches",
            fix="give the loader a `batch_size`, or leave `split_batches` out",
        )
    if batch_size % world_size:
        raise DataError(
            "`split_batches` divides the loader's batch size among the ranks",
            got=f"a batch size of {batch_size} for {world_size} ranks",
            fix=f"use a batch size of {-(-batch_size // world_size) * world_size}",
        )
    return batch_size // world_size


def _check(loader: Any, mode: str) -> None:
    if mode not in MODES:
        raise DataError(
            "`mode` says how a stream is shared", got=repr(mode), fix=nearest(str(mode), MODES)
        )
    if not isinstance(loader, Iterable):
        raise DataError(
            "`shard` takes a `DataLoader` or an iterable of batches",
            got=f"a {type(loader).__name__}",
            fix="write `faccel.shard(DataLoader(dataset, batch_size=32), ctx)`",
        )
    samplers = (
        getattr(loader, "sampler", None),
        getattr(getattr(loader, "batch_sampler", None), "sampler", None),
    )
    if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
        raise DataError(
            "`shard` splits the data itself",
            got="a loader with a DistributedSampler",
            fix="leave the sampler out and write `shuffle=True` or `shuffle=False`",
        )
