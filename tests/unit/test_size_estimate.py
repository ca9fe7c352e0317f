"""`faccel estimate`: sizes by arithmetic, from a builder and from files."""

import json

import pytest
import torch
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
    assert (size["largest_unit"], size["largest_unit_bytes"]) == ("embed", 1600)
    assert "disk" not in run(f"{__name__}:Net", "--dtype", dtype)
    export_model(Net(), tmp_path, fake_context(0, 1))
    result = CliRunner().invoke(main, ["estimate", str(tmp_path), "--dtype", dtype])
    assert result.exit_code == 1 and "config.json" in result.output


def blocks_only():
    return nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in "abc")


def one_layer():
    return nn.Linear(256, 8)


def with_a_parameter_of_the_root():
    net = nn.Module()
    net.blocks, net.scale = blocks_only(), nn.Parameter(torch.ones(3))
    return net


@pytest.mark.parametrize(("build", "unit", "size"), [
    ("blocks_only", "0", 2 * 4 * 8 + 2 * 4 * (4 + 8)),  # the scales and biases of both layers
    ("with_a_parameter_of_the_root", "blocks.0", 2 * 4 * 8 + 2 * 4 * (4 + 8)),
    ("one_layer", "", 256 * 8 + 2 * 4 * 8),
])  # fmt: skip
def test_the_largest_unit_has_quantized_layers(build, unit, size):
    result = json.loads(run(f"{__name__}:{build}", "--dtype", "int8", "--json"))
    assert (result["largest_unit"], result["largest_unit_bytes"]) == (unit, size)


@pytest.mark.parametrize("architectures", [["LlamaForCausalLM"], None])
def test_a_configuration_has_the_dtype_of_the_model(architectures, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        architectures=architectures,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    sizes = {}
    for dtype in (None, "bf16", "fp32"):
        options = ["--dtype", dtype] if dtype else []
        sizes[dtype] = json.loads(run(str(tmp_path), "--json", *options))["load_bytes"]
    assert sizes[None] == pytest.approx(sizes["bf16"], abs=16)  # a buffer keeps fp32
    assert sizes["fp32"] > 1.9 * sizes[None]


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
