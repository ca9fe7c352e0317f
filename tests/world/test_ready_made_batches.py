"""`split_batches` of a loader that yields the batches of all ranks ready-made."""

import collections

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import faccel
from faccel.errors import DataError, FaccelError
from faccel.testing import fake_context, simulate

LENGTHS = (6, 4, 5, 2)  # rows of each batch
OFFSETS = (0, 6, 10, 15)


def batch(index):
    ids = torch.arange(OFFSETS[index], OFFSETS[index] + LENGTHS[index])
    return {"ids": ids, "square": (ids * ids)[:, None], "text": [f"row {i}" for i in ids.tolist()]}


BATCHES = [batch(index) for index in range(len(LENGTHS))]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(BATCHES)


class Indexed(Dataset):
    def __len__(self):
        return len(BATCHES)

    def __getitem__(self, index):
        return BATCHES[index]


LOADERS = {
    "list": lambda: BATCHES,
    "stream": lambda: DataLoader(Stream(), batch_size=None),
    "items": lambda: DataLoader(Indexed(), batch_size=None),
}


def read(ctx, kind, options, cursor=None):
    loader = faccel.shard(LOADERS[kind](), ctx, split_batches=True, **options)
    if cursor is not None:
        loader = loader.resume(cursor)
    return list(faccel.batches(loader))


def valid_ids(batches):
    return [b.data["ids"][: b.num_valid].tolist() for b in batches]


