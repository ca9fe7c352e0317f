import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel.testing import simulate

TAILS = ("pad", "drop", "uneven")


def read_everything(ctx, shuffle):
    """Every data set below 40 samples, batch size below 6 and tail, split or not: what the ranks see together."""
    w = ctx.data_world_size
    for n, b, tail, split in itertools.product(range(40), range(1, 6), TAILS, (False, True)):
        if n == 0 and shuffle:
            continue  # torch's own RandomSampler refuses an empty data set
        data = DataLoader(TensorDataset(torch.arange(n)), b * w if split else b, shuffle=shuffle)
        loader = faccel.shard(data, ctx, tail=tail, split_batches=split).at(1)
        order = loader.order.samples(np.arange(n)).tolist()
        mine, valid = [], []
        for batch in faccel.batches(loader):
            (ids,) = batch.data
            assert len(ids) == b or tail == "uneven"
            mine.append(ids)
            valid.append(batch.num_valid)
        assert len(mine) == len(loader)
        if tail == "uneven":
            flat = torch.cat(mine) if mine else torch.zeros(0, dtype=torch.int64)
            seen = faccel.gather(flat, ctx, ragged=True).tolist()
            expected = [order[p] for r in range(w) for p in range(n) if p // b % w == r]
        else:
            assert len(set(faccel.gather_objects(len(mine), ctx))) == 1
            seen = [
                x
                for ids, k in zip(mine, valid, strict=True)
                for x in faccel.gather(ids, ctx, num_valid=k).tolist()
            ]
            expected = order[: n // (b * w) * b * w] if tail == "drop" else order
        assert seen == expected, (n, b, tail, split)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", range(1, 9))
def test_gathered_batches_are_the_data_set_exactly_once_in_order(world_size, shuffle):
    simulate(read_everything, world_size, shuffle, timeout_s=120)


def test_a_run_stopped_on_four_ranks_goes_on_on_three():
    rows = TensorDataset(torch.arange(103))

    def fn(ctx, cursor, stop):
        loader = faccel.shard(DataLoader(rows, 5, shuffle=True), ctx)
        seen = []
        for _, part in loader.epochs(2, start=cursor):
            for batch in faccel.batches(part):
                seen += faccel.gather(batch.data[0], ctx, num_valid=batch.num_valid).tolist()
                if len(seen) >= stop:
                    return seen, batch.cursor
        return seen, None

    whole, _ = simulate(fn, 1, faccel.Cursor(), 10**6)[0]
    for stop in (1, 50, 103, 150):
        first, cursor = simulate(fn, 4, faccel.Cursor(), stop)[0]
        rest, _ = simulate(fn, 3, cursor, 10**6)[2]
        assert first + rest == whole
        assert sorted(first + rest) == sorted(list(range(103)) * 2)
