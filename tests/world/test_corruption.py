"""What a disk can do to a checkpoint: it is found, named, and the older one loads."""

import os
import pathlib
import random
import shutil

import pytest
import torch

import faccel
from faccel.errors import CheckpointError
from faccel.testing import fake_context, simulate

ONE = fake_context(0, 1)


def state(value):
    return {
        "model": torch.nn.Linear(6, 5),
        "x": torch.full((40,), float(value)),
        "n": value,
        "rng": faccel.rng_state(ONE),
        "text": "é" * 20,
    }


@pytest.fixture
def runs(tmp_path):
    """Two checkpoints, the newer one of two ranks' files."""
    for value in (1, 2):
        simulate(lambda ctx, value=value: faccel.save(state(value), tmp_path, ctx, step=value), 2)
    return tmp_path


def newest(runs):
    return pathlib.Path(faccel.checkpoint.checkpoints(runs)[0].path)


def check_found(runs, caplog, name):
    caplog.clear()
    got = faccel.load(state(0), runs, ONE)
    assert got["n"] == 1
    assert got["x"].tolist() == [1.0] * 40
    assert "step-000000002" in caplog.text
    assert (name in caplog.text) or ("manifest" in caplog.text)
    with pytest.raises(CheckpointError, match="step 2"):
        faccel.load(state(0), runs, ONE, step=2)


def test_two_hundred_flipped_bits_are_found(runs, caplog):
    folder, draw = newest(runs), random.Random(0)
    files = sorted(folder.iterdir())
    sizes = [file.stat().st_size for file in files]
    assert len(files) == 3
    for _ in range(200):
        file = draw.choices(files, sizes)[0]
        data = bytearray(file.read_bytes())
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)
        original = file.read_bytes()
        file.write_bytes(data)
        check_found(runs, caplog, file.name)
        file.write_bytes(original)
    assert faccel.load(state(0), runs, ONE)["n"] == 2


def test_every_bit_of_the_first_line_of_the_manifest_counts(runs):
    file = newest(runs) / "manifest.json"
    original = file.read_bytes()
    for at in range(original.index(b"\n") + 1):
        for bit in range(8):
            data = bytearray(original)
            data[at] ^= 1 << bit
            file.write_bytes(data)
            assert faccel.checkpoint.checkpoints(runs)[0].problem is not None, (at, bit)


def test_truncated_and_deleted_files_are_found(runs, caplog):
    folder = newest(runs)
    for file in sorted(folder.iterdir()):
        original = file.read_bytes()
        for length in (0, 1, len(original) // 2, len(original) - 1):
            file.write_bytes(original[:length])
            check_found(runs, caplog, file.name)
        file.write_bytes(original + b"\0")
        check_found(runs, caplog, file.name)
        file.unlink()
        check_found(runs, caplog, file.name)
        file.write_bytes(original)
    shutil.rmtree(folder)
    folder.mkdir()
    caplog.clear()
    assert faccel.load(state(0), runs, ONE)["n"] == 1


def test_every_rank_hears_of_it_and_loads_the_older_one(runs):
    file = sorted(newest(runs).glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-3] ^= 8
    file.write_bytes(data)

    def fn(ctx):
        module = torch.nn.Linear(6, 5)
        before = module.weight.detach().clone()
        with pytest.raises(CheckpointError, match=file.name):
            faccel.load(state(0) | {"model": module}, runs, ctx, step=2)
        assert torch.equal(module.weight, before)  # nothing was written
        return faccel.load(state(0), runs, ctx)["n"]

    assert simulate(fn, 3) == (1, 1, 1)


def test_nothing_valid_is_an_error_that_lists_what_was_wrong(runs):
    for folder in runs.glob("step-*"):
        os.unlink(folder / "manifest.json")
    with pytest.raises(CheckpointError, match=r"step 2: no manifest.*step 1: no manifest"):
        faccel.load(state(0), runs, ONE)
