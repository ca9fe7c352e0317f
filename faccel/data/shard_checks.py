"""What `shard` exchanges: the seed of rank 0, and in debug mode lengths and first samples."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset

from faccel.comm.all_or_error import all_or_error
from faccel.comm.objects import broadcast_objects, gather_json
from faccel.context import DistContext
from faccel.errors import DataError
from faccel.mesh import DATA
from faccel.random.generators import call_seeded
from faccel.tree import Tree, flatten

_LOCAL_FIX = (
    'write `faccel.shard(loader, ctx, mode="local")` if each rank has other data, else build the '
    "same dataset on every rank"
)


def order_seed(loader: Iterable[Tree], ctx: DistContext) -> int:
    """Return the seed of a loader's order: that of its generator on rank 0, else the config's.

    Effects: collective if the loader or its sampler has a generator.
    """
    if not isinstance(loader, DataLoader):
        return ctx.config.seed
    batch_sampler = loader.batch_sampler
    samplers = (loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    for owner in (loader, *samplers):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            # Of rank 0: an order that differs between ranks would repeat and leave out samples.
            return broadcast_objects([generator.initial_seed()], ctx)[0]
    return ctx.config.seed


def check_same_dataset(loader: Iterable[Tree], ctx: DistContext, *, has_own_order: bool) -> None:
    """Raise unless every rank passes the same map-style dataset, by its length and first sample.

    Effects: collective. Reads the first sample twice, if faccel computes the order.

    Args:
        loader: The user's loader.
        ctx: The context.
        has_own_order: Whether the dataset is read with the indices `0 ... N-1`.
    """
    dataset: Tree = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset):
        return
    if not hasattr(dataset, "__len__"):
        return
    lengths = gather_json(len(dataset), ctx, axis=DATA)
    if len(set(lengths)) > 1:
        raise DataError(
            "the dataset of `loader` has another length on each rank, and `shard` would split it "
            "again",
            got=f"{lengths} samples",
            fix=_LOCAL_FIX,
        )
    if not has_own_order or lengths[0] == 0:
        return

    def read_first() -> str | None:
        first, second = (call_seeded(dataset.__getitem__, 0, seed=0) for _ in range(2))
        # A sample that differs when it is read again is augmented by a generator that faccel does
        # not seed: it cannot be compared.
        return digest(first) if digest(first) == digest(second) else None

    digests = all_or_error(read_first, ctx, "read the first sample", axis=DATA)
    _raise_unless_same(digests)


def check_same_first(sample: Tree, ctx: DistContext) -> None:
    """Raise unless every rank has read the same first sample of a stream.

    Effects: collective.
    """
    _raise_unless_same(gather_json(digest(sample), ctx, axis=DATA))


def _raise_unless_same(digests: list[str | None]) -> None:
    if None in digests or len(set(digests)) == 1:
        return
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(digests):
        ranks.setdefault(value, []).append(rank)
    raise DataError(
        "the first sample of `loader` differs between ranks, and `shard` would split the data "
        "again",
        got=f"ranks with equal first samples: {list(ranks.values())}",
        fix=_LOCAL_FIX,
    )


def digest(sample: Tree) -> str | None:
    """Return a hash of the tensors, arrays, numbers and strings of a sample; None without any.

    Effects: pure.
    """
    state = xxhash.xxh3_128()
    is_empty = True
    for leaf in flatten(sample)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            leaf = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        # Other objects may print an address or the order of a set, which differ between processes.
        if isinstance(leaf, np.ndarray):
            state.update(np.ascontiguousarray(leaf).tobytes())
        elif isinstance(leaf, str | bytes | int | float):
            state.update(repr(leaf).encode())
        else:
            continue
        is_empty = False
    return None if is_empty else state.hexdigest()
