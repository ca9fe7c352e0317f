"""Reading batches, in the loader's workers or in this process: what is fetched does not depend on where.

Random augmentation is reproducible: each batch is fetched under process-wide generators that follow from
`(seed, epoch, place of the batch)`, and the process's own are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from faccel.data.rounds import Deal, Part, rounds
from faccel.random.generators import Generators, call_seeded, seed_all, using
from faccel.random.hashing import mix
from faccel.tree import is_tensordict

Row = tuple[tuple[int, ...], Any]
"""What a batch's seed is folded from, and its samples: `int64[n]`, or a list of what the user's sampler gave."""


@attrs.define(eq=False)
class Fetch(Dataset[Any]):
    """A data set whose item is a whole batch.

    Args:
        dataset: The user's.
        collate: The user's `collate_fn`.
        is_single: Whether one item of the data set is a batch already.
    """

    dataset: Any
    collate: Callable[[Any], Any]
    is_single: bool = False

    def __getitem__(self, row: Row) -> Any:
        key, samples = row
        if is_tensordict(self.dataset):
            batch = self.dataset[torch.as_tensor(samples)]
            return batch if self.collate is default_collate else self.collate(batch)
        if (
            type(self.dataset) is TensorDataset
            and self.collate is default_collate
            and not self.is_single
        ):
            index = torch.as_tensor(samples)
            return [tensor[index] for tensor in self.dataset.tensors]
        indices: list[Any] = samples.tolist() if isinstance(samples, np.ndarray) else samples
        if get_worker_info() is not None:
            seed_all(mix(*key))
            return self._collated(indices)
        return call_seeded(self._collated, indices, mix(*key))

    def _collated(self, indices: list[Any]) -> Any:
        if self.is_single:
            return self.collate(self.dataset[indices[0]])
        many = getattr(self.dataset, "__getitems__", None)
        return self.collate(many(indices) if many else [self.dataset[i] for i in indices])


@attrs.frozen(eq=False)
class Walk(IterableDataset[Any]):
    """The rounds of an iterable data set, walked from the beginning or from its own state.

    Every worker of every rank walks the whole stream under the same generators, so that each sample is there once and
    random augmentation is the same for any number of workers; a worker hands on every `num_workers`-th round.

    Args:
        dataset: The user's.
        deal: How its units are dealt.
        seed: Of the generators.
        start: What is to be passed over.
        state: The data set's own state to go on from, instead of passing over.
        rank: Whose part is handed on; None for those of all ranks.
    """

    dataset: Any
    deal: Deal
    seed: int
    start: int
    state: Any
    rank: int | None

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        if info is not None:
            seed_all(self.seed)
            _hide_worker_info()  # the data set is walked whole, also one that would split itself among workers
        number, of = (info.id, info.num_workers) if info else (0, 1)
        for step, each in enumerate(self._rounds() if info else _under(self._rounds(), self.seed)):
            if step % of == number:
                yield (
                    each.part(self.rank)
                    if self.rank is not None
                    else [each.part(r) for r in range(self.deal.world_size)]
                )

    def _rounds(self) -> Iterator[Any]:
        can_tell = hasattr(self.dataset, "state_dict") and hasattr(self.dataset, "load_state_dict")
        can_tell = can_tell and not _shuffles_in_a_buffer(self.dataset)
        resumes = self.state is not None
        if resumes:
            self.dataset.load_state_dict(self.state)
        return rounds(
            self.dataset,
            self.deal,
            start=0 if resumes else self.start,
            passed=self.start if resumes else 0,
            mark=self.dataset.state_dict if can_tell else lambda: None,
        )


def _shuffles_in_a_buffer(dataset: Any) -> bool:
    """Whether the `datasets` library shuffles this stream in a buffer, which is not in its state: what is in the buffer
    would be lost in a resume, so that such a stream is passed over instead.
    """
    stages: list[Any] = [getattr(dataset, "_ex_iterable", None)]
    while stages:
        stage = stages.pop()
        if hasattr(stage, "buffer_size"):
            return True
        stages += (
            [stage.ex_iterable]
            if hasattr(stage, "ex_iterable")
            else getattr(stage, "ex_iterables", ())
        )
    return False


def _hide_worker_info() -> None:
    import torch.utils.data._utils.worker as worker

    worker._worker_info = None  # pyright: ignore[reportPrivateUsage]


def _under(items: Iterator[Any], seed: int) -> Iterator[Any]:
    """Walk `items` under seeded generators of their own; the process's are put back between them."""
    state, end = Generators.seeded(seed), object()
    while True:
        with using(state):
            item = next(items, end)
        if item is end:
            return
        yield item