@pytest.mark.parametrize("mode", ["auto", "dispatch"])
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_each_rank_takes_its_rows_of_each_batch(kind, num_ranks, mode):
    if (kind, mode) == ("items", "dispatch"):
        pytest.skip("every rank can read a map-style dataset")
    ranks = list(simulate(read, num_ranks, kind, {"mode": mode}))
    for index, expected in enumerate(BATCHES):
        parts = [batches[index] for batches in ranks]
        valid = [row for part in parts for row in part.data["ids"][: part.num_valid].tolist()]
        assert valid == expected["ids"].tolist()  # each row once, in the order of the ranks
        # Equally many rows, fewer than `W` of them repeats: each rank repeats one at most.
        assert {len(part.data["ids"]) for part in parts} == {-(-LENGTHS[index] // num_ranks)}
        for part in parts:
            ids = part.data["ids"]
            assert set(ids.tolist()) <= set(expected["ids"].tolist())
            assert torch.equal(part.data["square"], (ids * ids)[:, None])
            assert part.data["text"] == [f"row {i}" for i in ids.tolist()]
    for batches in ranks:
        assert [b.is_last for b in batches] == [False, False, False, True]
        assert batches[-1].cursor.epoch == 1


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gather_with_num_valid_returns_each_row_once(num_ranks):
    def fn(ctx):
        loader = faccel.shard(BATCHES, ctx, split_batches=True)
        gathered = []
        for b in faccel.batches(loader):
            rows = faccel.gather(b.data["ids"], ctx, num_valid=b.num_valid)
            gathered += rows.tolist()
        return gathered

    for rows in simulate(fn, num_ranks):
        assert rows == list(range(sum(LENGTHS)))


def test_drop_leaves_out_what_the_ranks_do_not_divide():
    for batches in simulate(read, 2, "list", {"tail": "drop"}):
        assert [len(b.data["ids"]) for b in batches] == [3, 2, 1]
        assert [b.is_last for b in batches] == [False, False, True]
    (first, *_), (second, *_) = simulate(read, 2, "list", {"tail": "drop"})
    assert first.data["ids"].tolist() == [0, 1, 2]
    assert second.data["ids"].tolist() == [3, 4, 5]


def test_the_epoch_ends_with_the_last_batch_that_is_not_dropped():
    batches = [torch.arange(4), torch.arange(3)]

    def fn(ctx):
        loader = faccel.shard(batches, ctx, split_batches=True, tail="drop")
        return list(faccel.batches(loader))

    for (only,) in simulate(fn, 2):
        assert only.is_last
        assert only.cursor.epoch == 1
    with pytest.raises(DataError, match="none has a multiple of 5 rows"):
        simulate(fn, 5)


def test_uneven_repeats_no_row():
    ranks = simulate(read, 4, "list", {"tail": "uneven"})
    assert [valid_ids(batches) for batches in ranks] == [
        [[0, 1], [6], [10, 11], [15]],
        [[2, 3], [7], [12], [16]],
        [[4], [8], [13]],
        [[5], [9], [14]],
    ]
    for batches in ranks:
        assert [b.is_last for b in batches] == [False] * (len(batches) - 1) + [True]
        assert all(len(b.data["ids"]) == b.num_valid for b in batches)
    # The position is the same on all ranks: after the batch, which is not the last of rank 0.
    assert ranks[3][2].cursor == ranks[0][2].cursor


@pytest.mark.parametrize("kind", LOADERS)
def test_a_cursor_resumes_on_any_number_of_ranks(kind):
    cursor = simulate(read, 2, kind, {})[0][1].cursor
    for num_ranks in (1, 2, 3):
        ranks = list(simulate(read, num_ranks, kind, {}, cursor))
        steps = [
            [row for rank in step for row in rank]
            for step in zip(*map(valid_ids, ranks), strict=True)
        ]
        assert steps == [BATCHES[2]["ids"].tolist(), BATCHES[3]["ids"].tolist()]


def test_a_shuffled_loader_reads_one_order_on_all_ranks():
    def fn(ctx):
        data = DataLoader(Indexed(), batch_size=None, sampler=None, shuffle=True)
        loader = faccel.shard(data, ctx, split_batches=True)
        return valid_ids(faccel.batches(loader.at(1)))

    (alone,) = simulate(fn, 1)
    first, second = simulate(fn, 2)
    assert [[*a, *b] for a, b in zip(first, second, strict=True)] == alone
    assert alone != [b["ids"].tolist() for b in BATCHES]


Pair = collections.namedtuple("Pair", ["x", "y"])
X = torch.arange(4)
KINDS = {
    "a tensor": (X, lambda rows: rows.tolist()),
    "a tuple": ((X, X * 2), lambda rows: [(rows[1] // 2).tolist(), type(rows)]),
    "a list of tensors": ([X, X], lambda rows: rows[1].tolist()),
    "nested": ({"a": {"b": (X,)}}, lambda rows: rows["a"]["b"][0].tolist()),
    "a named tuple": ({"p": Pair(X, X)}, lambda rows: rows["p"].y.tolist()),
    "numpy": ({"x": X.numpy(), "n": np.float64(3)}, lambda rows: rows["x"].tolist()),
    "texts": (list("abcd"), list),
    "a column of texts": ({"s": list("abcd")}, lambda rows: rows["s"]),
    "what has no rows": ({"x": X, "c": ["u", "v"], "k": 7}, lambda r: [r["c"], r["k"]]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_kind_are_divided(kind):
    data, look = KINDS[kind]

    def fn(ctx):
        (part,) = faccel.shard([data], ctx, split_batches=True)
        return look(part)

    expected = {
        "a tuple": [[[0, 1], tuple], [[2, 3], tuple]],
        "texts": [["a", "b"], ["c", "d"]],
        "a column of texts": [["a", "b"], ["c", "d"]],
        "what has no rows": [[["u", "v"], 7]] * 2,
    }
    assert list(simulate(fn, 2)) == expected.get(kind, [[0, 1], [2, 3]])


def test_a_tensordict_is_divided():
    tensordict = pytest.importorskip("tensordict")
    data = tensordict.TensorDict({"x": torch.arange(5)}, batch_size=[5])

    def fn(ctx):
        (part,) = faccel.shard([data], ctx, split_batches=True)
        return part["x"].tolist(), list(part.batch_size)

    assert list(simulate(fn, 2)) == [([0, 1, 2], [3]), ([3, 4, 0], [3])]


def test_the_loader_has_its_number_of_batches_as_length():
    for num_ranks in (1, 3):
        ctx = fake_context(0, num_ranks)
        assert len(faccel.shard(BATCHES, ctx, split_batches=True)) == 4
        assert len(faccel.shard(BATCHES, ctx, split_batches=True).at(0, step=3)) == 1
        with pytest.raises(TypeError, match="depends on the batches"):
            len(faccel.shard(BATCHES, ctx, split_batches=True, tail="drop"))


class Failing(IterableDataset):
    def __iter__(self):
        yield torch.ones(2)
        raise ValueError("no disk")


ERRORS = {
    "other lengths": ([(torch.ones(3), torch.ones(2))], {}, r"lengths \[2, 3\]"),
    "no rows": ([torch.tensor(1.0)], {}, r"lengths \[\]"),
    "static shapes": ([torch.ones(3)], {"tail": "full"}, "equally many rows"),
    "a map-style dataset": (
        DataLoader(Indexed(), batch_size=None), {"mode": "dispatch"}, "map-style",
    ),
    "no batch": ([], {}, "yielded nothing|no batch"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_divided_is_an_error(name):
    data, options, message = ERRORS[name]
    with pytest.raises(DataError, match=message):
        simulate(lambda ctx: list(faccel.shard(data, ctx, split_batches=True, **options)), 2)


@pytest.mark.parametrize("mode", ["split", "dispatch"])
def test_a_reader_that_fails_ends_all_ranks(mode):
    def fn(ctx):
        loader = DataLoader(Failing(), batch_size=None)
        return list(faccel.shard(loader, ctx, split_batches=True, mode=mode))

    with pytest.raises((ValueError, FaccelError), match="no disk"):
        simulate(fn, 2)


@pytest.mark.slow
def test_workers_read_the_same_rows():
    def fn(ctx):
        loader = DataLoader(Stream(), batch_size=None, num_workers=2)
        return valid_ids(faccel.batches(faccel.shard(loader, ctx, split_batches=True)))

    for expected, rank in zip(simulate(read, 2, "list", {}), range(2), strict=True):
        assert fn(fake_context(rank, 2)) == valid_ids(expected)
