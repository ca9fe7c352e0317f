"""`faccel estimate`: sizes by arithmetic, from a builder and from files."""

import json

import pytest
from click.testing import CliRunner
from torch import nn

from faccel.checkpoint import export_model
from faccel.cli.commands import main
from faccel.testing import fake_context


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in "abc")
        self.head = nn.Linear(4, 100, bias=False)
        self.head.weight = self.embed.weight


BLOCK = 4 * 8 + 8 + 8 * 4 + 4
PARAMS = 400 + 3 * BLOCK


def run(*args):
    result = CliRunner().invoke(main, ["estimate", *args])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_builder_is_estimated_without_memory():
    size = json.loads(run(f"{__name__}:Net", "--json"))
    assert size == {
        "num_params": PARAMS,
        "largest_unit": "embed",
        "largest_unit_bytes": 1600,
        "load_bytes": 4 * PARAMS,
        "offload_bytes": 1600 + 4 * BLOCK,
        "train_bytes": 16 * PARAMS,
    }


@pytest.mark.parametrize(("dtype", "bytes_each"), [("bf16", 2), ("fp16", 2), ("fp32", 4)])
def test_files_are_estimated_from_their_headers(dtype, bytes_each, tmp_path):
    export_model(Net(), tmp_path, fake_context(0, 1))
    size = json.loads(run(str(tmp_path), "--dtype", dtype, "--json"))
    assert size["num_params"] == PARAMS
    assert size["largest_unit"] == "embed"
    assert size["load_bytes"] == bytes_each * PARAMS
    assert size["offload_bytes"] == bytes_each * (400 + BLOCK)
    assert size["train_bytes"] == 16 * PARAMS
    assert "parameters  628" in run(str(tmp_path))


@pytest.mark.parametrize(("dtype", "layers"), [("int8", 2 * 4 * 8 + 4 * (4 + 8)), ("int4", 4 * 8)])
def test_quantized_layers_are_estimated_as_they_are_loaded(dtype, layers, tmp_path):
    size = json.loads(run(f"{__name__}:Net", "--dtype", dtype, "--json"))
    # The tied head keeps fp32, and so do the biases; a layer is too small for a scale of 128.
    assert size["load_bytes"] == 4 * 400 + 3 * (4 * (8 + 4) + layers)
    assert size["num_params"] == PARAMS
    assert "disk" not in run(f"{__name__}:Net", "--dtype", dtype)
    export_model(Net(), tmp_path, fake_context(0, 1))
    result = CliRunner().invoke(main, ["estimate", str(tmp_path), "--dtype", dtype])
    assert result.exit_code == 1 and "config.json" in result.output


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere", "no such folder"),
        ("no_such_module:build", "cannot be imported"),
        ("tests.unit.test_size_estimate:build_text", "must return an nn.Module"),
    ],
)
def test_a_mistake_is_one_line(model, message):
    result = CliRunner().invoke(main, ["estimate", model])
    assert result.exit_code == 1
    assert message in result.output and "To fix:" in result.output


def build_text():
    return "no model"
