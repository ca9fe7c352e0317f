"""Samplers, streams and their splitting over ranks: every sample once, for every resume."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    WeightedRandomSampler,
)

import faccel
from faccel.data.order import Cursor, Order, ShardPlan
from faccel.data.stream_plan import StreamPlan, global_batches
from faccel.errors import DataError
from faccel.testing import fake_context, simulate

TAILS = ("pad", "full", "drop", "uneven")


class Rows(Dataset):
    """Row i with random augmentation from all three generators."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return torch.tensor([float(i), torch.rand(()).item(), random.random(), np.random.rand()])


class Stream(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        for i in range(self.n):
            yield torch.tensor([float(i), torch.rand(()).item(), random.random(), np.random.rand()])


class Items(Stream):
    """The numbers below `n`, without augmentation."""

    def __iter__(self):
        return iter(range(self.n))


class SelfSplitting(Stream):
    """Shares its samples among workers, as torch's documentation advises."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        step, first = (info.num_workers, info.id) if info else (1, 0)
        return itertools.islice(super().__iter__(), first, None, step)


class Stateful(Stream):
    def __init__(self, n):
        super().__init__(n)
        self.at, self.read = 0, 0

    def __iter__(self):
        while self.at < self.n:
            self.at += 1
            self.read += 1
            yield torch.tensor([float(self.at - 1)])
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Shuffled(Sampler):
    """A custom sampler that draws from the process-wide generator."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter(torch.randperm(self.n).tolist())

    def __len__(self):
        return self.n


def ids(data):
    return data[:, 0].long().tolist()


def loader_of(kind, n, batch_size=2, workers=0):
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    data = Rows(n)
    return {
        "map": lambda: DataLoader(data, batch_size, shuffle=True, **options),
        "sampler": lambda: DataLoader(data, batch_size, sampler=Shuffled(n), **options),
        "batch_sampler": lambda: DataLoader(
            data, batch_sampler=BatchSampler(Shuffled(n), batch_size, drop_last=False), **options
        ),
        "ragged": lambda: DataLoader(
            data,
            batch_sampler=[list(range(i, min(i + 1 + i % 3, n))) for i in ragged_starts(n)],
            **options,
        ),
        "iterable": lambda: DataLoader(Stream(n), batch_size, **options),
        "self_splitting": lambda: DataLoader(SelfSplitting(n), batch_size, **options),
        "stateful": lambda: DataLoader(Stateful(n), batch_size, **options),
    }[kind]()


def ragged_starts(n):
    starts, at = [], 0
    while at < n:
        starts.append(at)
        at += 1 + at % 3
    return starts


KINDS = ("map", "sampler", "batch_sampler", "ragged", "iterable", "self_splitting", "stateful")


def test_splitting_a_stream_agrees_with_the_arithmetic_of_an_order():
    for n, b, w, tail in itertools.product(range(25), range(1, 5), range(1, 6), TAILS):
        for r, start in itertools.product(range(w), [k * b * w for k in range(n // (b * w) + 1)]):
            if 0 < start == n:
                continue
            plan, order = ShardPlan(n, b, r, w, tail), Order(n, 0, 0, False)
            want = [
                (
                    x.tolist(),
                    plan.num_valid(start, s),
                    plan.cursor(0, start, s),
                    s + 1 == plan.num_steps(start),
                )
                for s, x in enumerate(plan.batches(order, start))
            ]
            stream_plan = StreamPlan(b, w, tail)
            batches = [
                rank_batch
                for batch in global_batches(range(n), stream_plan, start=start)
                if (rank_batch := batch.rank_batch(r))
            ]
            infos = [batch.info for batch in batches]
            got = [
                (batch.units, batch.info.num_valid, batch.info.cursor(0, ""), batch.info.is_last)
                for batch in batches
            ]
            assert got == want
            assert stream_plan.num_steps(n - start, r) == len(want)
            assert [info.step for info in infos] == [start // (b * w) + s for s in range(len(want))]


@pytest.mark.parametrize("n", [3, 10, 12])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: DataLoader(torch.arange(n), 4),
        lambda n: DataLoader(torch.arange(n), 4, sampler=range(n - 1, -1, -1)),
        lambda n: DataLoader(torch.arange(n), batch_sampler=[[0, 1], [2], [n - 1]]),
        lambda n: DataLoader(Items(n), 4),
        lambda n: DataLoader(Items(n), 4, num_workers=1, multiprocessing_context="fork"),
        lambda n: list(torch.arange(n).split(4)),
    ],
    ids=["map", "sampler", "batch_sampler", "stream", "workers", "batches"],
)
@pytest.mark.parametrize("mode", ["auto", "dispatch"])
def test_one_process_reads_the_batches_of_torch_without_repeats(make, n, mode):
    loader = make(n)
    if mode == "dispatch" and isinstance(getattr(loader, "dataset", None), torch.Tensor):
        pytest.skip("a map-style dataset is not dispatched")
    read = list(faccel.batches(faccel.shard(loader, fake_context(0, 1), mode=mode).at(0)))
    assert [b.data.tolist() for b in read] == [batch.tolist() for batch in make(n)]
    assert [b.num_valid for b in read] == [len(batch) for batch in make(n)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_loader_sees_each_sample_once(kind, world_size, workers):
    seen = []
    for rank in range(world_size):
        loader = faccel.shard(
            loader_of(kind, 23, workers=workers), fake_context(rank, world_size)
        ).at(1)
        steps = list(faccel.batches(loader))
        assert [b.is_last for b in steps] == [False] * (len(steps) - 1) + [True]
        assert steps[-1].cursor == Cursor(2)
        seen.append([ids(b.data)[: b.num_valid] for b in steps])
    assert len({len(steps) for steps in seen}) == 1
    assert sorted(i for steps in seen for row in steps for i in row) == list(range(23))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_anywhere_resumes_at_another_world_size(kind):
    def read(world_size, cursor, stop=None):
        """Rows of each step, all ranks together, and the cursor after the last step read."""
        per_rank = []
        for rank in range(world_size):
            loader = faccel.shard(loader_of(kind, 23), fake_context(rank, world_size))
            epoch_loader = loader.resume(cursor)
            per_rank.append(list(itertools.islice(faccel.batches(epoch_loader), stop)))
        rows = [
            i
            for step in zip(*per_rank, strict=True)
            for b in step
            for i in ids(b.data)[: b.num_valid]
        ]
        return rows, per_rank[0][-1].cursor

    uninterrupted, _ = read(1, Cursor(1))
    for stop in (1, 2, 3):
        first, cursor = read(3, Cursor(1), stop)
        resumed, _ = read(2, cursor)
        assert first + resumed == uninterrupted


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "stateful"])
def test_augmentation_does_not_depend_on_workers_or_on_a_resume(kind):
    def read(workers, start=None, world_size=2):
        loader = faccel.shard(loader_of(kind, 22, workers=workers), fake_context(1, world_size))
        return list(faccel.batches(loader.at(3) if start is None else loader.resume(start)))

    uninterrupted = read(0)
    for workers in (1, 2):
        for a, b in zip(read(workers), uninterrupted, strict=True):
            assert torch.equal(a.data, b.data)
    for k, batch in enumerate(uninterrupted[:-1]):
        for a, b in zip(read(k % 3, batch.cursor), uninterrupted[k + 1 :], strict=True):
            assert torch.equal(a.data, b.data)
    other_epoch = faccel.shard(loader_of(kind, 22), fake_context(1, 2)).at(4)
    assert not torch.equal(next(iter(other_epoch)), uninterrupted[0].data)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_leaves_the_process_wide_generators_alone(kind):
    def draws():
        return torch.rand(()).item(), random.random(), np.random.rand()

    loader = faccel.shard(loader_of(kind, 9), fake_context(0, 1)).at(0)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = [draws() for _ in range(10)]
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    seen = [draws() for _ in loader]
    assert seen == expected[: len(seen)]


def test_ranks_with_different_seeds_iterate_a_sampler_in_the_same_order():
    def fn(ctx):
        torch.manual_seed(ctx.rank)
        loader = faccel.shard(DataLoader(Rows(24), 2, sampler=Shuffled(24)), ctx).at(0)
        return [i for data in loader for i in ids(data)]

    seen = simulate(fn, 3)
    assert sorted(i for rows in seen for i in rows) == list(range(24))


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: WeightedRandomSampler([1.0] * 20, 20, generator=torch.Generator()),
        lambda: RandomSampler(Rows(20), replacement=True, num_samples=20),
        lambda: Shuffled(20),
    ],
)
def test_the_order_of_a_custom_sampler_follows_from_the_epoch(sampler):
    loader = faccel.shard(DataLoader(Rows(20), 4, sampler=sampler()), fake_context(0, 1))
    again = faccel.shard(DataLoader(Rows(20), 4, sampler=sampler()), fake_context(0, 1))
    first = [[ids(d) for d in loader.at(e)] for e in range(2)]
    assert first[0] != first[1]
    assert [[ids(d) for d in again.at(e)] for e in range(2)] == first
    with pytest.raises(DataError, match=r"loader\.at"):
        next(iter(loader))


