"""Megatron-LM's indexed datasets: files and samples of Megatron-core, blends, resuming."""

import itertools
import json
import pathlib
import pickle
import struct

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import faccel
from faccel.data import Blend, IndexedTokens, PackedTokens
from faccel.data.blend import MAX_PERIOD
from faccel.errors import DataError
from faccel.testing import fake_context, simulate
from tests.indexed_files import CODES, write_indexed

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "megatron"
CORPUS = str(GOLDEN / "corpus")
EXPECTED = json.loads((GOLDEN / "samples.json").read_text())
LABELS = [f"{row['length']} of {row['split']}" for row in EXPECTED["datasets"]]


def numbers(sequences):
    return [sequence.tolist() for sequence in sequences]


def documents_of(sequences, boundaries):
    pairs = itertools.pairwise(boundaries)
    return [sequences[begin:end] for begin, end in pairs]


def test_the_sequences_of_a_file_of_megatrons_builder_are_read():
    tokens = IndexedTokens(CORPUS)
    assert numbers(tokens[index] for index in range(len(tokens))) == EXPECTED["sequences"]
    assert tokens[0].dtype == torch.int64
    assert tokens.num_tokens == sum(map(len, EXPECTED["sequences"]))
    assert tokens.num_documents == len(EXPECTED["documents"]) - 1


def test_the_writer_of_these_tests_writes_the_bytes_of_megatrons_builder(tmp_path):
    documents = documents_of(EXPECTED["sequences"], EXPECTED["documents"])
    prefix = write_indexed(tmp_path / "corpus", documents, "uint16")
    for suffix in (".bin", ".idx"):
        written = pathlib.Path(prefix + suffix).read_bytes()
        assert written == (GOLDEN / f"corpus{suffix}").read_bytes()


@pytest.mark.parametrize("row", EXPECTED["datasets"], ids=LABELS)
def test_samples_and_their_number_equal_those_of_megatrons_gpt_dataset(row):
    split = tuple(row["split"])
    if row["num_samples"] == 0:
        with pytest.raises(DataError, match="shorter than one sample"):
            PackedTokens(CORPUS, row["length"], split=split)
        return
    packed = PackedTokens(CORPUS, row["length"], split=split)
    assert len(packed) == row["num_samples"]
    assert numbers(packed) == row["samples"]


@pytest.mark.parametrize("length", [1, 3, 8, 40])
def test_shuffled_documents_are_cut_in_the_new_order(length):
    packed = PackedTokens(CORPUS, length, document_seed=5)
    stream = torch.cat([packed[0][:1], *(sample[1:] for sample in packed)]).tolist()
    assert stream != sorted(stream)
    # The sequences are consecutive numbers, so a stream is their concatenation in some order.
    remaining = [list(sequence) for sequence in EXPECTED["sequences"]]
    while stream:
        (sequence,) = [item for item in remaining if item[0] == stream[0]]
        assert stream[: len(sequence)] == sequence[: len(stream)]
        remaining.remove(sequence)
        stream = stream[len(sequence) :]
    others = PackedTokens(CORPUS, length, document_seed=6)
    assert len(others) == len(packed) == (129 - 1) // length
    assert numbers(others) != numbers(packed)


@pytest.mark.parametrize("dtype", CODES)
def test_every_type_of_integer_is_read(tmp_path, dtype):
    largest = min(np.iinfo(dtype).max, 2**31)
    prefix = write_indexed(tmp_path / "tokens", [[[0, 1], [2]], [[largest, 3]]], dtype)
    assert numbers(PackedTokens(f"{prefix}.bin", 2)) == [[0, 1, 2], [2, largest, 3]]


def test_a_dataset_is_pickled_by_its_path():
    packed = PackedTokens(CORPUS, 8, split=(0.0, 0.7), document_seed=1)
    data = pickle.dumps(packed)
    assert len(data) < 1000
    assert numbers(pickle.loads(data)) == numbers(packed)


def test_samples_are_independent_of_the_file_and_of_each_other():
    packed = PackedTokens(CORPUS, 8)
    packed[0].zero_()
    assert packed[0].tolist() == list(range(9))
    assert packed[-1].tolist() == packed[len(packed) - 1].tolist()
    with pytest.raises(IndexError):
        packed[len(packed)]


def without_documents(data):
    """Return an index of no document boundaries."""
    (num_sequences,) = struct.unpack("<Q", data[18:26])
    return data[:26] + struct.pack("<Q", 0) + data[34 : 34 + 12 * num_sequences]


# Lengths and positions in bytes of three sequences of 7 tokens of 2 bytes, and the sequence whose
# tokens are not where the index has them.
WRONG_INDEX = {
    "a position after the end": ((2, 3, 2), (0, 1000, 10), 1),
    "a negative position": ((2, 3, 2), (0, -4, 10), 1),
    "half a token": ((2, 3, 2), (0, 5, 10), 1),
    "a negative length": ((2, -3, 2), (0, 4, 10), 1),
    "a length of another sequence": ((2, 2**31 - 1, 2), (0, 4, 10), 1),
}


