"""Reading a stream under seeded generators, in the loader's workers or in this process."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager

import attrs
import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from faccel.data.fetch import identity, set_epoch
from faccel.data.stream_plan import GlobalBatch, RankBatch, StreamPlan, global_batches
from faccel.random.generators import Generators, call_seeded, seed_all, using
from faccel.tree import Tree


@attrs.frozen(eq=False)
class StreamDataset(IterableDataset[Tree]):
    """The batches of an `IterableDataset`, from its beginning or from its own state.

    Every worker of every rank iterates the whole stream under the same generators. So each sample
    is read once, and random augmentation is the same for any number of workers. A worker yields
    every `num_workers`-th batch.

    Args:
        dataset: The user's dataset.
        plan: How its samples are split over ranks.
        seed: Seed of the generators.
        start: Samples (or whole batches) of the epoch before the first batch that is yielded.
        state: The dataset's own state to resume from, instead of skipping.
        rank: Yields the `RankBatch` of this rank; None yields a list with that of each rank.
    """

    dataset: Tree
    plan: StreamPlan
    seed: int
    start: int
    state: Tree
    rank: int | None

    def __iter__(self) -> Iterator[RankBatch | list[RankBatch | None] | None]:
        """Yield the batches of this rank, or of all ranks."""
        worker = get_worker_info()
        if worker is None:
            yield from map(self._select, _iterate_seeded(self._global_batches(), self.seed))
            return
        # Nothing else in a worker process draws, so its generators are neither saved nor restored.
        seed_all(self.seed)
        _hide_worker_info()
        # Batch `i` comes from worker `i % num_workers`: `DataLoader` asks its workers in turn, so
        # batches arrive in the order of the stream.
        for step, batch in enumerate(self._global_batches()):
            if step % worker.num_workers == worker.id:
                yield self._select(batch)

    def _select(self, batch: GlobalBatch) -> RankBatch | list[RankBatch | None] | None:
        if self.rank is not None:
            rank_batch = batch.rank_batch(self.rank)
            if rank_batch is None or batch.step:
                return rank_batch
            # At the start of the stream only: debug mode compares it between ranks.
            return attrs.evolve(rank_batch, first=batch.first[0])
        # `mode="dispatch"`: rank 0 sends each rank its item of this list.
        return [batch.rank_batch(rank) for rank in range(self.plan.world_size)]

    def _global_batches(self) -> Iterator[GlobalBatch]:
        dataset = self.dataset
        options: dict[str, Tree] = {"start": self.start}
        if self.state is not None:
            # A stream of `datasets` begins at a loaded state each time that it is iterated in the
            # same epoch. The user's would not start at its beginning any more.
            if hasattr(dataset, "_starting_state_dict"):
                dataset = _shallow_copy(dataset)
            # The dataset itself begins at `start`, so nothing is read and skipped here.
            dataset.load_state_dict(self.state)
            options = {"skipped": self.start}
        is_stateful = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        if is_stateful and not _has_shuffle_buffer(dataset):
            options["get_state"] = dataset.state_dict
        return global_batches(dataset, self.plan, **options)


def _shallow_copy(dataset: Tree) -> Tree:
    # `copy.copy` of a stream of `datasets` would share its attributes: its `__getstate__` returns
    # the dict that its `__setstate__` then uses.
    clone = object.__new__(type(dataset))
    vars(clone).update(vars(dataset))
    return clone


def _has_shuffle_buffer(dataset: Tree) -> bool:
    """Return whether a stream of the `datasets` library is shuffled in a buffer.

    Its state leaves out the buffer, whose samples would be lost in a resume: such a stream is
    read from its beginning instead.
    """
    # A stream of `datasets` is a tree of stages: each has one source, or several that are mixed.
    # There is no public way to its stages.
    stages: list[Tree] = [getattr(dataset, "_ex_iterable", None)]
    while stages:
        stage = stages.pop()
        if hasattr(stage, "buffer_size"):
            return True
        stages += getattr(stage, "ex_iterables", ())
        if hasattr(stage, "ex_iterable"):
            stages.append(stage.ex_iterable)
    return False


def _hide_worker_info() -> None:
    # A dataset that splits itself among workers, as PyTorch's documentation advises, would leave
    # samples out: here each worker needs the whole stream.
    import torch.utils.data._utils.worker as worker

    worker._worker_info = None  # pyright: ignore[reportPrivateUsage]


def _iterate_seeded(
    items: Iterable[Tree], seed: int, generators: Sequence[torch.Generator] = ()
) -> Iterator[Tree]:
    """Yield `items`, which draw from seeded generators; between them the process has its own."""
    state, end = Generators.seeded(seed), object()
    states = _seeded_states(generators, seed)
    iterator: Iterator[Tree] | None = None
    while True:
        # Not around the `yield`: the training step between two items would draw from `state`.
        with using(state), _using_states(generators, states):
            if iterator is None:
                iterator = iter(items)
            item = next(iterator, end)
        if item is end:
            return
        yield item


@contextmanager
def _using_states(
    generators: Sequence[torch.Generator], states: list[torch.Tensor]
) -> Generator[None]:
    """Run the body with the user's generators in `states`, which is updated; then restore them."""
    # Restored, because `initial_seed` of a generator is the seed of the next `shard`, too.
    own_states = [generator.get_state() for generator in generators]
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    try:
        yield
    finally:
        for index, generator in enumerate(generators):
            states[index] = generator.get_state()
            generator.set_state(own_states[index])


def iterate_seeded(
    items: Iterable[Tree], seed: int, generators: Sequence[torch.Generator] = ()
) -> Iterator[Tree]:
    """Iterate over the user's iterable, which draws from generators that are seeded with `seed`.

    Args:
        items: The iterable.
        seed: Seed of the process's generators, and of `generators`.
        generators: Those that the iterable draws from besides the process's.
    """
    if not hasattr(items, "__len__"):  # it may have no end
        return _iterate_seeded(items, seed, generators)
    # Exchanging the states of three generators takes longer than drawing an index. A list needs
    # one exchange per epoch instead of one per item.
    with (
        using(Generators.seeded(seed)),
        _using_states(generators, _seeded_states(generators, seed)),
    ):
        return iter(list(items))


def iterate_sampler(sampler: Iterable[Tree], seed: int, epoch: int) -> Iterator[Tree]:
    """Iterate over the user's sampler or batch sampler in an epoch, seeded with `seed`."""
    generators: list[torch.Generator] = []
    # A batch sampler takes its indices from its attribute `sampler`. A sampler with a generator
    # does not draw from the process's generators, so its generator is seeded, too.
    for iterable in (sampler, getattr(sampler, "sampler", None)):
        set_epoch(iterable, epoch)
        generator = getattr(iterable, "generator", None)
        if isinstance(generator, torch.Generator):
            generators.append(generator)
    return iterate_seeded(sampler, seed, generators)


def _seeded_states(generators: Sequence[torch.Generator], seed: int) -> list[torch.Tensor]:
    return [torch.Generator(g.device).manual_seed(seed).get_state() for g in generators]


def collate_units(units: list[Tree], loader: Iterable[Tree], seed: int) -> Tree:
    """Return samples of a stream, collated as `loader` would; whole batches unchanged."""
    collate = getattr(loader, "collate_fn", identity)
    # Without a batch size a unit is a whole batch, and a global batch has one unit per rank.
    if getattr(loader, "batch_size", None) is None:
        return call_seeded(collate, units[0], seed)
    if collate is default_collate:  # draws nothing
        return collate(units)
    return call_seeded(collate, units, seed)