def test_an_endless_sampler_is_read_lazily():
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield from torch.randperm(10).tolist()

    loader = faccel.shard(DataLoader(Rows(10), 2, sampler=Endless()), fake_context(1, 2)).at(0)
    assert [len(ids(d)) for d in itertools.islice(loader, 12)] == [2] * 12


def test_batches_of_a_batch_sampler_keep_their_sizes():
    loader = faccel.shard(loader_of("ragged", 10), fake_context(0, 1))
    assert [len(ids(b.data)) for b in faccel.batches(loader.at(0))] == [1, 2, 1, 2, 1, 2, 1]
    assert len(loader) == 7
    with pytest.raises(DataError, match="does not lie between"):
        next(iter(loader.resume(Cursor(0, 2))))
    for step, left in ((0, 7), (3, 4), (6, 1), (7, 0)):
        assert len(loader.at(0, step=step)) == left
    assert [ids(d) for d in loader.at(0, step=5)] == [[7, 8], [9]]
    with pytest.raises(DataError, match="`step` must be between 0 and 7"):
        loader.at(0, step=8)
    with pytest.raises(DataError, match="`step` must be an int of at least 0"):
        loader.at(0, step=-1)


def test_a_loader_without_a_batch_size_yields_the_items_of_the_dataset():
    class Batches(Rows):
        def __getitem__(self, i):
            return super().__getitem__(i).repeat(3, 1)

    for rank in range(2):
        loader = faccel.shard(DataLoader(Batches(3), batch_size=None), fake_context(rank, 2))
        assert [(ids(b.data), b.num_valid) for b in faccel.batches(loader)] == (
            [([0] * 3, 3), ([2] * 3, 3)] if rank == 0 else [([1] * 3, 3), ([0] * 3, 0)]
        )


