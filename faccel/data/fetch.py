"""Reading batches in the loader's worker processes, or in this one, with the same result.

Random augmentation is reproducible: each batch is read under process-wide generators that are
seeded by `(seed, epoch, position of the batch)`; afterwards the process's own are restored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized

import attrs
import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    Sampler,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from faccel.data.collate import collate_in_process
from faccel.random.generators import call_seeded, call_watched, detect_draws, seed_all
from faccel.random.hashing import mix
from faccel.tree import Tree, flatten, is_tensordict

Row = tuple[tuple[int, ...], Sequence[Tree] | np.ndarray]
"""The integers that seed a batch, and its indices: `int64[n]`, or a list of the user's sampler."""


@attrs.define(eq=False)
class BatchDataset(Dataset[Tree]):
    """A dataset whose item is a whole batch.

    Args:
        dataset: The user's dataset.
        collate: The user's `collate_fn`.
        is_single: Whether one item of the dataset is a batch already.
        draws: Whether reading a batch draws random numbers; None before the first one is read. In
            worker processes it stays None.
    """

    dataset: Tree
    collate: Callable[[Tree], Tree]
    is_single: bool = False
    draws: bool | None = attrs.field(default=None, init=False)

    def __getitem__(self, row: Row) -> Tree:
        """Read, seed and collate one batch."""
        key, indices = row
        # One indexing operation for all rows, instead of an item per row and a `stack`.
        if is_tensordict(self.dataset):
            batch = self.dataset[torch.as_tensor(indices)]
            if self.collate is default_collate:
                return batch
            return self.collate(batch)
        if self._is_plain_tensors():
            index = torch.as_tensor(indices)
            if isinstance(indices, np.ndarray):
                # Half the time of `tensor[index]`. A user's sampler may yield negative indices,
                # which it does not take.
                return [tensor.index_select(0, index) for tensor in self.dataset.tensors]
            return [tensor[index] for tensor in self.dataset.tensors]
        # Datasets get a list of Python integers, as PyTorch's samplers yield them.
        if isinstance(indices, np.ndarray):
            indices = indices.tolist()
        if get_worker_info() is not None:
            seed_all(mix(*key))  # nothing else in a worker process draws
            return self._read(indices)
        return self._read_in_process(key, indices)

    def _read_in_process(self, key: tuple[int, ...], indices: Sequence[Tree]) -> Tree:
        """Read under seeded generators; those of the process belong to the training."""
        if self.draws is None:
            batch, self.draws = call_seeded(self._read_and_detect, indices, mix(*key))
            return batch
        # Most datasets draw nothing, and seeding all generators takes a tenth of the time in which
        # a small batch is read. A batch that draws after others did not is read again, seeded.
        if not self.draws:
            batch, self.draws = call_watched(self._read, indices)
            if not self.draws:
                return batch
        return call_seeded(self._read, indices, mix(*key))

    def _read_and_detect(self, indices: Sequence[Tree]) -> tuple[Tree, bool]:
        return detect_draws(lambda: self._read(indices))

    def _is_plain_tensors(self) -> bool:
        is_default = self.collate is default_collate and not self.is_single
        # The exact class: a subclass may transform its items in `__getitem__`.
        return is_default and type(self.dataset) is TensorDataset

    def _read(self, indices: Sequence[Tree]) -> Tree:
        if self.is_single:
            return self.collate(self.dataset[indices[0]])
        # PyTorch's protocol for datasets that read many items at once; `DataLoader` uses it, too.
        get_many = getattr(self.dataset, "__getitems__", None)
        if get_many is not None:
            samples = get_many(indices)
        else:
            samples = [self.dataset[index] for index in indices]
        if self.collate is default_collate and get_worker_info() is None:
            return collate_in_process(samples)
        return self.collate(samples)


def identity(batch: Tree) -> Tree:
    """Return a batch that is collated already."""
    return batch


def num_rows(data: Tree) -> int:
    """Return the rows of a batch that was not collated here: those of its first tensor or array.

    Without one: the length of a list, or of the first list of a mapping; else 1.
    """
    for leaf in flatten(data)[0]:
        # A 0-d tensor has no dimension of rows, for example a label of the whole batch.
        if isinstance(leaf, torch.Tensor | np.ndarray) and leaf.ndim:
            return len(leaf)
    if isinstance(data, Mapping):
        data = next(iter(data.values()), None)
    if isinstance(data, list):
        return len(data)
    return 1


def set_epoch(iterable: Tree, epoch: int) -> None:
    """Call `iterable.set_epoch(epoch)`, if it has that method."""
    # The method by which PyTorch's and Hugging Face's classes receive the epoch.
    if hasattr(iterable, "set_epoch"):
        iterable.set_epoch(epoch)


class _RowSampler(Sampler[Row]):
    """The rows of one iteration; persistent workers get new ones in each."""

    # The sampler of a `DataLoader` cannot be replaced, so the rows are an attribute of it.
    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def inner_loader(
    user: DataLoader[Tree], dataset: Dataset[Tree], seed: int, **options: Tree
) -> DataLoader[Tree]:
    """Return a loader over whole batches, with the workers, pinning and prefetching of `user`.

    Its base seed comes from its own generator. PyTorch would draw it from the process's, and a
    resume would shift every later dropout mask.
    """
    return DataLoader(
        dataset,
        # An item of `dataset` is a collated batch: nothing is left to batch or to collate.
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
    """Reads batches of a map-style dataset as the user's loader would.

    Persistent workers start once, for all records of one `shard`. A second iteration at the same
    time gets its own workers.
    """

    def __init__(self, loader: DataLoader[Tree], seed: int, *, is_single: bool) -> None:
        self.is_single = is_single
        self._loader = loader
        self._seed = seed
        self._dataset = BatchDataset(loader.dataset, loader.collate_fn, is_single)
        self._persistent: tuple[DataLoader[Tree], _RowSampler] | None = None
        self._persistent_length: int | None = None
        self._is_in_use = False

    def read(self, rows: Iterable[Row], epoch: int, start: int) -> Iterator[Tree]:
        """Yield the batch of each of `rows`; draws nothing from the process's generators."""
        # Without workers and pinning a `DataLoader` would only add overhead per batch.
        if self._loader.num_workers == 0 and not self._loader.pin_memory:
            yield from map(self._dataset.__getitem__, rows)
            return
        # A `DataLoader` with persistent workers has one iterator, which a second loop would reset.
        if not self._loader.persistent_workers or self._is_in_use:
            yield from self._new_loader(rows, epoch, start)[0]
            return
        self._is_in_use = True
        try:
            length = self._length()
            # Workers have a copy of the dataset as it was when they started.
            if self._persistent is None or length != self._persistent_length:
                self._persistent = self._new_loader(rows, epoch, start)
                self._persistent_length = length
            loader, sampler = self._persistent
            sampler.rows = rows
            yield from loader
        finally:
            # Also after a `break` of the caller, which closes this generator.
            self._is_in_use = False

    def _length(self) -> int | None:
        dataset = self._loader.dataset
        if isinstance(dataset, Sized):
            return len(dataset)
        return None

    def _new_loader(
        self, rows: Iterable[Row], epoch: int, start: int
    ) -> tuple[DataLoader[Tree], _RowSampler]:
        sampler = _RowSampler(rows)
        seed = mix(self._seed, epoch, start)
        options = {"sampler": sampler, "persistent_workers": self._loader.persistent_workers}
        return inner_loader(self._loader, self._dataset, seed, **options), sampler
