"""Configuration, plans, compilation and trackers: nothing that a user asks for is dropped."""

import argparse
import dataclasses
import json
import types

import pytest
import torch
import yaml
from click.testing import CliRunner

import faccel
from faccel.cli.commands import main
from faccel.config import Config
from faccel.errors import ModelError
from faccel.parallel import DeepSpeedConfig, FsdpConfig, plan_for
from faccel.plan_values import to_plan
from faccel.testing import fake_context, simulate
from tests.cases.worlds import WORLDS
from tests.world import test_compilation as compilation

# compile_nothing


NETS = {
    "TransformerEncoder": compilation.encoder,
    "Sequential": compilation.sequential,
    "blocks": compilation.blocks,
}


def a_compiled_model(folder, world, net, compile):
    """Graphs are compiled in the first step and not in the second, and compute what eager does."""
    torch._dynamo.reset()
    make = NETS[net]
    expected = compilation.eager_loss(make)
    results = WORLDS[world].run(compilation.loss_and_graphs, make, compile)
    # Ranks are threads of one process: the second one may find the graphs of the first.
    assert sum(graphs[0] for _, graphs in results) > 0
    for loss, graphs in results:
        assert abs(loss - expected) < 1e-5
        assert graphs[1] == 0


EAGER = {"loop": compilation.Layers, "loop without compiler": compilation.EagerLayers}


def compile_nothing(ctx, compile, net):
    plan = faccel.Plan(compile=compile)
    model = faccel.wrap(EAGER[net](compilation.EagerBlock), ctx, plan=plan)
    with pytest.raises(ModelError, match=rf'compile="{compile}"` has compiled nothing') as caught:
        model(compilation.X)
    return "0 graphs of" in caught.value.got


def a_plan_that_compiles_nothing(folder, world, compile, net):
    """The first forward raises on every rank."""
    assert all(WORLDS[world].run(compile_nothing, compile, net))


# import_drops_deepspeed


HEAD = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "bf16", "num_processes": 2}
FILES = {
    "DeepSpeed": (
        {
            "distributed_type": "DEEPSPEED",
            "deepspeed_config": {
                "zero_stage": 2,
                "offload_optimizer_device": "cpu",
                "gradient_accumulation_steps": 4,
            },
        },
        {"strategy": "deepspeed", "zero": 2, "grad_accum": 4},
        faccel.Plan(deepspeed=DeepSpeedConfig(offload_optimizer="cpu")),
    ),
    "FSDP": (
        {
            "distributed_type": "FSDP",
            "fsdp_config": {
                "fsdp_version": 2,
                "fsdp_reshard_after_forward": False,
                "fsdp_activation_checkpointing": True,
                "fsdp_transformer_layer_cls_to_wrap": "Block",
                "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            },
        },
        {"mesh": {"dp_shard": -1}},
        faccel.Plan(
            units=("Block",),
            activation_checkpoint="full",
            fsdp=FsdpConfig(reshard_after_forward=False),
        ),
    ),
    "dynamo": (
        {
            "distributed_type": "MULTI_GPU",
            "dynamo_config": {
                "dynamo_backend": "INDUCTOR",
                "dynamo_use_regional_compilation": True,
            },
        },
        {},
        faccel.Plan(compile="units"),
    ),
}


def a_file_of_accelerate(folder, name):
    """Each setting with an equivalent is in the new file, or in its plan."""
    source, out = folder / "accelerate.yaml", folder / "out.yaml"
    settings, values, plan = FILES[name]
    source.write_text(yaml.safe_dump(HEAD | settings))
    result = CliRunner().invoke(main, ["config", "import", str(source), "-o", str(out)])
    assert result.exit_code == 0, result.output
    written = yaml.safe_load(out.read_text())
    assert to_plan(written.pop("plan")) == plan
    assert written == {"mixed_precision": "bf16", "nproc": 2, **values}
    assert "no equivalent" not in result.stderr


# none_means_not_given


def none_for_a_field(folder, field):
    """It is the default of the field."""
    ctx = faccel.init(env={}, **{field: None})
    try:
        assert getattr(ctx.config, field) == getattr(Config(), field)
    finally:
        faccel.shutdown(ctx)


# plan_for_decoder_pp


SIZES = {
    "vocab_size": 60, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
    "intermediate_size": 64,
}  # fmt: skip
GPT2_SIZES = {
    "vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1,
}  # fmt: skip
TRANSFORMERS = {
    "llama": lambda hf: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "gpt2": lambda hf: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2_SIZES)),
    "bert": lambda hf: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
}


def a_pipeline_for_a_model_of_transformers(folder, name):
    """`plan_for` proposes a pipeline that has the outputs of one process, or raises."""
    hf = pytest.importorskip("transformers")

    def build():
        torch.manual_seed(0)
        return TRANSFORMERS[name](hf).eval()

    def run(ctx):
        net = build()
        model = faccel.wrap(net, ctx, plan=plan_for(net, ctx))
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits

    ids = torch.randint(2, 60, (4, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, :2] = 0  # values that every block gets
    with torch.no_grad():
        expected = build()(input_ids=ids, attention_mask=mask).logits
    for logits in simulate(run, 2, mesh="pp=2"):
        assert torch.allclose(logits, expected, atol=1e-5)


# tracker


@dataclasses.dataclass
class Arguments:
    lr: float = 0.1


CONFIGS = {
    "dict": {"lr": 0.1},
    "Namespace": argparse.Namespace(lr=0.1),
    "SimpleNamespace": types.SimpleNamespace(lr=0.1),
    "dataclass": Arguments(),
}
VALUES = {"text": "warm-up", "None": None, "list": [1, 2], "tensor": torch.tensor(2)}


def metrics_of_any_type(folder, value, config):
    """No value and no configuration drops the other metrics."""
    ctx = fake_context(0, 1, config={"run_dir": str(folder)})
    trackers = faccel.tracking.init_trackers("a", ctx, config=CONFIGS[config])
    assert len(trackers.opened) == 1
    for step in range(5):
        faccel.tracking.log({"loss": 1.0, "it": VALUES[value]}, trackers, step=step)
    faccel.tracking.finish(trackers)
    lines = (folder / "a" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(record["step"], record["loss"]) for record in records] == [(i, 1.0) for i in range(5)]
    assert [record["it"] for record in records] == [VALUES[value]] * 5
    assert json.loads((folder / "a" / "config.json").read_text()) == {"lr": 0.1}
