"""Models of transformers train under every strategy as they do on one process."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel.errors import ModelError
from faccel.testing import fake_context, simulate
from tests.hf.models import (
    BERT_CHAIN,
    BERT_TENSOR_PLAN,
    assert_same_training,
    batch_of,
    build,
    train,
)

# PyTorch warns that outputs of tensor parallel are views: in-place operations on them raise.
pytestmark = pytest.mark.filterwarnings(
    "ignore:FSDP2-wrapped module", "ignore:While redistributing"
)
DATA = ["dp_replicate=2", "dp_shard=2", "dp_replicate=2,dp_shard=2"]


def size_of(mesh):
    return faccel.MeshSpec.of(mesh).size


def run(ctx, name, options=None, model_options=None):
    net = build(name, **model_options or {})
    plan = faccel.parallel.plan_for(net, ctx) if options is None else faccel.Plan(**options)
    return train(ctx, net, name, plan)


def test_importing_faccel_imports_nothing_of_hugging_face():
    names = "faccel.wrap, faccel.checkpoint.export_model, faccel.parallel.plan_for, faccel.shard"
    code = f"import faccel, sys; {names}; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"transformers", "datasets", "peft", "tokenizers", "huggingface_hub"}.intersection(
        out
    )


@pytest.mark.parametrize("mesh", DATA)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_model_of_transformers_trains_as_on_one_process(name, mesh):
    (one,) = simulate(run, 1, name)
    for result in simulate(run, size_of(mesh), name, mesh=mesh):
        assert_same_training(result, one)
        assert type(result.out) is type(one.out)
        assert result.out.logits.dtype == torch.float64


def test_the_units_of_a_model_are_its_no_split_modules():
    def units(ctx, name):
        model = faccel.wrap(build(name), ctx)
        return sorted(
            {type(m).__name__ for m in model.module.modules() if hasattr(m, "_get_fsdp_state")}
        )

    assert simulate(units, 2, "gpt2", mesh="dp_shard=2")[1] == [
        "FSDPGPT2Block",
        "FSDPGPT2LMHeadModel",
    ]
    assert simulate(units, 2, "bert", mesh="dp_shard=2")[1] == [
        "FSDPBertEmbeddings", "FSDPBertForSequenceClassification", "FSDPBertLayer",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "mesh", "options"), [
    ("llama", "tp=2", {}), ("llama", "tp=2", {"tie_word_embeddings": True}), ("qwen3", "tp=2", {}),
    ("qwen3", "dp_shard=2,tp=2", {}), ("llama", "dp_replicate=2,tp=2", {}), ("mixtral", "tp=2", {}),
])  # fmt: skip
def test_the_tp_plan_of_a_model_shards_it(name, mesh, options):
    (one,) = simulate(run, 1, name, None, options)
    for result in simulate(run, size_of(mesh), name, None, options, mesh=mesh):
        # the experts of mixtral do not support fp64
        assert_same_training(result, one, atol=1e-4 if name == "mixtral" else 1e-6)
        weight = result.model.module.model.layers[0].self_attn.q_proj.weight
        assert weight.to_local().numel() * 2 * faccel.MeshSpec.of(mesh).dp_shard == weight.numel()


@pytest.mark.parametrize("mesh", ["tp=2", "dp_shard=2,tp=2"])
def test_a_model_without_a_tp_plan_is_sharded_by_module_names(mesh):
    (one,) = simulate(run, 1, "bert")
    for result in simulate(run, size_of(mesh), "bert", {"tensor": BERT_TENSOR_PLAN}, mesh=mesh):
        assert_same_training(result, one)


def test_a_tp_plan_that_cannot_be_followed_is_an_error_that_names_the_module():
    ctx = fake_context(0, 2, mesh="tp=2")
    net = build("llama")
    net.tp_plan = net.tp_plan | {"model.layers.*.mlp.gate_proj": "packed_colwise"}
    with pytest.raises(ModelError) as caught:
        faccel.parallel.plan_for(net, ctx)
    assert "`model.layers.*.mlp.gate_proj`: 'packed_colwise'" in caught.value.got
    with pytest.raises(ModelError, match="finds no module of this model"):
        faccel.parallel.plan_for(build("gpt2"), ctx)
    for name, options, got in (
        ("gpt2", {"tensor": {"transformer.h.*.mlp.c_fc": "colwise"}}, "Conv1D"),
        ("llama", None, "4 columns / head_dim=1 of `model.layers.0.self_attn`"),
    ):
        with pytest.raises(ModelError) as caught:
            simulate(
                run,
                2,
                name,
                options,
                {"num_key_value_heads": 1} if name == "llama" else {},
                mesh="tp=2",
            )
        assert got in caught.value.got


SAVED = faccel.parallel.ActivationCheckpointing(save_ops=("aten.mm.default", "aten.addmm.default"))


@pytest.mark.parametrize(("mesh", "checkpoint"), [
    (None, "full"), ("dp_replicate=2", "full"), ("dp_shard=2", "full"), ("dp_shard=2", 2),
    ("dp_shard=2", SAVED),
])  # fmt: skip
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_checkpointed_blocks_run_twice_and_train_the_same(name, mesh, checkpoint):
    """The second forward must not append to the key-value cache.

    The batch has padding, so that a longer cache would change the loss.
    """
    calls = []

    def fn(ctx, options):
        net = build(name)
        blocks = [
            m
            for m in net.modules()
            if type(m).__name__ in ("BertSelfAttention", "GPT2MLP", "LlamaMLP")
        ]
        for block in blocks:
            block.register_forward_pre_hook(lambda *_: calls.append(ctx.rank))
        return train(ctx, net, name, faccel.Plan(**options), steps=1)

    (one,) = simulate(fn, 1, {})
    once = len(calls)
    calls.clear()
    world_size = size_of(mesh) if mesh else 1
    for result in simulate(fn, world_size, {"activation_checkpoint": checkpoint}, mesh=mesh):
        assert_same_training(result, one)
    assert len(calls) == world_size * (once + (1 if checkpoint == 2 else once))


@pytest.mark.parametrize(("name", "mesh"), [
    *(("gpt2", mesh) for mesh in DATA),
    *(("llama", mesh) for mesh in ("dp_shard=2", "tp=2", "dp_shard=2,tp=2")),
])  # fmt: skip
def test_generate_runs_with_the_hooks_of_every_strategy(name, mesh):
    def generate(ctx):
        net = build(name)
        model = faccel.wrap(net, ctx, plan=faccel.parallel.plan_for(net, ctx)).eval()
        ids = faccel.split(batch_of(name)["input_ids"][:, :4], ctx)
        options = {
            "max_new_tokens": 4,
            "min_new_tokens": 4,
            "do_sample": False,
            "attention_mask": torch.ones_like(ids),
        }
        with torch.no_grad():
            out = model.call("generate", ids, **options)
        return faccel.gather(out, ctx)

    (one,) = simulate(generate, 1)
    assert one.shape == (8, 8)
    assert all(torch.equal(result, one) for result in simulate(generate, size_of(mesh), mesh=mesh))


@pytest.mark.parametrize("mesh", [None, "dp_replicate=2", "dp_shard=2", "tp=2"])
def test_outputs_of_a_model_are_cast_to_fp32_and_keep_their_type(mesh):
    def fn(ctx):
        net = build("llama", torch.float32)
        model = faccel.wrap(net, ctx, plan=faccel.parallel.plan_for(net, ctx))
        out = model(**batch_of("llama"), output_hidden_states=True)
        out.loss.backward()
        rows = faccel.gather({"logits": out["logits"].detach()}, ctx)["logits"]
        return (
            type(out).__name__,
            {x.dtype for x in (out.loss, out.logits, out[1], *out.hidden_states)},
            len(rows),
        )

    size = size_of(mesh) if mesh else 1
    for kind, dtypes, rows in simulate(fn, size, mesh=mesh, config={"mixed_precision": "bf16"}):
        assert (kind, dtypes) == ("CausalLMOutputWithPast", {torch.float32})
        assert rows == 8 * (1 if mesh == "tp=2" else size)


@pytest.mark.parametrize("mesh", ["pp=2", "pp=2,dp_shard=2"])
def test_a_model_that_is_a_chain_of_modules_trains_as_a_pipeline(mesh):
    plan = faccel.Plan(pipeline=faccel.parallel.PipelineConfig(chain=BERT_CHAIN))

    def loss_of(net, batch):
        out = net(batch.data[0])
        # a pipeline returns the output of its last module
        return F.cross_entropy(getattr(out, "logits", out), batch.data[1])

    def fn(ctx):
        model = faccel.wrap(build("bert"), ctx, plan=plan)
        opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
        batch, scaler = batch_of("bert"), faccel.init_scaler(ctx)
        data = TensorDataset(batch["input_ids"], batch["labels"])
        losses, norms = [], []
        for window in faccel.windows(
            faccel.shard(DataLoader(data, 2), ctx), ctx, size=4 // ctx.data_world_size
        ):
            step_losses, scaler = faccel.forward_backward(loss_of, model, window, scaler, ctx)
            info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
            losses += faccel.reduce(step_losses, ctx, op="mean").mean(0, keepdim=True).tolist()
            norms.append(info.grad_norm.item())
        return losses + norms

    (one,) = simulate(fn, 1)
    for result in simulate(fn, size_of(mesh), mesh=mesh):
        assert max(abs(a - b) for a, b in zip(result, one, strict=True)) < 1e-12


def test_a_pipeline_of_blocks_with_more_than_one_input_is_an_error():
    chain = faccel.parallel.PipelineConfig(chain=("model", "lm_head"))

    def fn(ctx):
        model = faccel.wrap(build("llama"), ctx, plan=faccel.Plan(pipeline=chain))
        with torch.no_grad():
            model(batch_of("llama")["input_ids"])

    with pytest.raises(ModelError, match="must return a tensor or a tuple of tensors") as caught:
        simulate(fn, 2, mesh="pp=2")
    assert "BaseModelOutputWithPast" in caught.value.got


def test_an_output_is_a_tree_that_keeps_its_kind():
    from transformers.modeling_outputs import SequenceClassifierOutput

    def fn(ctx):
        out = SequenceClassifierOutput(
            logits=torch.full((2, 1), float(ctx.rank)), hidden_states=(torch.ones(2),)
        )
        rows, total = faccel.gather(out, ctx, num_valid=1), faccel.reduce(out, ctx)
        assert type(rows) is type(total) is SequenceClassifierOutput
        return (
            rows.logits.flatten().tolist(),
            rows["hidden_states"][0].tolist(),
            total[0].flatten().tolist(),
            rows.loss,
        )

    assert simulate(fn, 2)[1] == ([0.0, 1.0], [1.0, 1.0], [1.0, 1.0], None)
