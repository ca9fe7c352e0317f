"""`shard`: positions, cursors, tails, workers and errors of a sharded loader."""

import os

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)
from torch.utils.data.distributed import DistributedSampler

import faccel
from faccel.errors import DataError
from faccel.testing import fake_context

ONE = fake_context(0, 1)


class Squares(Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"i": i, "x": torch.tensor([float(i), float(i) ** 2])}


class InBatches(Squares):
    def __getitems__(self, indices):
        return [("many", i) for i in indices]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def ids(loader):
    return [batch["i"].tolist() for batch in loader]


def test_a_shuffled_loader_needs_an_epoch():
    loader = faccel.shard(DataLoader(Squares(10), 2, shuffle=True), ONE)
    with pytest.raises(DataError, match=r"loader\.at\(epoch\)"):
        next(iter(loader))
    with pytest.raises(DataError):
        next(faccel.batches(loader))
    assert len(loader) == 5


def test_epochs_have_their_own_order_and_each_sample_once():
    loader = faccel.shard(DataLoader(Squares(11), 2, shuffle=True), ONE, tail="uneven")
    orders = [[i for row in ids(epoch_loader) for i in row] for _, epoch_loader in loader.epochs(3)]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [
        [i for row in ids(epoch_loader) for i in row] for _, epoch_loader in loader.epochs(3)
    ] == orders
    assert loader.at(1).order.samples(np.arange(11)).tolist() == orders[1]


def test_the_seed_of_the_config_is_the_default():
    data = DataLoader(Squares(64), 64, shuffle=True)
    first = ids(faccel.shard(data, fake_context(0, 1, config={"seed": 5})).at(0))
    assert ids(faccel.shard(data, ONE, seed=5).at(0)) == first != ids(faccel.shard(data, ONE).at(0))


def test_at_skips_steps_without_reading_them():
    read = []

    class Spy(Squares):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    loader = faccel.shard(DataLoader(Spy(20), 2), fake_context(1, 2))
    epoch_loader = loader.at(0, step=3)
    assert (len(loader), len(epoch_loader), epoch_loader.cursor) == (5, 2, faccel.Cursor(0, 12))
    assert [b.step for b in faccel.batches(epoch_loader)] == [3, 4]
    assert read == [14, 15, 18, 19]


def test_a_step_counter_of_the_end_of_an_epoch_is_the_end():
    for n, steps in ((12, 3), (10, 3)):
        loader = faccel.shard(DataLoader(Squares(n), 4), ONE)
        assert len(loader) == steps
        assert list(loader.at(0, step=steps)) == []
        for bad in (-1, steps + 1):
            with pytest.raises(DataError, match="has 3 steps"):
                loader.at(0, step=bad)


def test_a_plain_loader_is_an_error_with_the_fix():
    plain = DataLoader(Squares(4), 2)
    for call in (lambda: faccel.batches(plain), lambda: faccel.windows(plain, ONE)):
        with pytest.raises(DataError, match="shard"):
            call()


def test_a_cursor_of_any_batch_resumes_with_the_next_one_across_epochs():
    loader = faccel.shard(DataLoader(Squares(10), 3, shuffle=True), ONE)
    uninterrupted = [
        ids([b.data])[0]
        for _, epoch_loader in loader.epochs(2)
        for b in faccel.batches(epoch_loader)
    ]
    cursors = [
        b.cursor for _, epoch_loader in loader.epochs(2) for b in faccel.batches(epoch_loader)
    ]
    assert cursors[3] == faccel.Cursor(1, 0)
    for i, cursor in enumerate(cursors):
        resumed = [
            ids([b.data])[0]
            for _, epoch_loader in loader.epochs(2, start=cursor)
            for b in faccel.batches(epoch_loader)
        ]
        assert resumed == uninterrupted[i + 1 :]


def test_a_cursor_of_a_longer_dataset_is_an_error():
    with pytest.raises(DataError, match="10 samples"):
        next(iter(faccel.shard(DataLoader(Squares(10), 3), ONE).resume(faccel.Cursor(0, 11))))


def test_num_valid_counts_the_rows_without_padding():
    loader = faccel.shard(DataLoader(Squares(5), 2), fake_context(1, 2))
    seen = [
        (b.data["i"].tolist(), b.num_valid, b.step, b.is_last, b.cursor)
        for b in faccel.batches(loader)
    ]
    assert seen == [
        ([2, 3], 2, 0, False, faccel.Cursor(0, 4)),
        ([0], 0, 1, True, faccel.Cursor(1, 0)),
    ]
    full = faccel.shard(DataLoader(Squares(5), 2), fake_context(1, 2), tail="full")
    assert [(b.data["i"].tolist(), b.num_valid) for b in faccel.batches(full)] == [
        ([2, 3], 2),
        ([1, 2], 0),
    ]


def test_drop_last_of_the_users_loader_is_kept():
    loader = faccel.shard(DataLoader(Squares(11), 2, drop_last=True), fake_context(0, 2))
    assert ids(loader) == [[0, 1], [4, 5]]


