"""Loaders on several ranks: exact gathers, generators, data that is split already, empty data."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

import faccel
from faccel.data.local_source import LocalPlan
from faccel.errors import DataError, RankFailedError
from faccel.testing import fake_context, simulate


class Stream(IterableDataset):
    """The numbers of a range."""

    def __init__(self, *limits):
        self.numbers = range(*limits)

    def __iter__(self):
        return iter(self.numbers)


class Batches(Dataset):
    """Items that are whole batches of different sizes."""

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return torch.arange(10 * i, 11 * i + 1)


def ragged(n):
    """Index lists of 1, 2, 3, 1, 2, 3, ... indices below `n`."""
    lists, first, sizes = [], 0, itertools.cycle((1, 2, 3))
    while first < n:
        size = min(next(sizes), n - first)
        lists.append(list(range(first, first + size)))
        first += size
    return lists


def sequential_batches(n, size):
    return BatchSampler(SequentialSampler(range(n)), size, drop_last=False)


LOADERS = {
    "map": lambda: DataLoader(torch.arange(22), 4),
    "sampler": lambda: DataLoader(torch.arange(22), 4, sampler=list(range(22))),
    "batch_sampler": lambda: DataLoader(torch.arange(22), batch_sampler=sequential_batches(22, 4)),
    "ragged": lambda: DataLoader(torch.arange(22), batch_sampler=ragged(22)),
    "items": lambda: DataLoader(Batches(), batch_size=None),
    "stream": lambda: DataLoader(Stream(22), 4),
    "batches": lambda: [torch.arange(i, 2 * i + 1) for i in range(5)],
    "texts": lambda: [["a", "b", "c"], ["d"], ["e", "f"]],
}


def rows_of(data):
    """The rows of a batch of numbers or texts, as a tensor."""
    if isinstance(data, torch.Tensor):
        return data
    return torch.tensor([ord(text) for text in data])


def gathered(ctx, kind, options):
    loader = faccel.shard(LOADERS[kind](), ctx, **options).at(0)
    seen = []
    for batch in faccel.batches(loader):
        rows = rows_of(batch.data)
        result = faccel.gather(
            {"x": rows, "y": rows[:, None].float()}, ctx, num_valid=batch.num_valid
        )
        assert result["y"][:, 0].tolist() == result["x"].tolist()
        seen += result["x"].tolist()
    return seen


def test_gather_of_equal_batches_needs_one_collective_and_of_ragged_ones_no_more():
    for kind in ("map", "batch_sampler", "ragged"):
        trace = simulate(gathered, 2, kind, {}).trace
        num_steps = len(faccel.shard(LOADERS[kind](), fake_context(0, 2)))
        assert [e.op for e in trace if e.rank == 0] == ["all_gather"] * num_steps


def test_gather_of_an_uneven_tail_is_exact_while_every_rank_has_a_batch():
    def fn(ctx):
        loader = faccel.shard(DataLoader(torch.arange(11), 4), ctx, tail="uneven")
        return [
            faccel.gather(b.data, ctx, num_valid=b.num_valid).tolist()
            for b in faccel.batches(loader)
        ]

    assert simulate(fn, 2)[1] == [list(range(8)), [8, 9, 10]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("tail", ["pad", "full", "drop", "uneven"])
@pytest.mark.parametrize(
    "lists", [ragged(20), [list(range(i, min(i + 6, 20))) for i in (0, 6, 12, 18)]]
)
def test_split_batches_divides_each_list_of_a_batch_sampler(lists, tail, world_size):
    def read(rank):
        data = DataLoader(torch.arange(20), batch_sampler=lists)
        ctx = fake_context(rank, world_size)
        loader = faccel.shard(data, ctx, tail=tail, split_batches=True)
        assert len(list(loader)) == len(loader)
        return list(faccel.batches(loader))

    kept = [rows for rows in lists if tail != "drop" or len(rows) % world_size == 0]
    if not kept:
        return
    per_rank = [read(rank) for rank in range(world_size)]
    steps = zip(*per_rank, strict=True)
    if tail == "uneven":
        steps = itertools.zip_longest(*per_rank)
        seen = sorted(i for part in per_rank for b in part for i in b.data.tolist())
        assert seen == list(range(20))
        return
    for batches, rows in zip(steps, kept, strict=True):
        assert [i for b in batches for i in b.data[: b.num_valid].tolist()] == rows
        sizes = {len(b.data) for b in batches}
        num_rows = -(-len(rows) // world_size)
        if tail == "full":
            num_rows = max(num_rows, -(-len(lists[0]) // world_size))
        assert sizes == {num_rows}


@pytest.mark.parametrize("split_batches", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("lists", [ragged(20), list(sequential_batches(20, 6))])
def test_a_batch_sampler_starts_at_any_step_and_resumes_on_other_ranks(
    lists, world_size, split_batches
):
    def read(world_size, cursor=None, step=0):
        parts = []
        for rank in range(world_size):
            data = DataLoader(torch.arange(20), batch_sampler=lists)
            loader = faccel.shard(data, fake_context(rank, world_size), split_batches=split_batches)
            loader = loader.at(0, step=step) if cursor is None else loader.resume(cursor)
            parts.append(list(faccel.batches(loader)))
            assert len(loader) == len(parts[-1])
        return list(zip(*parts, strict=True))

    def rows(steps):
        return [i for step in steps for b in step for i in b.data[: b.num_valid].tolist()]

    uninterrupted = read(world_size)
    for step, batches in enumerate(uninterrupted):
        later = read(world_size, step=step)
        assert [b.step for b, *_ in later] == list(range(step, len(uninterrupted)))
        assert rows(later) == rows(uninterrupted[step:])
        if step + 1 < len(uninterrupted):
            resumed = read(3 - world_size // 2, batches[0].cursor)
            assert rows(resumed) == rows(uninterrupted[step + 1 :])


def test_a_batch_sampler_over_a_sequential_sampler_needs_no_epoch():
    loader = faccel.shard(LOADERS["batch_sampler"](), fake_context(0, 1))
    assert [len(batch) for batch in loader] == [4, 4, 4, 4, 4, 2]
    shuffled = BatchSampler(RandomSampler(range(22)), 4, drop_last=False)
    loader = faccel.shard(DataLoader(torch.arange(22), batch_sampler=shuffled), fake_context(0, 1))
    assert len(loader) == 6
    with pytest.raises(DataError, match=r"loader\.at"):
        list(loader)


def test_cursors_with_the_earlier_name_of_a_sampler_are_accepted():
    for kind, name in (("sampler", "samples"), ("batch_sampler", "batches")):
        loader = faccel.shard(LOADERS[kind](), fake_context(0, 1))
        cursor = faccel.Cursor(0, 8, of=f"{name} of an own sampler")
        assert next(iter(loader.resume(cursor))).tolist() == [8, 9, 10, 11]


# The seed of a generator


def seeded(seed):
    return torch.Generator().manual_seed(seed)


SHUFFLED = {
    "shuffle": lambda g: DataLoader(torch.arange(32), 8, shuffle=True, generator=g),
    "random sampler": lambda g: DataLoader(
        torch.arange(32), 8, sampler=RandomSampler(range(32), generator=g)
    ),
    "replacement": lambda g: DataLoader(
        torch.arange(32), 8, sampler=RandomSampler(range(32), replacement=True, generator=g)
    ),
    "weighted": lambda g: DataLoader(
        torch.arange(32), 8, sampler=WeightedRandomSampler([1.0] * 32, 32, generator=g)
    ),
    "batch sampler": lambda g: DataLoader(
        torch.arange(32),
        batch_sampler=BatchSampler(RandomSampler(range(32), generator=g), 8, False),
    ),
}


def test_an_argument_is_stronger_than_the_generator_which_is_stronger_than_the_configuration():
    def order(seed, generator, config):
        data = DataLoader(torch.arange(32), 32, shuffle=True, generator=generator)
        ctx = fake_context(0, 1, config={"seed": config})
        return next(iter(faccel.shard(data, ctx, seed=seed).at(0))).tolist()

    assert order(None, seeded(7), 3) == order(7, None, 3) == order(None, None, 7)
    assert order(7, seeded(5), 3) == order(7, None, 3) != order(None, seeded(5), 3)


def test_two_shards_of_one_loader_have_the_same_order():
    for kind in SHUFFLED:
        data = SHUFFLED[kind](seeded(3))
        orders = []
        for _ in range(2):
            loader = faccel.shard(data, fake_context(0, 1))
            orders.append([batch.tolist() for batch in loader.at(1)])
        assert orders[0] == orders[1]


# Data that is split already


def own_numbers(ctx, kind, n=24):
    """The loader of one rank over numbers `rank, rank + W, ...` below `n`."""
    rank, world_size = ctx.data_rank, ctx.data_world_size
    numbers = range(rank, n, world_size)
    options = {"num_workers": 2, "multiprocessing_context": "fork"}
    return {
        "stream": lambda: DataLoader(Stream(rank, n, world_size), 2),
        "workers": lambda: DataLoader(Stream(rank, n, world_size), 2, **options),
        "map": lambda: DataLoader(torch.tensor(list(numbers)), 2),
        "shuffle": lambda: DataLoader(torch.tensor(list(numbers)), 2, shuffle=True),
        "subset": lambda: DataLoader(Subset(torch.arange(n), list(numbers)), 2),
        "distributed": lambda: DataLoader(
            torch.arange(n),
            2,
            sampler=DistributedSampler(
                range(n), world_size, rank, shuffle=False, drop_last=n % world_size > 0
            ),
        ),
        "batch sampler": lambda: DataLoader(
            torch.arange(n),
            batch_sampler=[list(numbers[i : i + 2]) for i in range(0, len(numbers), 2)],
        ),
        "batches": lambda: list(torch.tensor(list(numbers)).split(2)),
    }[kind]()


LOCAL = ("stream", "workers", "map", "shuffle", "subset", "distributed", "batch sampler", "batches")


def read_local(ctx, kind, n, tail="pad", cursor=None):
    loader = faccel.shard(own_numbers(ctx, kind, n), ctx, mode="local", tail=tail)
    loader = loader.at(0) if cursor is None else loader.resume(cursor)
    return [
        (b.data.tolist(), int(b.num_valid), b.step, b.is_last, b.cursor)
        for b in faccel.batches(loader)
    ]


@pytest.mark.parametrize("kind", [kind for kind in LOCAL if kind != "workers"])
def test_local_data_resumes_after_any_step(kind):
    uninterrupted = simulate(read_local, 2, kind, 22)
    for i, (*_, cursor) in enumerate(uninterrupted[0][:-1]):
        resumed = simulate(read_local, 2, kind, 22, "pad", cursor)
        for part, whole in zip(resumed, uninterrupted, strict=True):
            assert part == whole[i + 1 :]
    with pytest.raises(DataError):
        simulate(read_local, 3, kind, 22, "pad", uninterrupted[0][0][4])


@pytest.mark.parametrize(
    ("kind", "tail"),
    [("map", "drop"), ("stream", "drop"), ("map", "full"), ("stream", "full"), ("map", "uneven")],
)
def test_tails_of_local_data(kind, tail):
    """Rank 0 has 0, 2, ..., 10 and rank 1 has 1, 3, ..., 9."""
    parts = simulate(read_local, 2, kind, 11, tail)
    rows = [[row[0] for row in part] for part in parts]
    counts = [[row[1] for row in part] for part in parts]
    want = {
        "drop": [[[0, 2], [4, 6]], [[1, 3], [5, 7]]],
        "full": [[[0, 2], [4, 6], [8, 10]], [[1, 3], [5, 7], [9, 1]]],
        "uneven": [[[0, 2], [4, 6], [8, 10]], [[1, 3], [5, 7], [9]]],
    }
    assert rows == want[tail]
    if tail != "drop":
        assert counts == [[2, 2, 2], [2, 2, 1]]


@pytest.mark.parametrize("kind", ["stream", "map", "batch sampler", "batches"])
def test_gathers_and_windows_of_local_data_are_exact(kind):
    def fn(ctx):
        loader = faccel.shard(own_numbers(ctx, kind, 13), ctx, mode="local").at(0)
        seen = []
        for batch in faccel.batches(loader):
            seen += faccel.gather(batch.data, ctx, num_valid=batch.num_valid).tolist()
        windows = list(
            faccel.windows(loader, ctx, size=3, weight=lambda batch: int(batch.num_valid))
        )
        return seen, [(len(w), round(2 / float(w.scale))) for w in windows]

    for seen, windows in simulate(fn, 2):
        assert sorted(seen) == list(range(13))
        assert windows == [(3, 12), (1, 1)]


def test_every_element_of_a_local_plan_is_read_once():
    for counts in itertools.product(range(7), repeat=3):
        for size, tail in itertools.product((1, 2, 3), ("pad", "full", "drop", "uneven")):
            plan = LocalPlan(counts, size, tail)
            for rank, count in enumerate(counts):
                steps = range(plan.num_steps(rank))
                valid = sum(plan.num_valid(rank, step) for step in steps)
                full = min(counts) // size * size
                assert valid == (full if tail == "drop" else count)
            if tail != "uneven":
                assert len({plan.num_steps(rank) for rank in range(3)}) == 1


def test_a_rank_without_local_samples_is_an_error_on_every_rank():
    def fn(ctx, kind, n):
        with pytest.raises((DataError, RankFailedError)) as caught:
            read_local(ctx, kind, n)
        return str(caught.value)

    for kind in ("map", "stream"):
        assert all("no samples to repeat" in text for text in simulate(fn, 2, kind, 1))
        assert all("no batch in a whole epoch" in text for text in simulate(fn, 2, kind, 0))
    with pytest.raises(DataError, match="uneven"):
        simulate(read_local, 2, "stream", 9, "uneven")


# One dataset on every rank, or another one on each


def first_batch(ctx, make, mode):
    return next(iter(faccel.shard(make(ctx), ctx, mode=mode))).tolist()


def test_debug_mode_accepts_unseeded_augmentation():
    class Noisy(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return np.random.default_rng().normal(size=3)

    simulate(
        lambda ctx: next(iter(faccel.shard(DataLoader(Noisy(), 2), ctx))), 2, config={"debug": True}
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("mode", ["auto", "local"])
def test_a_dataset_that_grows_or_shrinks_is_read_at_its_new_length(mode, workers):
    class Growing(Dataset):
        n = 4

        def __len__(self):
            return self.n

        def __getitem__(self, i):
            assert i < self.n
            return i

    def fn(ctx):
        data = Growing()
        options = {}
        if workers:
            options = {
                "num_workers": 1,
                "persistent_workers": True,
                "multiprocessing_context": "fork",
            }
        loader = faccel.shard(DataLoader(data, 2, shuffle=True, **options), ctx, mode=mode)
        seen = []
        for epoch, data.n in enumerate((4, 9, 3)):
            part = loader.at(epoch)
            batches = list(faccel.batches(part))
            assert len(part) == len(batches)
            seen.append([i for b in batches for i in b.data[: b.num_valid].tolist()])
        return seen

    parts = simulate(fn, 2)
    for epoch, n in enumerate((4, 9, 3)):
        rows = sorted(i for part in parts for i in part[epoch])
        assert rows == (sorted([*range(n)] * 2) if mode == "local" else list(range(n)))


def test_a_cursor_in_the_middle_of_another_length_is_an_error():
    rows = list(range(10))
    loader = faccel.shard(DataLoader(rows, 2, shuffle=True), fake_context(0, 1))
    cursor = next(faccel.batches(loader.at(0))).cursor
    rows.append(10)
    with pytest.raises(DataError, match="another order"):
        loader.resume(cursor)


# A loader without `shard`


def train_on(ctx, make_loader, how):
    loader = make_loader()
    if how != "forgotten":
        loader = faccel.shard(loader, ctx, mode=how).at(0)
    faccel.seed_everything(0, ctx)
    model, scaler = faccel.wrap(torch.nn.Linear(1, 1), ctx), faccel.init_scaler(ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), 0.1), model, ctx)
    for x in loader:
        scaler = faccel.scaled_backward(model(x).sum(), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
def test_debug_mode_finds_a_loader_that_was_not_sharded(mesh, shuffle):
    def make_loader():
        torch.manual_seed(0)  # the usual first line of a script
        return DataLoader(torch.arange(8.0)[:, None], 2, shuffle=shuffle)

    options = {"mesh": mesh, "config": {"debug": True}}
    with pytest.raises(DataError, match="train on the same inputs"):
        simulate(train_on, 2, make_loader, "forgotten", **options)
    for how in ("auto", "local"):  # the two fixes of the message
        assert simulate(train_on, 2, make_loader, how, **options) == (True, True)


def test_debug_mode_accepts_other_inputs_on_each_rank():
    def fn(ctx):
        return train_on(ctx, lambda: [torch.full((2, 1), ctx.rank + 1.0)] * 3, "forgotten")

    assert simulate(fn, 2, config={"debug": True}) == (True, True)


# Nothing to read

EMPTY = {
    "map": lambda: DataLoader(TensorDataset(torch.zeros(0)), 2),
    "sampler": lambda: DataLoader(torch.zeros(3), 2, sampler=[]),
    "batch sampler": lambda: DataLoader(torch.zeros(3), batch_sampler=[]),
    "drop": lambda: DataLoader(torch.zeros(3), 4, drop_last=True),
    "stream": lambda: DataLoader(Stream(0), 2),
    "batches": lambda: [],
}


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("mode", ["auto", "local", "dispatch"])
def test_an_epoch_without_a_step_is_an_error_on_every_rank(kind, mode):
    if mode == "dispatch" and kind not in ("stream", "batches"):
        pytest.skip("a map-style dataset is not dispatched")

    def fn(ctx):
        loader = faccel.shard(EMPTY[kind](), ctx, mode=mode).at(0)
        with pytest.raises(DataError, match="no batch in a whole epoch"):
            next(faccel.batches(loader))
        with pytest.raises(DataError, match="no batch in a whole epoch"):
            list(loader)

    for world_size in (1, 2):
        simulate(fn, world_size)


def test_a_generator_that_is_used_up_is_an_error():
    loader = faccel.shard((i for i in range(3)), fake_context(0, 1))
    assert list(loader) == [0, 1, 2]
    with pytest.raises(DataError, match="instead of a generator"):
        list(loader)
