"""What each rank reads: padding, order, own samplers, data that is split already, exact gathers."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader

import faccel
from faccel.errors import DataError
from faccel.testing import fake_context, simulate
from tests.cases.worlds import WORLDS
from tests.world.test_loaders import (
    LOADERS,
    SHUFFLED,
    Stream,
    first_batch,
    gathered,
    read_local,
    rows_of,
    seeded,
)  # fmt: skip
from tests.world.test_rng import draws

# batch_sampler_gather


OPTIONS = {
    "default": {},
    "full": {"tail": "full"},
    "dispatch": {"mode": "dispatch"},
    "split_batches": {"split_batches": True},
    "debug": {},
}


def an_exact_gather(folder, world, kind, options):
    """`gather` with `num_valid` returns each row once, in order, for every loader."""
    expected = [row for batch in LOADERS[kind]() for row in rows_of(batch).tolist()]
    config = {"debug": True} if options == "debug" else {}
    for seen in WORLDS[world].run(gathered, kind, OPTIONS[options], **config):
        assert seen == expected


# skip_first_batches


def batch_lists(kind):
    """Batches of 12 numbers, as an own batch sampler makes them."""
    if kind == "ragged":
        return [[0], [1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11]]
    return [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def skipped_batches(folder, kind, step, world_size):
    """`at(epoch, step=)` starts there, and the ranks together read what is left."""
    lists, step, world_size = batch_lists(kind), int(step), int(world_size)
    ranks = []
    for rank in range(world_size):
        data = DataLoader(torch.arange(12), batch_sampler=lists)
        loader = faccel.shard(data, fake_context(rank, world_size)).at(0, step=step)
        ranks.append([(batch.data.tolist(), batch.num_valid) for batch in faccel.batches(loader)])
        assert len(loader) == len(ranks[-1])
    # One rank reads the lists; a step of several ranks reads one list each.
    steps = [
        [row for rows, num_valid in batches for row in rows[:num_valid]]
        for batches in zip(*ranks, strict=True)
    ]
    rows = [
        list(itertools.chain(*lists[i : i + world_size])) for i in range(0, len(lists), world_size)
    ]
    assert steps == rows[step:]


# one_process_pads


# Number of samples, batch size, and what each rank reads.
READ = {
    ("10 by 4", "one", "pad"): [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]],
    ("10 by 4", "one", "uneven"): [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]],
    ("10 by 4", "one", "full"): [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]],
    ("10 by 4", "one", "drop"): [[[0, 1, 2, 3], [4, 5, 6, 7]]],
    ("3 by 8", "one", "pad"): [[[0, 1, 2]]],
    ("10 by 4", "two", "pad"): [[[0, 1, 2, 3], [8]], [[4, 5, 6, 7], [9]]],
    ("10 by 4", "two", "uneven"): [[[0, 1, 2, 3], [8]], [[4, 5, 6, 7], [9]]],
    ("10 by 4", "two", "full"): [[[0, 1, 2, 3], [8, 9, 0, 1]], [[4, 5, 6, 7], [2, 3, 4, 5]]],
    ("10 by 4", "two", "drop"): [[[0, 1, 2, 3]], [[4, 5, 6, 7]]],
    ("11 by 4", "two", "pad"): [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7], [10, 0]]],
    ("11 by 4", "two", "uneven"): [[[0, 1, 2, 3], [8, 9]], [[4, 5, 6, 7], [10]]],
    ("7 by 2", "three", "pad"): [[[0, 1], [6]], [[2, 3], [0]], [[4, 5], [1]]],
}
NUM_RANKS = {"one": 1, "two": 2, "three": 3}


def the_last_batch(folder, sizes, ranks, tail):
    """Samples repeat only so far that the ranks have equally many rows."""
    num_samples, batch_size = map(int, sizes.split(" by "))
    world_size = NUM_RANKS[ranks]
    read = []
    for rank in range(world_size):
        data = DataLoader(torch.arange(num_samples), batch_size)
        loader = faccel.shard(data, fake_context(rank, world_size), tail=tail)
        read.append([batch.tolist() for batch in loader])
    assert read == READ[sizes, ranks, tail]
    if world_size == 1 and tail == "pad":
        assert read[0] == [x.tolist() for x in DataLoader(torch.arange(num_samples), batch_size)]


# generator_ignored, seed


def read_shuffled(ctx, kind, seed):
    generator = seeded(seed + 100 * ctx.rank)  # ranks that forget to agree
    loader = faccel.shard(SHUFFLED[kind](generator), ctx)
    epochs = [
        [faccel.gather(batch, ctx).tolist() for batch in loader.at(epoch)] for epoch in range(2)
    ]
    assert generator.initial_seed() == seed + 100 * ctx.rank
    return epochs


def a_seeded_generator(folder, world, kind):
    """The order depends on the seed of rank 0's generator, the epoch, and nothing else."""
    first = WORLDS[world].run(read_shuffled, kind, 1)
    assert first == [first[0]] * len(first)
    assert first[0][0] != first[0][1]
    assert WORLDS[world].run(read_shuffled, kind, 1) == first
    assert WORLDS[world].run(read_shuffled, kind, 2)[0] != first[0]
    if kind not in ("replacement", "weighted"):
        assert sorted(i for rows in first[0][0] for i in rows) == list(range(32))