def walk(items: Iterable[Any], seed: int) -> Iterator[Any]:
    """Yield the items of the user's iterable, which draws from generators of its own that follow from `seed`."""
    if hasattr(items, "__len__"):
        with using(Generators.seeded(seed)):
            return iter(list(items))
    return _under(iter(items), seed)


def identity(batch: Any) -> Any:
    """Return the batch: it is collated already."""
    return batch


class _Rows(Sampler[Any]):
    """The rows of one iteration; a reader with persistent workers is given new ones."""

    def __init__(self) -> None:
        self.current: Iterable[Row] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.current)


def inner_loader(user: DataLoader[Any], dataset: Any, seed: int, **options: Any) -> DataLoader[Any]:
    """Return a loader with the user's workers, pinning and prefetching, that draws its base seed from a generator of
    its own (torch's would take it from the process's, and a resume would shift every later dropout mask).
    """
    return DataLoader(
        dataset,
        batch_size=None,
        collate_fn=identity,
        num_workers=user.num_workers,
        pin_memory=user.pin_memory,
        timeout=user.timeout,
        worker_init_fn=user.worker_init_fn,
        multiprocessing_context=user.multiprocessing_context,
        generator=torch.Generator().manual_seed(seed),
        prefetch_factor=user.prefetch_factor,
        **options,
    )


class Reader:
    """Reads rows of a map-style data set as the user's loader would.

    Persistent workers are started once and shared by every record of one `shard`; a second iteration that is alive at
    the same time gets workers of its own.
    """

    def __init__(self, loader: DataLoader[Any], seed: int, *, is_single: bool) -> None:
        self.is_single = is_single
        self._loader = loader
        self._seed = seed
        self._fetch = Fetch(loader.dataset, loader.collate_fn, is_single)
        self._shared: tuple[DataLoader[Any], _Rows] | None = None
        self._is_lent = False

    def read(self, rows: Iterable[Row], epoch: int, start: int) -> Iterator[Any]:
        """Yield the batch of each of `rows`; nothing is drawn from the process's generators."""
        if self._loader.num_workers == 0 and not self._loader.pin_memory:
            yield from map(self._fetch.__getitem__, rows)
            return
        if not self._loader.persistent_workers or self._is_lent:
            yield from self._make(rows, epoch, start)[0]
            return
        self._is_lent = True
        try:
            if self._shared is None:
                self._shared = self._make(rows, epoch, start)
            loader, slot = self._shared
            slot.current = rows
            yield from loader
        finally:
            self._is_lent = False

    def _make(self, rows: Iterable[Row], epoch: int, start: int) -> tuple[DataLoader[Any], _Rows]:
        slot = _Rows()
        slot.current = rows
        seed = mix(self._seed, epoch, start)
        options = {"sampler": slot, "persistent_workers": self._loader.persistent_workers}
        return inner_loader(self._loader, self._fetch, seed, **options), slot


def collated(part: Part, loader: Any, seed: int) -> Any:
    """Return the batch of a part of an iterable data set, as the loader would collate it."""
    collate = getattr(loader, "collate_fn", identity)
    if getattr(loader, "batch_size", None) is None:
        return call_seeded(collate, part.units[0], seed)
    return (
        collate(part.units)
        if collate is default_collate
        else call_seeded(collate, part.units, seed)
    )
