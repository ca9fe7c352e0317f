"""`split_batches` of a loader that yields the batches of all ranks ready-made."""

import collections
import dataclasses
import types

import attrs
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


@dataclasses.dataclass
class Sample:
    x: object
    y: object


@attrs.frozen
class Record:
    x: object
    y: object


# Each container of tensors, arrays and columns: all rows of a rank stay aligned.
CONTAINERS = {
    "a dict": lambda x, y: {"x": x, "y": y},
    "an ordered dict": lambda x, y: collections.OrderedDict(x=x, y=y),
    "an immutable dict": lambda x, y: types.MappingProxyType({"x": x, "y": y}),
    "a list": lambda x, y: [x, y],
    "a tuple": lambda x, y: (x, y),
    "a named tuple": Pair,
    "a dataclass": Sample,
    "a record": Record,
}
COLUMNS = {
    "texts": lambda: [f"row {row}" for row in range(5)],
    "a tuple of texts": lambda: tuple(f"row {row}" for row in range(5)),
    "lists of unequal length": lambda: [["row"] * row for row in range(5)],
    "dicts": lambda: [{"row": row} for row in range(5)],
    "an array": lambda: np.arange(5),
}


def fields_of(value):
    """Return the two values of a container."""
    if isinstance(value, collections.abc.Mapping):
        return value["x"], value["y"]
    if isinstance(value, list | tuple):
        return value
    return value.x, value.y


@pytest.mark.parametrize("mode", ["split", "dispatch"])
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_rows_stay_aligned_in_each_container_at_each_depth(container, column, mode):
    build = CONTAINERS[container]
    batches = []
    for inner in CONTAINERS.values():
        batches.append(build(torch.arange(5), inner(COLUMNS[column](), 1)))
        batches.append(inner(torch.arange(5), build(COLUMNS[column](), 1)))

    def fn(ctx):
        results = []
        for part in faccel.shard(batches, ctx, split_batches=True, mode=mode):
            ids, inner = fields_of(part)
            results.append((ids.tolist(), *fields_of(inner)))
        return results

    # Each item beside its number, on both ranks.
    items = COLUMNS[column]()
    for ids, results in zip([[0, 1, 2], [3, 4, 0]], simulate(fn, 2), strict=True):
        expected = [items[row] for row in ids]
        for got, column_of_rank, number in results:
            assert (got, number) == (ids, 1)
            assert type(column_of_rank) is type(items)
            assert list(column_of_rank) == expected


def test_texts_of_the_default_collate_function_are_divided():
    # Samples of a number and two texts: a list with a tuple for each text.
    samples = [(row, (f"q{row}", f"a{row}")) for row in range(4)]

    def fn(ctx):
        loader = faccel.shard(DataLoader(samples, batch_size=4), fake_context(0, 1))
        ((ids, (questions, answers)),) = faccel.shard(list(loader), ctx, split_batches=True)
        return ids.tolist(), questions, answers

    expected = [([0, 1], ("q0", "q1"), ("a0", "a1")), ([2, 3], ("q2", "q3"), ("a2", "a3"))]
    assert list(simulate(fn, 2)) == expected


@pytest.mark.parametrize("mode", ["split", "dispatch"])
@pytest.mark.parametrize("lists", [[("q0", "q1"), ("a0", "a1")], [["q0", "q1"], ["a0", "a1"]]])
def test_lists_that_may_be_rows_or_columns_are_an_error_with_a_fix(lists, mode):
    def fn(ctx, other):
        batches = [{"x": torch.arange(2), "other": other}]
        return [b["other"] for b in faccel.shard(batches, ctx, split_batches=True, mode=mode)]

    with pytest.raises(DataError, match="2 lists of 2 items in a batch of 2 rows"):
        simulate(fn, 2, lists)
    named = dict(zip(["question", "answer"], map(list, lists), strict=True))
    first, second = simulate(fn, 2, named)
    assert first == [{"question": ["q0"], "answer": ["a0"]}]
    assert second == [{"question": ["q1"], "answer": ["a1"]}]
    (first,), (second,) = simulate(fn, 2, np.array(lists, dtype=object))
    assert [*first.tolist(), *second.tolist()] == [list(row) for row in lists]


def memory_of(batch):
    """Return the bytes that the tensors and arrays of a batch keep in memory."""
    tensor, array, other = batch["tensor"], batch["array"], batch["nested"][0]
    base = array if array.base is None else array.base
    return [tensor.untyped_storage().nbytes(), base.nbytes, other.untyped_storage().nbytes()]


@pytest.mark.parametrize("num_rows", [8, 6])  # 6 rows on 4 ranks: some repeat
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_rank_receives_the_memory_of_its_rows_only(num_ranks, num_rows):
    data = torch.zeros(num_rows, 16)
    batches = [{"tensor": data, "array": data.numpy(), "nested": (data.clone(),)}]

    def fn(ctx):
        loader = faccel.shard(batches, ctx, split_batches=True, mode="dispatch")
        (part,) = loader
        return memory_of(part)

    num_bytes = -(-num_rows // num_ranks) * 16 * 4
    assert list(simulate(fn, num_ranks)) == [[num_bytes] * 3] * num_ranks


def test_a_tensordict_is_divided():
    tensordict = pytest.importorskip("tensordict")
    data = tensordict.TensorDict({"x": torch.arange(5)}, batch_size=[5])

    def fn(ctx):
        (part,) = faccel.shard([data], ctx, split_batches=True)
        return part["x"].tolist(), list(part.batch_size)

    assert list(simulate(fn, 2)) == [([0, 1, 2], [3]), ([3, 4, 0], [3])]
    data = {"inner": data, "text": list("abcde")}

    def nested(ctx):
        (part,) = faccel.shard([data], ctx, split_batches=True)
        return part["inner"]["x"].tolist(), list(part["inner"].batch_size), part["text"]

    assert simulate(nested, 2)[1] == ([3, 4, 0], [3], ["d", "e", "a"])


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
