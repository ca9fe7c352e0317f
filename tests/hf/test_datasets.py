"""The `datasets` library: whole batches of tables, streams that go on from their own state, batches of tokens."""

import datasets
import pytest
import torch
import transformers as hf
from torch.utils.data import DataLoader

import faccel
from faccel.data.order import Cursor
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
        loader = faccel.shard(DataLoader(data, 4, shuffle=True, **options), fake_context(rank, 2)).at(1)
        for batch in faccel.batches(loader):
            assert batch.data["x"].dtype == torch.int64
            seen += batch.data["x"][: batch.num_valid].tolist()
            texts += batch.data["text"][: batch.num_valid]
        assert workers or data.reads == [4, 4, 4]
    assert sorted(seen) == list(range(23))
    assert texts == [f"row {i}" for i in seen]


def test_any_place_of_a_table_is_reached_on_another_world_size():
    def read(rank, world_size, cursor=None):
        loader = faccel.shard(DataLoader(table(), 2, shuffle=True), fake_context(rank, world_size))
        loader = loader.at(3) if cursor is None else loader.resume(cursor)
        return [(b.data["x"][: b.num_valid].tolist(), b.cursor) for b in faccel.batches(loader)]

    first = [read(rank, 2)[:3] for rank in range(2)]
    rest = [read(rank, 3, first[0][-1][1]) for rank in range(3)]
    assert sorted(i for part in first + rest for rows, _ in part for i in rows) == list(range(23))


def test_tokens_are_padded_by_the_batch_and_travel_as_what_they_are():
    """A `BatchEncoding` is a mapping with more in it; `DataCollatorWithPadding` makes one of rows of any lengths."""
    rows = [{"input_ids": list(range(2, 3 + i)), "labels": i % 2} for i in range(10)]
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {str(i): i for i in range(2, 20)}
    pad = hf.DataCollatorWithPadding(hf.BertTokenizer(vocab=vocabulary))
    data = datasets.Dataset.from_list(rows)

    def fn(ctx):
        loader = faccel.shard(DataLoader(data, 2, collate_fn=pad), ctx)
        found = []
        for batch in faccel.batches(loader):
            ids, parts = batch.data["input_ids"], faccel.split(batch.data, ctx)
            assert ids.shape[1] == batch.data["attention_mask"].sum(1).max()
            assert type(batch.data) is type(parts) is hf.BatchEncoding
            lengths = faccel.gather(batch.data["attention_mask"].sum(1), ctx, num_valid=batch.num_valid)
            padded = faccel.pad_across({"input_ids": ids}, ctx, dim=1)["input_ids"]
            assert len(faccel.gather(padded, ctx, num_valid=batch.num_valid)) == len(lengths)
            found.append(lengths)
        return torch.cat(found).tolist()

    assert simulate(fn, 2) == (list(range(1, 11)),) * 2


def rows_of(shards):
    for shard in shards:
        for i in range(5):
            READ.append(1)
            yield {"x": shard * 100 + i}


READ = []


def stream(buffer=None, num_shards=4):
    data = datasets.IterableDataset.from_generator(rows_of, gen_kwargs={"shards": list(range(num_shards))})
    return data.shuffle(seed=3, buffer_size=buffer) if buffer else data


def read(data, rank, world_size, cursor=None, epoch=0, workers=0):
    options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
    loader = faccel.shard(DataLoader(data, 2, **options), fake_context(rank, world_size))
    loader = loader.at(epoch) if cursor is None else loader.resume(cursor)
    return [(b.data["x"].tolist(), b.num_valid, b.cursor) for b in faccel.batches(loader)]


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("buffer", [None, 6])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_stream_goes_on_from_any_batch_as_if_it_had_not_stopped(world_size, buffer, epoch):
    """Also with a shuffle buffer, which the state of the library leaves out: then the stream is passed over."""
    whole = [read(stream(buffer), rank, world_size, epoch=epoch) for rank in range(world_size)]
    assert sorted({x for part in whole for rows, n, _ in part for x in rows[:n]}) == [
        shard * 100 + i for shard in range(4) for i in range(5)
    ]
    for rank, part in enumerate(whole):
        assert part[-1][2] == Cursor(epoch + 1)
        for i, (_, _, cursor) in enumerate(part[:-1]):
            rest = read(stream(buffer), rank, world_size, cursor)
            assert [each[:2] for each in rest[:-1]] == [each[:2] for each in part[i + 1 : -1]]
            assert rest[-1][0][: rest[-1][1]] == part[-1][0][: part[-1][1]]


def test_the_state_of_a_stream_is_used_so_that_nothing_is_read_twice(tmp_path):
    ctx = fake_context(0, 1)
    cursor = read(stream(num_shards=8), 0, 1)[14][2]
    faccel.save(tmp_path, {"cursor": cursor}, ctx, step=1)  # plain values: it is in any checkpoint
    cursor = faccel.load(tmp_path, {"cursor": Cursor()}, ctx)["cursor"]
    READ.clear()
    assert read(stream(num_shards=8), 0, 1, cursor)[0][0] == [600, 601]
    assert len(READ) <= 15  # of 40: it goes on in the shard where it was


def test_workers_change_nothing_of_a_stream():
    for buffer in (None, 6):
        assert [r[:2] for r in read(stream(buffer), 1, 2, workers=2)] == [r[:2] for r in read(stream(buffer), 1, 2)]