def test_split_batches_divides_the_batch_size():
    loader = faccel.shard(DataLoader(Squares(12), 6), fake_context(1, 2), split_batches=True)
    assert ids(loader) == [[3, 4, 5], [9, 10, 11]]
    with pytest.raises(DataError, match="batch_size=8"):
        faccel.shard(DataLoader(Squares(12), 6), fake_context(1, 4), split_batches=True)


def test_tensor_parallel_ranks_read_the_same_data():
    from faccel.data.order import ShardPlan
    from faccel.mesh import MeshSpec

    spec = MeshSpec(dp_replicate=2, tp=2)
    assert [spec.data_rank(r) for r in range(4)] == [0, 0, 1, 1]
    assert ShardPlan(8, 2, spec.data_rank(1), spec.data_world_size, "pad").first_position(0, 0) == 0


@pytest.mark.parametrize(
    "loader",
    [3, DataLoader(Squares(4), 2, sampler=DistributedSampler(Squares(4), 2, 0))],
    ids=["int", "distributed"],
)
def test_a_loader_that_cannot_be_split_is_an_error_with_the_fix(loader):
    with pytest.raises(DataError) as error:
        faccel.shard(loader, ONE)
    assert error.value.fix


def test_an_unknown_tail_is_an_error():
    with pytest.raises(DataError, match="uneven"):
        faccel.shard(DataLoader(Squares(4), 2), ONE, tail="even")


def test_a_dataset_with_getitems_reads_a_batch_at_once():
    from tensordict import TensorDict

    x = torch.arange(10.0).view(5, 2)
    got = next(iter(faccel.shard(DataLoader(TensorDataset(x, x.sum(1)), 3), ONE)))
    want = next(iter(DataLoader(TensorDataset(x, x.sum(1)), 3)))
    assert type(got) is type(want)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    table = TensorDict({"x": x}, batch_size=[5])
    got = next(iter(faccel.shard(DataLoader(table, 3, collate_fn=lambda batch: batch), ONE)))
    assert isinstance(got, TensorDict)
    assert torch.equal(got["x"], x[:3])
    assert next(iter(faccel.shard(DataLoader(InBatches(4), 2), ONE)))[0] == ("many", "many")
    assert ids(faccel.shard(DataLoader(Subset(Squares(9), [8, 7, 6]), 2), ONE, tail="uneven")) == [
        [8, 7],
        [6],
    ]


def test_the_users_collate_function_is_used():
    loader = DataLoader(
        TensorDataset(torch.arange(4)), 2, collate_fn=lambda rows: [int(r[0]) * 10 for r in rows]
    )
    assert list(faccel.shard(loader, ONE)) == [[0, 10], [20, 30]]


def where(_):
    return os.getpid()


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_read_the_same_batches(persistent):
    data = DataLoader(
        Squares(23),
        4,
        shuffle=True,
        num_workers=2,
        persistent_workers=persistent,
        multiprocessing_context="fork",
    )
    loader = faccel.shard(data, fake_context(1, 2))
    plain = faccel.shard(DataLoader(Squares(23), 4, shuffle=True), fake_context(1, 2))
    for epoch in range(3):
        assert ids(loader.at(epoch)) == ids(plain.at(epoch))
    for _ in loader.at(0):
        break  # a `break` leaves no worker in use
    assert ids(loader.at(3)) == ids(plain.at(3))


def test_persistent_workers_are_reused_and_a_second_iteration_starts_others():
    data = DataLoader(
        Squares(8),
        2,
        collate_fn=lambda rows: ([r["i"] for r in rows], os.getpid()),
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    loader = faccel.shard(data, ONE)
    first = {pid for _, pid in loader.at(0)}
    assert {pid for _, pid in loader.at(1)} == first
    pairs = list(zip(loader.at(0), loader.at(0), strict=True))
    assert all(a[0] == b[0] for a, b in pairs)
    assert {b[1] for _, b in pairs} != first


def test_reading_draws_nothing_from_the_process_wide_generators():
    before = torch.get_rng_state()
    list(faccel.shard(DataLoader(Squares(8), 2, shuffle=True), ONE).at(0))
    list(
        faccel.shard(
            DataLoader(Squares(8), 2, shuffle=True, num_workers=1, multiprocessing_context="fork"),
            ONE,
        ).at(0)
    )
    assert torch.equal(before, torch.get_rng_state())


def test_a_trillion_samples_are_shuffled_lazily():
    loader = faccel.shard(DataLoader(Squares(10**12), 2, shuffle=True), fake_context(3, 512))
    late = loader.resume(faccel.Cursor(7, 99 * 10**10))
    assert len(next(iter(late))["i"]) == 2
    assert len(late) == -(-(10**10) // 1024)


def test_placement_moves_every_tensor_and_leaves_the_rest():
    import attrs

    meta = attrs.evolve(ONE, device=torch.device("meta"))
    batch = next(
        iter(
            faccel.shard(
                DataLoader(Squares(4), 2, collate_fn=lambda rows: {"x": rows[0]["x"], "s": "t"}),
                meta,
            )
        )
    )
    assert batch["x"].device.type == "meta"
    assert batch["s"] == "t"
    off = faccel.shard(DataLoader(Squares(4), 2), meta, device_placement=False)
    assert next(iter(off))["x"].device.type == "cpu"
