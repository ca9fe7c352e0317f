"""The `datasets` library: tables, streams that resume from their own state, batches of tokens."""

import datasets
import pytest
import torch
import transformers as hf
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset

import faccel
from faccel.data.order import Cursor
from faccel.errors import DataError, RankFailedError
from faccel.testing import fake_context, simulate


class Counted(datasets.Dataset):
    """A table that counts how it is read."""

    reads: list

    def __getitems__(self, keys):
        self.reads.append(len(keys))
        return super().__getitems__(keys)

    def __getitem__(self, key):
        assert not isinstance(key, int), "read one by one"
        return super().__getitem__(key)


def table(n=23):
    return datasets.Dataset.from_dict({"x": list(range(n)), "text": [f"row {i}" for i in range(n)]})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_table_is_read_a_whole_batch_at_a_time_and_each_row_once(workers):
    seen, texts = [], []
    for rank in range(2):
        data = table().with_format("torch")
        data.__class__, data.reads = Counted, []
        options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
        loader = faccel.shard(
            DataLoader(data, 4, shuffle=True, **options), fake_context(rank, 2)
        ).at(1)
        for batch in faccel.batches(loader):
            assert batch.data["x"].dtype == torch.int64
            seen += batch.data["x"][: batch.num_valid].tolist()
            texts += batch.data["text"][: batch.num_valid]
        assert workers or data.reads == [4, 4, 4]
    assert sorted(seen) == list(range(23))
    assert texts == [f"row {i}" for i in seen]


def test_a_table_resumes_from_any_position_on_another_world_size():
    def read(rank, world_size, cursor=None):
        loader = faccel.shard(DataLoader(table(), 2, shuffle=True), fake_context(rank, world_size))
        loader = loader.at(3) if cursor is None else loader.resume(cursor)
        return [(b.data["x"][: b.num_valid].tolist(), b.cursor) for b in faccel.batches(loader)]

    first = [read(rank, 2)[:3] for rank in range(2)]
    resumed = [read(rank, 3, first[0][-1][1]) for rank in range(3)]
    assert sorted(
        i for rank_batches in first + resumed for rows, _ in rank_batches for i in rows
    ) == list(range(23))


def test_tokens_are_padded_by_the_batch_and_keep_their_class():
    """A `BatchEncoding` is a mapping with more attributes; the collator returns one."""
    rows = [{"input_ids": list(range(2, 3 + i)), "labels": i % 2} for i in range(10)]
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {str(i): i for i in range(2, 20)}
    pad = hf.DataCollatorWithPadding(hf.BertTokenizer(vocab=vocabulary))
    data = datasets.Dataset.from_list(rows)

    def fn(ctx):
        loader = faccel.shard(DataLoader(data, 2, collate_fn=pad), ctx)
        lengths_of_batches = []
        for batch in faccel.batches(loader):
            ids, slices = batch.data["input_ids"], faccel.split(batch.data, ctx)
            assert ids.shape[1] == batch.data["attention_mask"].sum(1).max()
            assert type(batch.data) is type(slices) is hf.BatchEncoding
            lengths = faccel.gather(
                batch.data["attention_mask"].sum(1), ctx, num_valid=batch.num_valid
            )
            padded = faccel.comm.pad_across({"input_ids": ids}, ctx, dim=1)["input_ids"]
            assert len(faccel.gather(padded, ctx, num_valid=batch.num_valid)) == len(lengths)
            lengths_of_batches.append(lengths)
        return torch.cat(lengths_of_batches).tolist()

    assert simulate(fn, 2) == (list(range(1, 11)),) * 2


def rows_of(shards):
    for shard in shards:
        for i in range(5):
            READ.append(1)
            yield {"x": shard * 100 + i}


READ = []


def stream(buffer=None, num_shards=4):
    data = datasets.IterableDataset.from_generator(
        rows_of, gen_kwargs={"shards": list(range(num_shards))}
    )
    return data.shuffle(seed=3, buffer_size=buffer) if buffer else data


def read(data, rank, world_size, cursor=None, epoch=0, workers=0):
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    loader = faccel.shard(DataLoader(data, 2, **options), fake_context(rank, world_size))
    loader = loader.at(epoch) if cursor is None else loader.resume(cursor)
    return [(b.data["x"].tolist(), b.num_valid, b.cursor) for b in faccel.batches(loader)]


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("buffer", [None, 6])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_stream_resumes_after_any_batch_with_the_same_samples(world_size, buffer, epoch):
    """A shuffle buffer is not in the state: such a stream is read from its beginning."""
    uninterrupted = [
        read(stream(buffer), rank, world_size, epoch=epoch) for rank in range(world_size)
    ]
    assert sorted(
        {x for rank_batches in uninterrupted for rows, n, _ in rank_batches for x in rows[:n]}
    ) == [shard * 100 + i for shard in range(4) for i in range(5)]
    for rank, rank_batches in enumerate(uninterrupted):
        assert rank_batches[-1][2] == Cursor(epoch + 1)
        for i, (_, _, cursor) in enumerate(rank_batches[:-1]):
            resumed = read(stream(buffer), rank, world_size, cursor)
            assert [record[:2] for record in resumed[:-1]] == [
                record[:2] for record in rank_batches[i + 1 : -1]
            ]
            assert resumed[-1][0][: resumed[-1][1]] == rank_batches[-1][0][: rank_batches[-1][1]]


