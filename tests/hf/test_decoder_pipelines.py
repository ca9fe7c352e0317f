"""Decoders of transformers as pipelines that `plan_for` proposes: equal to one process."""

import attrs
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import faccel
from faccel.errors import ModelError
from faccel.parallel import PipelineConfig, plan_for
from faccel.testing import simulate
from tests.training import full

SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore")  # advice of torch on layouts
SIZES = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
DECODERS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    # with tied weights, two embeddings and dropout outside of the blocks
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=16, resid_pdrop=0,
            embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=1,
        )
    ),
}  # fmt: skip
CHAINS = {
    "llama": ("model.embed_tokens", "model.layers.*", "model.norm", "lm_head"),
    "qwen2": ("model.embed_tokens", "model.layers.*", "model.norm", "lm_head"),
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.h.*", "transformer.ln_f",
             "lm_head"),
}  # fmt: skip


def build(kind):
    torch.manual_seed(0)
    return DECODERS[kind]().double()


def batches():
    ids = torch.randint(2, 32, (8, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, :2] = 0  # rows with padding on the left, whose positions differ
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return ids, mask, positions


def loss_fn(net, batch):
    ids, mask, positions = batch.data
    labels = ids.masked_fill(mask == 0, -100)
    return net(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels).loss


def run(ctx, kind, change=None, **options):
    net = build(kind)
    plan = faccel.Plan()
    if ctx.mesh.spec.pp > 1:
        plan = plan_for(net, ctx)
        assert plan.pipeline.chain == CHAINS[kind]
        plan = attrs.evolve(plan, pipeline=attrs.evolve(plan.pipeline, **change or {}), **options)
    model = faccel.wrap(net, ctx, plan=plan)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    ids, mask, positions = batches()
    data = TensorDataset(ids, mask, positions)
    loader = faccel.shard(DataLoader(data, 2 // ctx.data_world_size), ctx)
    values, scaler = [], faccel.init_scaler(ctx)
    for _ in range(2):
        window = next(faccel.windows(loader, ctx, size=4))
        losses, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=0.5)
        values += [losses.tolist(), info.grad_norm.item()]
    with torch.no_grad():
        output = model(ids[:5], attention_mask=mask[:5])
    params = {name: full(param) for name, param in model.named_parameters()}
    return values, type(output).__name__, output.logits, params


@pytest.mark.parametrize(("mesh", "change", "options"), [
    ("pp=2", {}, {}),
    ("pp=3", {}, {"activation_checkpoint": "full"}),
    ("pp=2", {"schedule": "interleaved-zero-bubble", "stages_per_rank": 2}, {}),
    pytest.param("pp=2", {"schedule": "looped-bfs", "stages_per_rank": 2}, {}, marks=SLOW),
    pytest.param("pp=2", {"split": ("lm_head",)}, {}, marks=SLOW),
])  # fmt: skip
@pytest.mark.parametrize("kind", DECODERS)
def test_a_proposed_pipeline_of_a_decoder_equals_one_process(kind, mesh, change, options):
    if kind == "gpt2" and change.get("split"):
        change = {"split": ("transformer.h.1",)}
    ((values, name, logits, params),) = simulate(run, 1, kind)
    names = set()
    for other in simulate(
        lambda ctx: run(ctx, kind, change, **options), faccel.MeshSpec.of(mesh).size, mesh=mesh
    ):
        # transformers computes the loss in fp32
        for got, expected in zip(other[0], values, strict=True):
            assert got == pytest.approx(expected, abs=1e-6)
        assert other[1] == name  # such as "CausalLMOutputWithPast"
        assert (other[2] - logits).abs().max() < 1e-7
        for param_name, param in other[3].items():
            expected = params.get(param_name, params.get("transformer.wte.weight"))
            assert (param - expected).abs().max() < 1e-7, param_name
        names.update(other[3])
    assert set(params) <= names


def test_a_pipeline_with_fsdp_in_its_stages_has_the_gradients_of_one_process():
    def grads(ctx):
        net = build("llama")
        plan = plan_for(net, ctx) if ctx.mesh.spec.pp > 1 else faccel.Plan()
        model = faccel.wrap(net, ctx, plan=plan)
        data = TensorDataset(*batches())
        loader = faccel.shard(DataLoader(data, 2 // ctx.data_world_size), ctx)
        window = next(faccel.windows(loader, ctx, size=4))

        def loss_of(net, batch):  # in fp64, and the same number of tokens in each row
            logits = net(input_ids=batch.data[0], attention_mask=batch.data[1]).logits
            return logits.square().mean()

        faccel.forward_backward(loss_of, model, window, faccel.init_scaler(ctx), ctx)
        return {name: full(param.grad) for name, param in model.named_parameters()}

    (one,) = simulate(grads, 1)
    for other in simulate(grads, 4, mesh="pp=2,dp_shard=2"):
        assert other
        assert all((grad - one[name]).abs().max() < 1e-12 for name, grad in other.items())


def test_a_cache_and_the_loss_of_an_evaluation_are_errors_with_a_fix():
    def call(ctx, **kwargs):
        net = build("llama")
        model = faccel.wrap(net, ctx, plan=plan_for(net, ctx))
        with torch.no_grad():
            model(batches()[0], **kwargs)

    with pytest.raises(ModelError, match="no cache of keys and values"):
        simulate(lambda ctx: call(ctx, use_cache=True), 2, mesh="pp=2")
    with pytest.raises(ModelError, match="a model has returned a scalar"):
        simulate(lambda ctx: call(ctx, labels=batches()[0]), 2, mesh="pp=2")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden, scale):
        return hidden + self.linear(hidden) * scale


class Net(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self, run_blocks):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(4, 2)
        self.run_blocks = run_blocks

    def forward(self, x):
        return self.head(self.run_blocks(self, self.embed(x), x.mean(1, keepdim=True)))


def one_by_one(net, hidden, scale):
    for block in net.blocks:
        hidden = block(hidden, scale)
    return hidden


def with_a_skip(net, hidden, scale):
    return one_by_one(net, hidden, scale) + hidden


def backwards(net, hidden, scale):
    for block in reversed(net.blocks):
        hidden = block(hidden, scale)
    return hidden


ROWS = torch.linspace(-1, 1, 24).reshape(6, 4)


def infer(ctx, run_blocks):
    net = Net(run_blocks)
    model = faccel.wrap(net, ctx, plan=plan_for(net, ctx))
    with torch.no_grad():
        return model(ROWS)


def test_blocks_that_take_values_computed_from_the_inputs_run_as_a_pipeline():
    for output in simulate(infer, 2, one_by_one, mesh="pp=2"):
        assert torch.allclose(output, Net(one_by_one)(ROWS))


@pytest.mark.parametrize(("run_blocks", "problem"), [
    (with_a_skip, "uses values of an earlier stage"),
    (backwards, "does not run the modules of the pipeline's `chain` in this order"),
])  # fmt: skip
def test_a_forward_that_a_stage_cannot_run_is_an_error(run_blocks, problem):
    with pytest.raises(ModelError, match=problem):
        simulate(infer, 2, run_blocks, mesh="pp=2")


def test_a_split_inside_the_embeddings_is_never_proposed():
    def stages(ctx):
        net = build("gpt2")
        model = faccel.wrap(net, ctx, plan=plan_for(net, ctx))
        return {name for name, _ in model.named_parameters()}

    first, *others = simulate(stages, 3, mesh="pp=3")
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= first
    assert any(name.startswith("transformer.h.0.") for name in first)
    for names in others:
        assert not any(name.startswith(("transformer.wpe", "transformer.wte")) for name in names)


def test_the_user_s_modules_keep_their_classes_and_forwards():
    def check(ctx):
        net = build("llama")
        before = {name: (type(module), vars(module).keys()) for name, module in net.named_modules()}
        model = faccel.wrap(net, ctx, plan=plan_for(net, ctx))
        with torch.no_grad():
            model(batches()[0])
        assert faccel.unwrap(model) is net
        return [name for name in ("", "model", "model.layers", "model.rotary_emb")
                if (type(net.get_submodule(name)), vars(net.get_submodule(name)).keys())
                != before[name]]  # fmt: skip

    assert simulate(check, 2, mesh="pp=2") == ([], [])


def test_a_pipeline_config_with_an_unknown_forward_is_an_error():
    with pytest.raises(faccel.errors.ConfigError, match="`forward`"):
        PipelineConfig(chain=("a",), forward="fx")