def order(seed_everything, *, config=0, argument=None, generator=None):
    ctx = fake_context(0, 1, config={"seed": config})
    faccel.seed_everything(seed_everything, ctx)
    data = DataLoader(torch.arange(8), 8, shuffle=True, generator=generator)
    return next(iter(faccel.shard(data, ctx, seed=argument).at(0))).tolist()


SEEDS = {
    "config": lambda seed: {"config": seed},
    "argument": lambda seed: {"argument": seed},
    "generator": lambda seed: {"generator": seeded(seed)},
}


def the_seed_of_the_order(folder, source):
    """Each source of the seed gives the same order, which `seed_everything` does not change."""
    for seed in (1, 2):
        got = order(0, **SEEDS[source](seed))
        assert got == order(5, **SEEDS[source](seed))
        assert got == order(0, config=seed)
        assert got != order(0)
        assert sorted(got) == list(range(8))


def draw_after_wrap(ctx, per_data_rank):
    faccel.seed_everything(0, ctx)
    plan = faccel.Plan(tensor={"0": "colwise", "1": "rowwise"})
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    faccel.wrap(net, ctx, plan=plan)
    if per_data_rank:
        faccel.seed_everything(0, ctx, per_data_rank=True)
    return draws()


NOISE = {"equal": (False, {"ddp-4": 1, "hsdp": 1, "ddp-tp": 1}),
         "per data rank": (True, {"ddp-4": 4, "hsdp": 4, "ddp-tp": 2})}  # fmt: skip


def noise_of_ranks(folder, world, kind):
    """Noise is equal on all ranks, or differs between data ranks if the script asks for it."""
    per_data_rank, num_streams = NOISE[kind]
    mesh = {"ddp-tp": "dp_replicate=2,tp=2"}.get(world) or WORLDS[world].mesh
    assert len(set(simulate(draw_after_wrap, 4, per_data_rank, mesh=mesh))) == num_streams[world]


# presharded


def data_of_each_rank(folder, kind, num_samples, world_size):
    """`mode="local"` reads all samples of every rank once, in equally many steps."""
    num_samples, world_size = int(num_samples), int(world_size)
    if kind == "distributed" and num_samples % world_size:
        pytest.skip("a DistributedSampler drops or repeats samples itself")
    ranks = simulate(read_local, world_size, kind, num_samples)
    seen = [row for batches in ranks for rows, count, *_ in batches for row in rows[:count]]
    assert sorted(seen) == list(range(num_samples))
    for batches in zip(*ranks, strict=True):
        assert len({step for _, _, step, _, _ in batches}) == 1
        assert len({is_last for _, _, _, is_last, _ in batches}) == 1
        assert len({cursor for *_, cursor in batches}) == 1
        if kind not in ("batch sampler", "batches"):
            assert len({len(rows) for rows, *_ in batches}) == 1
    assert ranks[0][-1][4] == faccel.Cursor(1)


def read_split_by_node(ctx, num_shards, mode):
    import datasets
    from datasets.distributed import split_dataset_by_node

    data = datasets.Dataset.from_dict({"x": list(range(24))})
    data = data.to_iterable_dataset(num_shards=num_shards)
    data = split_dataset_by_node(data, ctx.rank, ctx.world_size)
    loader = faccel.shard(DataLoader(data, 2), ctx, mode=mode)
    return [x for b in faccel.batches(loader) for x in b.data["x"][: b.num_valid].tolist()]


def a_stream_that_a_library_has_split(folder, mode, num_shards):
    """A stream of `datasets` names its rank: it is read whole, or a second split raises."""
    pytest.importorskip("datasets")
    if mode in ("dispatch", "shards", "split"):
        with pytest.raises(DataError, match='mode="local"'):
            simulate(read_split_by_node, 2, int(num_shards), mode)
        return
    ranks = simulate(read_split_by_node, 2, int(num_shards), mode)
    assert sorted(x for rows in ranks for x in rows) == list(range(24))


SPLIT = {
    "length": lambda ctx: DataLoader(torch.arange(5 + ctx.rank), 2),
    "sample": lambda ctx: DataLoader(torch.arange(ctx.rank, 8 + ctx.rank), 2),
    "stream": lambda ctx: DataLoader(Stream(ctx.rank, 8, 2), 2),
    "batches": lambda ctx: list((torch.arange(8) + ctx.rank).split(2)),
    "equal": lambda ctx: DataLoader(torch.arange(8), 2),
}


def other_samples_on_each_rank(folder, kind):
    """Debug mode compares the first samples; `mode="local"` is the fix."""
    if kind == "equal":
        simulate(first_batch, 2, SPLIT[kind], "auto", config={"debug": True})
        return
    with pytest.raises(DataError, match='mode="local"'):
        simulate(first_batch, 2, SPLIT[kind], "auto", config={"debug": True})
    simulate(first_batch, 2, SPLIT[kind], "local", config={"debug": True})