@pytest.mark.parametrize("name", WRONG_INDEX)
def test_an_index_that_is_wrong_in_the_middle_is_an_error_and_no_shorter_sample(tmp_path, name):
    lengths, positions, wrong = WRONG_INDEX[name]
    header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, 3, 4)
    index = np.array(lengths, "<i4").tobytes() + np.array(positions, "<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(header + index + np.arange(4, dtype="<i8").tobytes())
    (tmp_path / "a.bin").write_bytes(np.arange(7, dtype="<u2").tobytes())
    tokens = IndexedTokens(tmp_path / "a")
    assert tokens[0].tolist() == [0, 1]
    with pytest.raises(DataError, match="incomplete"):
        tokens[wrong]
    # Documents that are shuffled are found by their lengths.
    if sum(lengths) != 7:
        with pytest.raises(DataError, match="incomplete"):
            PackedTokens(tokens, 2, document_seed=0)


def test_empty_documents_and_one_document_are_packed(tmp_path):
    for number, lengths in enumerate([[0, 3, 0, 0, 4, 0], [7], [0, 7]]):
        header = struct.pack("<9sQBQQ", b"MMIDIDX", 1, 8, len(lengths), len(lengths) + 1)
        sizes = np.array(lengths, "<i4")
        index = sizes.tobytes() + (2 * (np.cumsum(sizes) - sizes)).astype("<i8").tobytes()
        documents = np.arange(len(lengths) + 1, dtype="<i8").tobytes()
        (tmp_path / f"{number}.idx").write_bytes(header + index + documents)
        (tmp_path / f"{number}.bin").write_bytes(np.arange(7, dtype="<u2").tobytes())
        packed = PackedTokens(tmp_path / str(number), 2)
        assert [x.tolist() for x in packed] == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
        shuffled = PackedTokens(tmp_path / str(number), 6, document_seed=1)
        assert sorted(shuffled[0].tolist()) == list(range(7))


# What is written over a file, and the error.
DAMAGE = {
    "another file": (".idx", lambda data: b"PK" + data, "is not the index"),
    "a short header": (".idx", lambda data: data[:20], "is not the index"),
    "an unknown version": (".idx", lambda data: data[:9] + b"\2" + data[10:], "unknown version"),
    "floats": (".idx", lambda data: data[:17] + b"\6" + data[18:], "has no tokens"),
    "a cut index": (".idx", lambda data: data[:-1], "incomplete"),
    "cut tokens": (".bin", lambda data: data[:-2], "incomplete"),
    "no documents": (".idx", lambda data: without_documents(data), "incomplete"),
    "half a token": (".bin", lambda data: data[:-1], "no multiple of 2"),
    "no tokens": (".bin", lambda data: b"", "no tokens"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_an_error(tmp_path, name):
    suffix, damage, message = DAMAGE[name]
    for end in (".bin", ".idx"):
        (tmp_path / f"a{end}").write_bytes((GOLDEN / f"corpus{end}").read_bytes())
    path = tmp_path / f"a{suffix}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        IndexedTokens(tmp_path / "a")


@pytest.mark.parametrize(
    "make",
    [
        lambda: IndexedTokens(3),
        lambda: PackedTokens(3, 8),
        lambda: PackedTokens(CORPUS, 0),
        lambda: PackedTokens(CORPUS, 8, split=(0.5, 0.5)),
        lambda: PackedTokens(CORPUS, 8, split=0.5),
        lambda: PackedTokens(CORPUS, 129),
        lambda: PackedTokens(CORPUS, 8, split=("0", "1")),
        lambda: PackedTokens(CORPUS, 8, split=(None, 1)),
        lambda: PackedTokens(CORPUS, 8, document_seed="0"),
        lambda: PackedTokens(CORPUS, 8, document_seed=0.5),
        lambda: IndexedTokens("a\0b"),
        lambda: Blend([[1], [2]], "12"),
        lambda: Blend([iter([1]), [2]], (1, 1)),
        lambda: Blend(3, (1,)),
        lambda: Blend([[1]], (1,), seed="0"),
        lambda: Blend([[1]], (1,), size=10**30),
        lambda: Blend([[1]], (0.5, 0.5)),
        lambda: Blend([[1], []], (0.5, 0.5)),
        lambda: Blend([[1], [2]], (0.5, -0.5)),
        lambda: Blend([[1], [2]], "ab"),
        lambda: Blend([], ()),
        lambda: Blend([[1], [2]], (1, 1), size=0),
        lambda: Blend([[1], [2]], (1, 10**6)),
    ],
)
def test_an_invalid_argument_is_an_error_with_a_fix(make):
    with pytest.raises(DataError) as error:
        make()
    assert error.value.fix


@pytest.mark.parametrize("weights", [(123456789, 987654321), (1e-9, 1), (1, 1e-300), (1e300, 3)])
def test_the_fix_for_weights_with_a_long_period_works(weights):
    with pytest.raises(DataError) as error:
        Blend([[1] * 9, [2] * 9], weights)
    rounded = eval(error.value.fix.partition("weights=")[2].rstrip("`"))
    blend = Blend([[1] * 9, [2] * 9], rounded, size=10**4)
    first = sum(blend.source_of(i)[0] == 0 for i in range(10**4))
    assert first == pytest.approx(10**4 * weights[0] / sum(weights), abs=1.1)


def test_a_blend_may_have_more_datasets_than_a_16_bit_number():
    blend = Blend([[number] for number in range(40_000)], (1,) * 40_000)
    assert {blend[index] for index in range(40_000)} == set(range(40_000))


WEIGHTS = [
    (1.0,),
    (1, 1),
    (0.7, 0.3),
    (0.9, 0.05, 0.05),
    (0.1,) * 10,
    (0.3, 0.3, 0.2, 0.1, 0.05, 0.05),
    (12.5, 37.5, 0.1, 49.9),
    (997, 1, 1, 1),
    (0.123, 0.877),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_proportions_are_exact_at_every_prefix_to_one_sample(weights):
    size = 5000
    blend = Blend([range(10**9)] * len(weights), weights, size=size, seed=None)
    sources = np.array([blend.source_of(index) for index in range(size)])
    expected = np.array(weights, np.float64) / sum(weights)
    counts = np.cumsum(sources[:, :1] == np.arange(len(weights)), axis=0)
    error = counts - np.arange(1, size + 1)[:, None] * expected
    assert abs(error).max() < 1
    # Each dataset is read in its order, without a gap.
    for number in range(len(weights)):
        positions = sources[sources[:, 0] == number, 1]
        assert positions.tolist() == list(range(len(positions)))


def test_a_random_blend_is_exact_at_every_prefix():
    generator = np.random.default_rng(0)
    for _ in range(50):
        counts = generator.integers(1, 60, generator.integers(2, 12))
        blend = Blend([range(10**6)] * len(counts), counts, size=2 * int(counts.sum()))
        numbers_ = np.array([blend.source_of(index)[0] for index in range(len(blend))])
        seen = np.cumsum(numbers_[:, None] == np.arange(len(counts)), axis=0)
        exact = np.arange(1, len(blend) + 1)[:, None] * counts  # times the period, as integers
        assert (abs(seen * counts.sum() - exact) < counts.sum()).all()


def test_the_largest_period_is_computed_in_seconds():
    blend = Blend([range(10**9)] * 3, (0.333333, 0.333333, 0.333334), size=10**12)
    assert MAX_PERIOD >= 500_000
    number, position = blend.source_of(10**12 - 1)
    assert abs(position - 10**12 / 3) < 10**6 and number in (0, 1, 2)


def test_a_dataset_is_repeated_in_another_order():
    blend = Blend([range(10), range(100, 110)], (1, 1), size=40)
    samples = [blend[index] for index in range(40)]
    first, second = samples[:20], samples[20:]
    assert sorted(first) == sorted(second) == [*range(10), *range(100, 110)]
    assert first != second
    orders = [[x % 100 for x in first if x < 50], [x % 100 for x in first if x > 50]]
    assert orders[0] != orders[1]
    assert len(Blend([range(10), range(40)], (0.1, 0.9))) == 44


def test_a_blend_of_packed_files_resumes_at_another_world_size_and_sees_each_sample_once(tmp_path):
    second = write_indexed(tmp_path / "second", [[list(range(1000, 1200))]])
    blend = Blend([PackedTokens(CORPUS, 4), PackedTokens(second, 4)], (0.4, 0.6))
    expected = [blend[index].tolist() for index in range(len(blend))]
    assert len({tuple(sample) for sample in expected}) == len(blend) == 80

    def read(ctx, cursor, num_steps):
        loader = faccel.shard(DataLoader(blend, 12 // ctx.world_size), ctx)
        rows, after = [], cursor
        for step, batch in enumerate(faccel.batches(loader.resume(cursor))):
            if step == num_steps:
                break
            rows += numbers(faccel.gather(batch.data, ctx, num_valid=batch.num_valid))
            after = batch.cursor
        return rows, after

    seen, cursor = [], faccel.Cursor()
    for world_size, num_steps in ((2, 2), (4, 3), (1, 1), (3, 99)):
        rows, cursor = simulate(read, world_size, cursor, num_steps)[0]
        seen += rows
    assert seen == expected


def test_a_shuffled_epoch_has_each_sample_once_in_another_order():
    packed = PackedTokens(CORPUS, 4)
    loader = faccel.shard(DataLoader(packed, 8, shuffle=True), fake_context(0, 1))
    epochs = [numbers(torch.cat(list(loader.at(epoch)))) for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(numbers(packed))
    assert epochs[0] != epochs[1]
