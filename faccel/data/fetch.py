"""Reading one batch: from a row of sample numbers to what the user's loader would have collated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from faccel.data.order import Ints
from faccel.mix import mix
from faccel.tree import is_tensordict


@attrs.frozen(eq=False)
class Fetch(Dataset[Any]):
    """A data set whose item is a whole batch; it runs in a worker or in the main process alike.

    Args:
        dataset: The user's.
        collate: The user's `collate_fn`.
    """

    dataset: Any
    collate: Callable[[Any], Any]

    def __getitem__(self, samples: Ints) -> Any:
        if is_tensordict(self.dataset):
            batch = self.dataset[torch.from_numpy(samples)]
            return batch if self.collate is default_collate else self.collate(batch)
        if type(self.dataset) is TensorDataset and self.collate is default_collate:
            index = torch.from_numpy(samples)
            return [tensor[index] for tensor in self.dataset.tensors]
        many = getattr(self.dataset, "__getitems__", None)
        if many:
            return self.collate(many(samples.tolist()))
        return self.collate([self.dataset[i] for i in samples.tolist()])


def _identity(batch: Any) -> Any:
    return batch


class _Rows(Sampler[Ints]):
    """The batches of one iteration as rows of sample numbers; a reader with persistent workers is given new ones."""

    def __init__(self) -> None:
        self.current: Iterable[Ints] = ()

    def __iter__(self) -> Iterator[Ints]:
        return iter(self.current)


class Reader:
    """Reads batches as the user's loader would: its workers, collation, pinning and prefetching.

    Persistent workers are started once and shared by every record of one `shard`; a second iteration that is alive at
    the same time gets workers of its own.
    """

    def __init__(self, loader: DataLoader[Any], seed: int) -> None:
        self._loader = loader
        self._seed = seed
        self._shared: tuple[DataLoader[Any], _Rows] | None = None
        self._is_lent = False

    def read(self, rows: Iterable[Ints], epoch: int, start: int) -> Iterator[Any]:
        """Yield the batch of each of `rows`; nothing is drawn from the process-wide generators."""
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

    def _make(self, rows: Iterable[Ints], epoch: int, start: int) -> tuple[DataLoader[Any], _Rows]:
        user, slot = self._loader, _Rows()
        slot.current = rows
        loader = DataLoader(
            Fetch(user.dataset, user.collate_fn),
            batch_size=None,
            sampler=slot,
            collate_fn=_identity,
            num_workers=user.num_workers,
            pin_memory=user.pin_memory,
            timeout=user.timeout,
            worker_init_fn=user.worker_init_fn,
            multiprocessing_context=user.multiprocessing_context,
            generator=torch.Generator().manual_seed(mix(self._seed, epoch, start)),
            prefetch_factor=user.prefetch_factor,
            persistent_workers=user.persistent_workers,
        )
        return loader, slot
