"""`from_pretrained` loads exports of any layout; `load_model` loads files of `save_pretrained`."""

import json

import pytest
import torch
import transformers as hf

import faccel
from faccel.testing import fake_context, simulate
from tests.hf.models import batch_of, build, train

# PyTorch warns that outputs of tensor parallel are views: in-place operations on them raise.
pytestmark = pytest.mark.filterwarnings(
    "ignore:FSDP2-wrapped module", "ignore:While redistributing"
)

CAUSAL = hf.AutoModelForCausalLM
AUTO = dict.fromkeys(("gpt2", "llama", "mixtral"), CAUSAL) | {
    "bert": hf.AutoModelForSequenceClassification
}


def logits_of(model, name):
    model.eval()
    with torch.no_grad():
        return model(**batch_of(name, seed=9)).logits


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize(("name", "mesh"), [
    ("gpt2", None), ("bert", "dp_replicate=2"), ("gpt2", "dp_shard=2"),
    ("bert", "dp_replicate=2,dp_shard=2"), ("llama", "tp=2"), ("llama", "dp_shard=2,tp=2"),
    ("mixtral", "dp_shard=2"), ("mixtral", "tp=2"),
])  # fmt: skip
def test_from_pretrained_loads_what_was_trained_and_exported(tmp_path, name, mesh, size):
    def fn(ctx):
        net = build(name)
        trained = train(ctx, net, name, faccel.parallel.plan_for(net, ctx))
        files = faccel.checkpoint.export_model(trained.model, tmp_path, ctx, max_shard_size=size)
        return files, logits_of(trained.model, name)

    world_size = faccel.MeshSpec.of(mesh).size if mesh else 1
    for files, logits in simulate(fn, world_size, mesh=mesh):
        assert (len(files) > 1) == (size == "20KB")
        loaded = AUTO[name].from_pretrained(tmp_path)
        assert type(loaded) is type(build(name))
        assert (logits_of(loaded, name) - logits).abs().max() < (
            1e-6 if name == "mixtral" else 1e-12
        )
    if name == "gpt2":
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
    config = json.loads((tmp_path / "config.json").read_text())
    dtype = "float32" if name == "mixtral" else "float64"
    assert (config["architectures"], config["dtype"]) == ([type(loaded).__name__], dtype)
    assert (tmp_path / "generation_config.json").exists() == (name != "bert")


@pytest.mark.parametrize(("name", "mesh"), [
    ("gpt2", None), ("bert", "dp_replicate=2"), ("gpt2", "dp_shard=2"),
    ("llama", "dp_shard=2,tp=2"), ("mixtral", "dp_shard=2"),
])  # fmt: skip
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_load_model_reads_what_save_pretrained_wrote(tmp_path, name, mesh, size):
    saved = build(name)
    saved.save_pretrained(tmp_path, max_shard_size=size, save_original_format=name != "mixtral")

    def fn(ctx):
        torch.manual_seed(1)
        net = type(saved)(saved.config).to(saved.dtype)
        model = faccel.wrap(net, ctx, plan=faccel.parallel.plan_for(net, ctx))
        faccel.checkpoint.load_model(model, tmp_path, ctx)
        return logits_of(model, name)

    for logits in simulate(fn, faccel.MeshSpec.of(mesh).size if mesh else 1, mesh=mesh):
        assert (logits - logits_of(saved, name)).abs().max() < (
            1e-6 if name == "mixtral" else 1e-12
        )


def test_an_export_does_not_change_the_config_of_the_model(tmp_path):
    net = build("gpt2")
    before = net.config.to_dict()
    faccel.checkpoint.export_model(net, tmp_path / "a", fake_context(0, 1))
    assert net.config.to_dict() == before
    faccel.checkpoint.export_model(torch.nn.Sequential(net), tmp_path / "b", fake_context(0, 1))
    assert not (tmp_path / "b" / "config.json").exists()
