"""Files of weights that other programs have written: read without a loss, or refused at once."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import faccel
from faccel.errors import CheckpointError, ConfigError
from faccel.testing import fake_context

ONE = fake_context(0, 1)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
KINDS = {
    "a pipe": os.mkfifo,
    "a device": lambda path: os.symlink("/dev/zero", path),
    "a folder": os.mkdir,
    "a link to nothing": lambda path: os.symlink("/missing/file", path),
}


def net(dtype=torch.float32):
    module = nn.Module()
    module.register_buffer("x", torch.zeros(2, dtype=dtype))
    return module


@pytest.mark.parametrize("name", [WEIGHTS, INDEX])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_weights_is_refused_without_waiting(tmp_path, name, kind):
    KINDS[kind](tmp_path / name)
    with pytest.raises(CheckpointError):
        faccel.checkpoint.load_model(net(), tmp_path, ONE)
    with pytest.raises(CheckpointError):
        faccel.checkpoint.load_model(net(), tmp_path / name, ONE)


def test_links_of_a_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "blobs" / "1")
    (tmp_path / "blobs" / "2").write_text(json.dumps({"weight_map": {"x": WEIGHTS}}))
    (tmp_path / WEIGHTS).symlink_to("blobs/1")
    (tmp_path / INDEX).symlink_to("blobs/2")
    model = net()
    faccel.checkpoint.load_model(model, tmp_path, ONE)
    assert model.x.tolist() == [1, 1]


# A bool is an int is a real number is a complex number.
RANKS = {
    torch.bool: 0, torch.uint8: 1, torch.int64: 1, torch.float16: 2, torch.bfloat16: 2,
    torch.float32: 2, torch.float64: 2, torch.float8_e4m3fn: 2, torch.complex64: 3,
}  # fmt: skip


@pytest.mark.parametrize("stored", RANKS, ids=str)
def test_weights_are_cast_only_if_no_part_of_a_number_is_lost(tmp_path, stored):
    save_file({"x": torch.ones(2).to(stored)}, tmp_path / WEIGHTS)
    faccel.save({"model": net(stored)}, tmp_path / "run", ONE, step=1)
    for dtype, rank in RANKS.items():
        model, other = net(dtype), net(dtype)
        other.x.copy_(torch.ones(2))
        if rank >= RANKS[stored]:
            faccel.checkpoint.load_model(model, tmp_path, ONE)
            assert model.x.to(torch.complex64).tolist() == [1, 1]
        else:
            with pytest.raises(CheckpointError, match="`x`: of a dtype that cannot be cast"):
                faccel.checkpoint.load_model(model, tmp_path, ONE)
            assert model.x.to(torch.complex64).tolist() == [0, 0]
        _, report = faccel.load({"model": other}, tmp_path / "run", ONE, strict=False)
        is_cast = rank >= RANKS[stored]
        assert report.mismatched == (() if is_cast else ("model.x",))
        assert other.x.to(torch.complex64).tolist() == ([0, 0] if is_cast else [1, 1])


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "F6_E2M3"])
def test_a_dtype_that_torch_does_not_have_is_named(tmp_path, dtype):
    bits = {"F4": 4, "F8_E8M0": 8, "F6_E2M3": 6}[dtype]
    header = {"x": {"dtype": dtype, "shape": [4], "data_offsets": [0, bits // 2]}}
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(bits // 2))
    with pytest.raises(CheckpointError, match=f"`x` has the unsupported dtype {dtype}"):
        faccel.checkpoint.load_model(net(), tmp_path, ONE)


@pytest.mark.parametrize("size", ["9" * 400 + "GB", "9" * 20, 10**400, "1." + "0" * 400, "1e999"])
def test_a_size_that_no_file_has_is_an_error(tmp_path, size):
    with pytest.raises(ConfigError, match="`max_shard_size` must be a positive size"):
        faccel.checkpoint.export_model(net(), tmp_path / "export", ONE, max_shard_size=size)
    assert not (tmp_path / "export").exists()
