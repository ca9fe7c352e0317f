"""Adapters of PEFT: trained with DDP and FSDP2, exported without the base, loaded by PEFT."""

import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file

import faccel
from faccel.errors import CheckpointError
from faccel.testing import fake_context, simulate
from tests.hf.models import assert_same_training, batch_of, build, full, train

TARGETS = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}
MESHES = ["dp_replicate=2", "dp_shard=2", "dp_replicate=2,dp_shard=2"]


def with_lora(name, seed=0, **options):
    # bert's classifier is trained too, as one of PEFT's `modules_to_save`
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    net = build(name)
    torch.manual_seed(seed)
    options |= {"fan_in_fan_out": name == "gpt2"}
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS[name], task_type=task, **options
    )
    return peft.get_peft_model(net, config).to(torch.float64)


def run(ctx, name, checkpoint=None):
    return train(ctx, with_lora(name), name, faccel.Plan(activation_checkpoint=checkpoint))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_adapters_train_as_on_one_process_and_frozen_parameters_do_not_change(name, mesh):
    (one,) = simulate(run, 1, name)
    before = dict(with_lora(name).named_parameters())
    for result in simulate(run, faccel.MeshSpec.of(mesh).size, name, "full", mesh=mesh):
        assert_same_training(result, one)
        moved = {n for n, p in result.params.items() if not torch.equal(p, before[n])}
        assert moved == {n for n, p in before.items() if p.requires_grad}


def logits_of(model, name):
    model.eval()
    with torch.no_grad():
        return model(**batch_of(name, seed=9)).logits


@pytest.mark.parametrize("mesh", [None, *MESHES])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_an_adapter_is_exported_alone_and_peft_loads_it(tmp_path, name, mesh):
    (tmp_path / "README.md").write_text("of the user")
    (tmp_path / "model.safetensors").write_text("of the base model")

    def fn(ctx):
        model = run(ctx, name).model
        files = faccel.checkpoint.export_model(model, tmp_path, ctx, trained_only=True)
        return files, logits_of(model, name)

    for files, logits in simulate(fn, faccel.MeshSpec.of(mesh).size if mesh else 1, mesh=mesh):
        assert files == ["adapter_model.safetensors"]
        loaded = peft.PeftModel.from_pretrained(build(name), tmp_path).to(torch.float64)
        assert (logits_of(loaded, name) - logits).abs().max() < 1e-12
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names
    assert (tmp_path / "README.md").read_text() == "of the user"
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    full_weights = {
        n for n in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in n
    }
    assert full_weights == (
        {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
        if name == "bert"
        else set()
    )


def test_an_adapter_of_another_name_is_exported_as_one_file_too(tmp_path):
    net = with_lora("llama")
    net.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    net.set_adapter("second")
    assert faccel.checkpoint.export_model(net, tmp_path, fake_context(0, 1), trained_only=True) == [
        "adapter_model.safetensors"
    ]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert {tuple(x.shape) for x in weights.values()} == {(2, 16), (16, 2)}
    assert not [n for n in weights if "second" in n]
    net.base_model.set_adapter(["default", "second"])
    with pytest.raises(CheckpointError, match="one adapter"):
        faccel.checkpoint.export_model(net, tmp_path, fake_context(0, 1), trained_only=True)


def state_of(ctx, seed):
    """Return a state with adapters from `seed`; the base does not depend on it."""
    model = faccel.wrap(with_lora("llama", seed), ctx)
    opt = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, foreach=False
    )
    return {"model": model, "opt": faccel.wrap_optimizer(opt, model, ctx)}


def step(state, ctx):
    out = state["model"](**faccel.split(batch_of("llama"), ctx))
    scaler = faccel.scaled_backward(out.loss, faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(state["opt"], scaler, ctx)
    return {n: full(p) for n, p in state["model"].named_parameters()}


@pytest.mark.parametrize(("saving", "loading"), [
    (None, None), ("dp_replicate=2", "dp_shard=2"), ("dp_shard=2", None),
    ("dp_shard=2", "dp_replicate=2,dp_shard=2"),
])  # fmt: skip
def test_a_checkpoint_of_adapters_excludes_the_base_and_resumes(tmp_path, saving, loading):
    def save(ctx):
        state = state_of(ctx, 0)
        step(state, ctx)
        at = faccel.save(state, tmp_path, ctx, step=1, trained_only=True)
        return at.path, step(state, ctx)

    def load(ctx):
        return step(faccel.load(state_of(ctx, 1), tmp_path, ctx), ctx)

    def worlds(mesh):
        return faccel.MeshSpec.of(mesh).size if mesh else 1

    path, expected = simulate(save, worlds(saving), mesh=saving)[0]
    stored = {
        n
        for file in os.listdir(path)
        if file.endswith(".safetensors")
        for n in load_file(f"{path}/{file}")
    }
    assert len([n for n in stored if n.startswith("model/")]) == 8
    assert all("lora_" in n for n in stored if n.startswith("model/"))
    for result in simulate(load, worlds(loading), mesh=loading):
        assert max((result[n] - p).abs().max().item() for n, p in expected.items()) < 1e-12


def test_a_checkpoint_of_adapters_fits_models_with_such_adapters_only(tmp_path):
    ctx = fake_context(0, 1)
    faccel.save({"model": with_lora("llama")}, tmp_path, ctx, step=1, trained_only=True)
    frozen = with_lora("llama", seed=1).requires_grad_(False)  # as for inference
    faccel.load({"model": frozen}, tmp_path, ctx)
    assert all(
        torch.equal(p, q)
        for p, q in zip(frozen.parameters(), with_lora("llama").parameters(), strict=True)
    )
    for other in (with_lora("bert"), build("llama"), with_lora("llama").requires_grad_(True)):
        with pytest.raises(CheckpointError, match="does not fit"):
            faccel.load({"model": other}, tmp_path, ctx)


@pytest.mark.parametrize("mesh", [None, "dp_shard=2"])
def test_a_head_that_is_trained_above_a_frozen_body_is_exported_alone(tmp_path, mesh):
    def net(seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
        )
        model[0].requires_grad_(False)
        return model

    def export(ctx):
        return faccel.checkpoint.export_model(
            faccel.wrap(net(0), ctx), tmp_path, ctx, trained_only=True
        )

    def load(ctx):
        model = faccel.wrap(net(1), ctx)
        with pytest.raises(CheckpointError, match="do not fit"):
            faccel.checkpoint.load_model(model, tmp_path, ctx)
        faccel.checkpoint.load_model(model, tmp_path, ctx, trained_only=True)
        return {n: full(p) for n, p in model.named_parameters()}

    size = 2 if mesh else 1
    simulate(export, size, mesh=mesh)
    assert not [n for n in load_file(tmp_path / "model.safetensors") if n.startswith("0.")]
    for params in simulate(load, size, mesh=mesh):
        assert torch.equal(params["0.weight"], net(1)[0].weight)
        assert torch.equal(params["2.weight"], net(0)[2].weight)


@pytest.mark.parametrize("mesh", MESHES)
def test_adapters_in_fp32_above_a_base_in_bf16_train(mesh):
    def fn(ctx):
        net = build("llama", torch.bfloat16)
        net = peft.get_peft_model(
            net, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
        )
        assert {p.dtype for p in net.parameters()} == {torch.bfloat16, torch.float32}
        return train(ctx, net, "llama", steps=3)

    for result in simulate(
        fn, faccel.MeshSpec.of(mesh).size, mesh=mesh, config={"mixed_precision": "bf16"}
    ):
        assert result.losses[-1] < 4