def test_a_stream_resumes_from_its_state_without_reading_samples_again(tmp_path):
    ctx = fake_context(0, 1)
    cursor = read(stream(num_shards=8), 0, 1)[14][2]
    faccel.save({"cursor": cursor}, tmp_path, ctx, step=1)  # plain values: it is in any checkpoint
    cursor = faccel.load({"cursor": Cursor()}, tmp_path, ctx)["cursor"]
    READ.clear()
    assert read(stream(num_shards=8), 0, 1, cursor)[0][0] == [600, 601]
    assert len(READ) <= 15  # of 40: it resumes in the same shard


@pytest.mark.parametrize("mode", ["auto", "shards"])
def test_a_stream_starts_at_its_beginning_again_after_a_resume(mode):
    loader = faccel.shard(DataLoader(stream(), 2), fake_context(0, 1), mode=mode)
    first = [b.data["x"].tolist() for b in faccel.batches(loader)]
    cursor = next(faccel.batches(loader)).cursor
    assert [b["x"].tolist() for b in loader.resume(cursor)] == first[1:]
    assert [b["x"].tolist() for b in loader.at(0)] == first


def test_workers_change_nothing_of_a_stream():
    for buffer in (None, 6):
        assert [r[:2] for r in read(stream(buffer), 1, 2, workers=2)] == [
            r[:2] for r in read(stream(buffer), 1, 2)
        ]


def own_shards(ctx, cursor=None, tail="pad", workers=0, buffer=None, num_shards=4):
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    data = stream(buffer, num_shards)
    loader = faccel.shard(DataLoader(data, 2, **options), ctx, mode="shards", tail=tail)
    loader = loader.at(1) if cursor is None else loader.resume(cursor)
    return [
        (b.data["x"].tolist(), b.num_valid, b.step, b.is_last, b.cursor)
        for b in faccel.batches(loader)
    ]


@pytest.mark.parametrize("buffer", [None, 6])
@pytest.mark.parametrize(("world_size", "num_shards"), [(1, 4), (2, 4), (3, 4), (2, 3)])
def test_each_rank_reads_its_own_shards_and_resumes_after_any_batch(world_size, num_shards, buffer):
    READ.clear()
    uninterrupted = simulate(
        lambda ctx: own_shards(ctx, buffer=buffer, num_shards=num_shards), world_size
    )
    assert (
        len(READ) <= 5 * num_shards + 2 * world_size * 6
    )  # once, and the beginning again for padding
    seen = [x for rank_batches in uninterrupted for rows, n, *_ in rank_batches for x in rows[:n]]
    assert sorted(seen) == [shard * 100 + i for shard in range(num_shards) for i in range(5)]
    steps = len(uninterrupted[0])
    for rank, rank_batches in enumerate(uninterrupted):
        assert [record[3] for record in rank_batches] == [False] * (steps - 1) + [True]
        assert rank_batches[-1][4] == Cursor(2)
        assert not {x // 100 for rows, *_ in rank_batches for x in rows} & {
            x // 100
            for other, resumed in enumerate(uninterrupted)
            if other != rank
            for rows, *_ in resumed
            for x in rows
        }
    for i in range(steps - 1):
        cursor = uninterrupted[0][i][4]
        resumed = simulate(
            lambda ctx, c=cursor: own_shards(ctx, c, buffer=buffer, num_shards=num_shards),
            world_size,
        )
        for after, expected in zip(resumed, uninterrupted, strict=True):
            assert [record[:2] for record in after] == [record[:2] for record in expected[i + 1 :]]


def test_shards_drop_partial_steps_and_workers_change_nothing():
    batches = simulate(lambda ctx: own_shards(ctx, tail="drop", num_shards=3), 2)
    assert [len(rank_batches) for rank_batches in batches] == [
        2,
        2,
    ]  # the second rank has one shard of five rows
    assert all(n == 2 for rank_batches in batches for _, n, *_ in rank_batches)
    (alone,) = simulate(own_shards, 1)
    assert simulate(lambda ctx: own_shards(ctx, workers=2), 1)[0] == alone


def test_a_checkpoint_has_the_position_of_every_rank(tmp_path):
    def fn(ctx):
        cursor = own_shards(ctx)[1][4]
        faccel.save({"cursor": cursor}, tmp_path, ctx, step=1)
        loaded = faccel.load({"cursor": Cursor()}, tmp_path, ctx)["cursor"]
        return own_shards(ctx, loaded) == own_shards(ctx, cursor)

    assert simulate(fn, 2) == (True, True)
    with pytest.raises(DataError, match="position for each rank"):
        simulate(lambda ctx: own_shards(ctx, own_shards(fake_context(0, 1))[0][4]), 2)


