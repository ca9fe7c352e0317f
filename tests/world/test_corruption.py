"""Corruption by a disk: `load` detects it, names the file, and loads an older checkpoint."""

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
    """Return a directory with two checkpoints, each with the files of two ranks."""
    for value in (1, 2):
        simulate(lambda ctx, value=value: faccel.save(state(value), tmp_path, ctx, step=value), 2)
    return tmp_path


def newest(runs):
    return pathlib.Path(faccel.checkpoint.checkpoints(runs)[0].path)


def check_detected(runs, caplog, name):
    caplog.clear()
    loaded = faccel.load(state(0), runs, ONE)
    assert loaded["n"] == 1
    assert loaded["x"].tolist() == [1.0] * 40
    assert "step-000000002" in caplog.text
    assert (name in caplog.text) or ("manifest" in caplog.text)
    with pytest.raises(CheckpointError, match="step 2"):
        faccel.load(state(0), runs, ONE, step=2)


@pytest.mark.parametrize("num_flips", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_flipped_bits_are_detected(runs, caplog, num_flips):
    folder, draw = newest(runs), random.Random(0)
    files = sorted(folder.iterdir())
    sizes = [file.stat().st_size for file in files]
    assert len(files) == 3
    for _ in range(num_flips):
        file = draw.choices(files, sizes)[0]
        data = bytearray(file.read_bytes())
        index = draw.randrange(len(data))
        data[index] ^= 1 << draw.randrange(8)
        original = file.read_bytes()
        file.write_bytes(data)
        check_detected(runs, caplog, file.name)
        file.write_bytes(original)
    assert faccel.load(state(0), runs, ONE)["n"] == 2


def test_a_flip_of_any_bit_in_the_first_line_of_the_manifest_is_detected(runs):
    file = newest(runs) / "manifest.json"
    original = file.read_bytes()
    for index in range(original.index(b"\n") + 1):
        for bit in range(8):
            data = bytearray(original)
            data[index] ^= 1 << bit
            file.write_bytes(data)
            assert faccel.checkpoint.checkpoints(runs)[0].problem is not None, (index, bit)


def test_truncated_and_deleted_files_are_detected(runs, caplog):
    folder = newest(runs)
    for file in sorted(folder.iterdir()):
        original = file.read_bytes()
        for length in (0, 1, len(original) // 2, len(original) - 1):
            file.write_bytes(original[:length])
            check_detected(runs, caplog, file.name)
        file.write_bytes(original + b"\0")
        check_detected(runs, caplog, file.name)
        file.unlink()
        check_detected(runs, caplog, file.name)
        file.write_bytes(original)
    shutil.rmtree(folder)
    folder.mkdir()
    caplog.clear()
    assert faccel.load(state(0), runs, ONE)["n"] == 1


def test_every_rank_raises_or_loads_the_older_checkpoint(runs):
    file = sorted(newest(runs).glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    data[-3] ^= 8
    file.write_bytes(data)

    def fn(ctx):
        module = torch.nn.Linear(6, 5)
        before = module.weight.detach().clone()
        with pytest.raises(CheckpointError, match=file.name):
            faccel.load(state(0) | {"model": module}, runs, ctx, step=2)
        assert torch.equal(module.weight, before)
        return faccel.load(state(0), runs, ctx)["n"]

    assert simulate(fn, 3) == (1, 1, 1)


def test_without_a_valid_checkpoint_the_error_lists_all_problems(runs):
    for folder in runs.glob("step-*"):
        os.unlink(folder / "manifest.json")
    with pytest.raises(CheckpointError, match=r"step 2: no manifest.*step 1: no manifest"):
        faccel.load(state(0), runs, ONE)


def flip_last_byte(folder):
    file = next(pathlib.Path(folder).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def kept(path):
    return [checkpoint.step for checkpoint in faccel.checkpoint.checkpoints(path)]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("step", [None, 1])
def test_the_newest_verified_checkpoint_is_never_deleted(tmp_path, background, step):
    for value in (1, 2, 3):
        faccel.save(state(value), tmp_path, ONE, step=value)
    for value in (2, 3):
        flip_last_byte(tmp_path / f"step-{value:09d}")

    def resume(ctx):
        assert faccel.load(state(0), tmp_path, ctx, step=step)["n"] == 1
        for value in (4, 5, 6):
            faccel.save(state(value), tmp_path, ctx, step=value, keep=2, background=background)
        faccel.latest(tmp_path, ctx)

    simulate(resume, 2)
    # Without the load of the newest, nothing is known of 2 and 3: they count, and are deleted.
    assert kept(tmp_path) == ([6, 5, 1] if step else [6, 5, 3, 2, 1])
    for value in (5, 6):
        flip_last_byte(tmp_path / f"step-{value:09d}")
    assert faccel.load(state(0), tmp_path, ONE)["n"] == 1


def test_a_newer_verified_checkpoint_releases_the_older_one(tmp_path):
    ctx = fake_context(0, 1)
    faccel.save(state(1), tmp_path, ctx, step=1)
    faccel.load(state(0), tmp_path, ctx)
    faccel.save(state(2), tmp_path, ctx, step=2, keep=1)
    assert kept(tmp_path) == [2, 1]
    faccel.load(state(0), tmp_path, ctx)
    faccel.save(state(3), tmp_path, ctx, step=3, keep=1)
    assert kept(tmp_path) == [3, 2]
