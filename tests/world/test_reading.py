"""Gathered batches are the dataset, for every small dataset, batch size, tail and world size."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel.errors import DataError
from faccel.testing import simulate

TAILS = ("pad", "full", "drop", "uneven")
MAX_WORLD_SIZE = 8
CASES = list(itertools.product(range(40), range(1, 6), TAILS, (False, True)))
WORLDS = list(itertools.product(range(1, MAX_WORLD_SIZE + 1), (False, True)))


def read(ctx, num_samples, batch_size, tail, split_batches, shuffle):
    """The batches of this rank, and the samples that all ranks read, in order."""
    dataset = TensorDataset(torch.arange(num_samples))
    size = batch_size * ctx.data_world_size if split_batches else batch_size
    data = DataLoader(dataset, size, shuffle=shuffle)
    loader = faccel.shard(data, ctx, tail=tail, split_batches=split_batches).at(1)
    order = loader.order.samples(np.arange(num_samples)).tolist()
    if num_samples < (batch_size * ctx.data_world_size if tail == "drop" else 1):
        assert len(loader) == 0
        with pytest.raises(DataError, match="no batch in a whole epoch"):
            next(faccel.batches(loader))
        return 0, [], []
    batches = list(faccel.batches(loader))
    assert len(batches) == len(loader)
    rows = [batch.data[0] for batch in batches]
    assert tail in ("pad", "uneven") or all(len(ids) == batch_size for ids in rows)
    if tail == "uneven":  # ranks have different numbers of batches: one gather at the end
        own_ids = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        return len(batches), order, faccel.gather(own_ids, ctx, ragged=True).tolist()
    seen = []
    for ids, batch in zip(rows, batches, strict=True):
        seen += faccel.gather(ids, ctx, num_valid=batch.num_valid).tolist()
    return len(batches), order, seen


def expected(order, num_samples, batch_size, tail, world_size):
    if not order:
        return []
    if tail == "drop":
        global_batch_size = batch_size * world_size
        return order[: num_samples // global_batch_size * global_batch_size]
    if tail != "uneven":
        return order
    global_batch_size = batch_size * world_size
    steps = [
        order[first : first + global_batch_size]
        for first in range(0, num_samples, global_batch_size)
    ]
    return [
        int(row)
        for rank in range(world_size)
        for step in steps
        for row in np.array_split(step, world_size)[rank]  # NumPy's way to divide evenly
    ]


def check(cases, world_size, shuffle):
    if shuffle:  # torch's RandomSampler refuses an empty dataset
        cases = [case for case in cases if case[0] > 0]
    results = simulate(
        lambda ctx: [read(ctx, *case, shuffle) for case in cases], world_size, timeout_s=300
    )
    for case, per_rank in zip(cases, zip(*results, strict=True), strict=True):
        num_samples, batch_size, tail, _ = case
        lengths = {length for length, _, _ in per_rank}
        assert tail == "uneven" or len(lengths) == 1, case
        for _, order, seen in per_rank:
            assert seen == expected(order, num_samples, batch_size, tail, world_size), case


@pytest.mark.parametrize(("world_size", "shuffle"), WORLDS)
def test_gathered_batches_are_the_dataset_exactly_once_in_order(world_size, shuffle):
    """16 of 17 cases, each on one of the 16 worlds; the slow test has all on each world size."""
    first = WORLDS.index((world_size, shuffle))
    check(CASES[first :: len(WORLDS) + 1], world_size, shuffle)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "shuffle"), WORLDS)
def test_every_case_on_every_number_of_ranks(world_size, shuffle):
    """Half of the datasets and batch sizes in their order, the other half shuffled."""
    check([case for case in CASES if (case[0] + case[1]) % 2 == shuffle], world_size, shuffle)


def test_a_run_stopped_on_four_ranks_resumes_on_three():
    dataset = TensorDataset(torch.arange(103))

    def fn(ctx, cursor, stop):
        loader = faccel.shard(DataLoader(dataset, 5, shuffle=True), ctx)
        seen = []
        for _, epoch in loader.epochs(2, start=cursor):
            for batch in faccel.batches(epoch):
                seen += faccel.gather(batch.data[0], ctx, num_valid=batch.num_valid).tolist()
                if len(seen) >= stop:
                    return seen, batch.cursor
        return seen, None

    uninterrupted, _ = simulate(fn, 1, faccel.Cursor(), 10**6)[0]
    for stop in (1, 50, 103, 150):
        before, cursor = simulate(fn, 4, faccel.Cursor(), stop)[0]
        after, _ = simulate(fn, 3, cursor, 10**6)[2]
        assert before + after == uninterrupted
        assert sorted(before + after) == sorted(list(range(103)) * 2)