def test_any_iterable_of_batches_is_split_over_ranks():
    batches = [{"x": torch.full((2,), i)} for i in range(5)]
    seen = [
        [
            (b.data["x"][0].item(), b.num_valid)
            for b in faccel.batches(faccel.shard(batches, fake_context(r, 2)))
        ]
        for r in range(2)
    ]
    assert seen == [[(0, 2), (2, 2), (4, 2)], [(1, 2), (3, 2), (0, 0)]]
    assert len(faccel.shard(batches, fake_context(0, 2))) == 3

    generator = faccel.shard((i for i in range(3)), fake_context(0, 1))
    assert list(generator) == [0, 1, 2]
    with pytest.raises(TypeError):
        len(generator)


def test_a_stateful_dataset_resumes_from_its_own_state():
    data = Stateful(20)
    loader = faccel.shard(DataLoader(data, 2), fake_context(0, 2))
    third = next(itertools.islice(faccel.batches(loader), 2, None))
    fresh = Stateful(20)
    resumed = faccel.shard(DataLoader(fresh, 2), fake_context(1, 2)).resume(third.cursor)
    assert third.cursor == Cursor(0, 12)
    assert [ids(b.data) for b in faccel.batches(resumed)] == [[14, 15], [18, 19]]
    assert fresh.read == 8  # nothing was passed over


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rank_0_reads_and_sends_each_rank_its_part(world_size, tail):
    reads = []

    class Text(IterableDataset):
        def __iter__(self):
            for i in range(11):
                reads.append(i)
                yield {"text": f"line {i}", "n": i, "none": None}

    def collate(rows):
        return [row["text"] for row in rows]

    def fn(ctx, mode):
        loader = faccel.shard(DataLoader(Text(), 2, collate_fn=collate), ctx, mode=mode, tail=tail)
        return [(b.data, b.num_valid, b.is_last, b.cursor) for b in faccel.batches(loader)]

    dispatched = simulate(fn, world_size, "dispatch")
    assert reads == list(range(11))
    assert dispatched == simulate(fn, world_size, "split")


def test_a_dispatched_batch_is_sent_to_its_rank_only():
    big = [torch.zeros(1000) for _ in range(8)]

    def fn(ctx):
        return [x.shape for x in faccel.shard(big, ctx, mode="dispatch")]

    trace = simulate(fn, 4).trace
    assert (
        max(e.num_bytes for e in trace if e.rank == 0) < 4 * 4 * 1000 * 1.5
    )  # four parts, each sent once
    assert all(e.num_bytes < 100 for e in trace if e.rank)


def test_an_error_while_rank_0_reads_reaches_every_rank():
    def broken():
        yield 1
        yield 2
        raise OSError("no such shard")

    seen = []

    def fn(ctx):
        try:
            list(faccel.shard(broken(), ctx, mode="dispatch"))
        except Exception as error:
            seen.append((ctx.rank, type(error).__name__, "no such shard" in str(error)))
            raise

    with pytest.raises(faccel.errors.RankFailedError):
        simulate(fn, 2)
    assert sorted(seen) == [(0, "RankFailedError", True), (1, "RankFailedError", True)]


def test_a_mode_that_does_not_fit_is_an_error():
    with pytest.raises(DataError, match="dispatch"):
        faccel.shard([1], fake_context(0, 1), mode="dispach")
    with pytest.raises(DataError, match="`IterableDataset`"):
        faccel.shard(DataLoader(Rows(3), 1), fake_context(0, 1), mode="dispatch")
    with pytest.raises(DataError, match="has none"):
        faccel.shard([1], fake_context(0, 2), split_batches=True, mode="local")


def test_a_sequential_sampler_without_a_batch_size_needs_no_epoch():
    loader = faccel.shard(
        DataLoader(Rows(3), batch_size=None, sampler=SequentialSampler(range(3))),
        fake_context(0, 1),
    )
    assert [int(x[0]) for x in loader] == [0, 1, 2]


def test_a_dataset_that_draws_random_numbers_is_read_once():
    indices = []

    class Counting(Rows):
        def __getitem__(self, i):
            indices.append(i)
            return super().__getitem__(i)

    loader = faccel.shard(DataLoader(Counting(12), 4), fake_context(0, 1))
    assert [ids(data) for data in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert indices == list(range(12))