def test_an_error_while_a_rank_reads_its_shard_reaches_every_rank():
    def broken(shards):
        for shard in shards:
            yield {"x": shard}
            if shard == 1:
                raise OSError("no such file")

    data = datasets.IterableDataset.from_generator(broken, gen_kwargs={"shards": [0, 1]})
    seen = []

    def fn(ctx):
        try:
            list(faccel.shard(DataLoader(data, 1), ctx, mode="shards"))
        except RankFailedError as error:
            seen.append("no such file" in error.got)
            raise

    with pytest.raises(RankFailedError):
        simulate(fn, 2)
    assert seen == [True, True]


@pytest.mark.parametrize("num_shards", [4, 3])  # split by shards, and by examples
@pytest.mark.parametrize("mode", ["auto", "local"])
def test_a_stream_that_is_split_by_node_is_read_whole(mode, num_shards):
    def fn(ctx):
        data = split_dataset_by_node(stream(num_shards=num_shards), ctx.rank, ctx.world_size)
        loader = faccel.shard(DataLoader(data, 2), ctx, mode=mode)
        read = [(b.data["x"], b.num_valid, b.cursor) for b in faccel.batches(loader)]
        cursor = read[0][2]
        resumed = [b.data["x"].tolist() for b in faccel.batches(loader.resume(cursor))]
        assert resumed == [rows.tolist() for rows, _, _ in read[1:]]
        return [x for rows, count, _ in read for x in rows[:count].tolist()]

    seen = [x for rows in simulate(fn, 2) for x in rows]
    assert sorted(seen) == [shard * 100 + i for shard in range(num_shards) for i in range(5)]


@pytest.mark.parametrize("mode", ["split", "dispatch", "shards"])
def test_a_split_stream_cannot_be_split_again(mode):
    data = split_dataset_by_node(stream(), 0, 2)
    with pytest.raises(DataError, match='mode="local"'):
        faccel.shard(DataLoader(data, 2), fake_context(0, 2), mode=mode)
    with pytest.raises(DataError, match="another number of ranks"):
        faccel.shard(DataLoader(data, 2), fake_context(0, 3))
    with pytest.raises(DataError, match="another rank"):
        faccel.shard(DataLoader(data, 2), fake_context(1, 2))


def test_a_table_that_is_split_by_node_is_found_in_debug_mode_and_read_whole():
    def fn(ctx, mode):
        data = split_dataset_by_node(table(), ctx.rank, ctx.world_size)
        loader = faccel.shard(DataLoader(data, 2, shuffle=True), ctx, mode=mode).at(0)
        return [x for b in faccel.batches(loader) for x in b.data["x"][: b.num_valid].tolist()]

    with pytest.raises(DataError, match='mode="local"'):
        simulate(fn, 2, "auto", config={"debug": True})
    seen = [x for rows in simulate(fn, 2, "local", config={"debug": True}) for x in rows]
    assert sorted(seen) == list(range(23))


def test_datasets_without_usable_shards_are_an_error():
    ctx = fake_context(0, 2)
    for loader, options, what in (
        (DataLoader(stream(num_shards=1), 2), {}, "1 shards"),
        (DataLoader(table(), 2), {}, "a Dataset"),
        (DataLoader(stream(), batch_size=None), {}, "without a `batch_size`"),
        (DataLoader(stream(), 2), {"tail": "uneven"}, "uneven"),
    ):
        with pytest.raises(DataError) as caught:
            faccel.shard(loader, ctx, mode="shards", **options)
        assert what in caught.value.got
    with pytest.raises(TypeError):
        len(faccel.shard(DataLoader(stream(), 2), ctx, mode="shards"))


class Restarting(IterableDataset):
    """A stream with a length per shard; its state is the same at its end and its beginning."""

    def __init__(self, lengths):
        self.lengths, self.num_shards, self.at = lengths, len(lengths), 0

    def shard(self, num_shards, index):
        return Restarting(self.lengths[index::num_shards])

    def __iter__(self):
        while self.at < sum(self.lengths):
            self.at += 1
            yield torch.tensor(self.at)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_rank_without_samples_left_stays_so_after_a_resume():
    def fn(ctx):
        def read(cursor=None):
            loader = faccel.shard(DataLoader(Restarting([2, 6]), 2), ctx, mode="shards")
            loader = loader.at(0) if cursor is None else loader.resume(cursor)
            return [(b.data.tolist(), b.num_valid, b.cursor) for b in faccel.batches(loader)]

        uninterrupted = read()
        return [record[:2] for record in uninterrupted], [
            record[:2] for record in read(uninterrupted[0][2])
        ]

    for number, (uninterrupted, resumed) in enumerate(simulate(fn, 2)):
        assert [n for _, n in uninterrupted] == ([2, 0, 0] if number == 0 else [2, 2, 2])
        assert resumed == uninterrupted[1:]
