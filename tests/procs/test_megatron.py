"""Models of Megatron-core in real processes: every mesh computes what one process computes."""

import functools
import os
import re

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import faccel
from faccel.backends.megatron.groups import start
from faccel.backends.table import BACKENDS, choose
from faccel.errors import FaccelError
from faccel.mesh import MeshSpec
from faccel.testing import simulate
from tests.megatron_cpu import install
from tests.ranks import run_ranks

REASON = BACKENDS["megatron"].probe(os.environ)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=f"Megatron-core cannot run here: {REASON}"),
]
VOCABULARY, LENGTH, WIDTH = 64, 16, 32
LIMIT = 0.5
UPDATES = 3


def on(world_size, fn, *args, **options):
    options = {"strategy": "megatron", "device": "cpu", "before": install} | options
    return run_ranks(fn, world_size, *args, **options)


def config_of(ctx, **options):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=4,
        hidden_size=WIDTH,
        num_attention_heads=4,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=ctx.mesh.spec.tp,
        pipeline_model_parallel_size=ctx.mesh.spec.pp,
        **{"params_dtype": torch.float32, "pipeline_dtype": torch.float32} | options,
    )


def built(ctx, tied=True, **options):
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    torch.manual_seed(7)
    return GPTModel(
        config_of(ctx, **options),
        get_gpt_layer_local_spec(normalization="LayerNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
        position_embedding_type="learned_absolute",
        parallel_output=True,
    )


def groups_of(model):
    """Two groups: Megatron-core would decay biases and norms otherwise."""
    matrices, vectors = [], []
    for _, param in model.named_parameters():
        (matrices if param.ndim > 1 else vectors).append(param)
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def rows(start, stop):
    tokens = torch.randint(
        0, VOCABULARY, (8 * UPDATES + 16, LENGTH), generator=faccel.random.generator(1, 0)
    )
    return tokens[start:stop]


def loss_of(model, tokens):
    positions = torch.arange(LENGTH).expand(len(tokens), LENGTH)
    mask = torch.ones(LENGTH, LENGTH).tril().bool().logical_not()[None, None]
    return model(tokens, positions, mask, labels=tokens.roll(-1, 1)).mean()


def loss_fn(model, batch):
    return loss_of(model, batch.data)


def adamw(groups):
    # `eps` is above the rounding of gradients: AdamW divides by them, and some are almost zero.
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.1)


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.1)


def prepared(ctx, make=adamw, **options):
    model = faccel.wrap(built(ctx, **options), ctx)
    return model, faccel.wrap_optimizer(make(groups_of(model)), model, ctx)


def train(ctx, model, opt, start=0, stop=UPDATES):
    """Train on 8 rows for each update, in micro-batches of 2."""
    loader = faccel.shard(DataLoader(rows(8 * start, 8 * stop), batch_size=2), ctx)
    scaler, losses, norms = faccel.init_scaler(ctx), [], []
    for window in faccel.windows(loader, ctx, size=4 // ctx.data_world_size):
        values, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=LIMIT)
        losses.append(faccel.reduce(values.mean(), ctx, op="mean").item())
        norms.append(info.grad_norm.item())
    return losses, norms


def full_state(model):
    return {name: full(value) for name, value in model.state_dict().items() if value is not None}


def full(value):
    return faccel.tree.full_tensor(value).detach().clone()


def full_optimizer(model, opt):
    """Return the states of each parameter by its name."""
    names = {id(param): name for name, param in model.named_parameters()}
    params = [param for group in opt.param_groups for param in group["params"]]
    states = {}
    for number, state in opt.state_dict()["state"].items():
        states[names[id(params[number])]] = {key: full(value) for key, value in state.items()}
    return states


def initial_state(ctx, **options):
    return plain_state(built(ctx, **options))


def plain_state(net):
    return {name: value for name, value in net.state_dict().items() if value is not None}


@functools.cache
def initial(**options):
    """Return the first values of all stages; a stage that is built alone draws others."""
    return on(1, functools.partial(initial_state, **options))[0]


def trains(ctx, first, make=adamw, **options):
    model, opt = prepared(ctx, make, **options)
    model.load_state_dict(first)
    losses, norms = train(ctx, model, opt)
    with torch.no_grad():
        loss = faccel.reduce(loss_of(model, rows(0, 8)), ctx, op="mean").item()
    return full_state(model), losses, norms, loss


def trains_in_plain_torch(ctx, make=adamw, **options):
    """Train the model of one process with PyTorch alone, on all rows of an update together."""
    net = built(ctx, **options)
    opt, losses, norms = make(groups_of(net)), [], []
    for number in range(UPDATES):
        opt.zero_grad()
        loss = loss_of(net, rows(8 * number, 8 * number + 8))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), LIMIT).item())
        opt.step()
        losses.append(loss.item())
    return plain_state(net), losses, norms, loss_of(net, rows(0, 8)).item()


@functools.cache
def expected(make=adamw, **options):
    return on(1, functools.partial(trains_in_plain_torch, make=make, **options))[0]


def check(results, reference):
    state, losses, norms, last = reference
    names = set()
    for rank_state, rank_losses, rank_norms, rank_last in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        assert rank_norms == pytest.approx(norms, rel=1e-5)
        assert rank_last == pytest.approx(last, rel=1e-5)
        for name, value in rank_state.items():
            assert (value - state[name]).abs().max() < 2e-5, name
        names |= rank_state.keys()
    assert names == state.keys()


SWIGLU = {
    "tied": False,
    "gated_linear_unit": True,
    "activation_func": F.silu,
    "add_bias_linear": False,
}
MESHES = {
    "one process": (1, {}, {}),
    "tensor parallel": (2, {"mesh": "tp=2"}, {}),
    "sequence parallel": (2, {"mesh": "tp=2"}, {"sequence_parallel": True}),
    "pipeline": (2, {"mesh": "pp=2"}, {}),
    "replicas": (2, {}, {}),
    "distributed optimizer": (2, {"zero": 1}, {}),
    "pipeline of tensor parallel": (4, {"mesh": "pp=2,tp=2"}, {}),
    "distributed optimizer and tensor parallel": (
        4,
        {"mesh": "dp_replicate=2,tp=2", "zero": 1},
        {},
    ),
}


@pytest.mark.parametrize("mesh", MESHES)
def test_each_mesh_trains_as_one_process_of_pytorch(mesh):
    world_size, settings, options = MESHES[mesh]
    results = on(world_size, functools.partial(trains, first=initial(), **options), **settings)
    check(results, expected())


def test_sgd_and_gated_layers_train_as_in_pytorch():
    options = SWIGLU | {"make": sgd}
    results = on(2, functools.partial(trains, first=initial(**SWIGLU), **options), mesh="tp=2")
    check(results, expected(**options))


def wraps_other_values(ctx):
    net = built(ctx)
    if ctx.data_rank:
        torch.nn.init.zeros_(net.embedding.word_embeddings.weight)
    return full_state(faccel.wrap(net, ctx))


def test_wrap_copies_the_parameters_of_the_first_data_rank():
    for state in on(2, wraps_other_values):
        assert_same(state, initial())


def saves(ctx, folder, first, **options):
    model, opt = prepared(ctx, **options)
    model.load_state_dict(first)
    train(ctx, model, opt, stop=2)
    faccel.save({"model": model, "opt": opt, "step": 2}, folder, ctx, step=2)
    state, states = full_state(model), full_optimizer(model, opt)
    return state, states, train(ctx, model, opt, start=2)


def loads(ctx, folder, **options):
    model, opt = prepared(ctx, **options)
    state = faccel.load({"model": model, "opt": opt, "step": 0}, folder, ctx)
    return (
        full_state(model),
        full_optimizer(model, opt),
        train(ctx, model, opt, start=state["step"]),
    )


def loads_without_strategy(ctx, folder, **options):
    from megatron.core import parallel_state

    start(ctx)
    assert ctx.parallelism.name == "single"
    model = faccel.wrap(built(ctx, **options), ctx)
    opt = faccel.wrap_optimizer(adamw(groups_of(model)), model, ctx)
    faccel.load({"model": model, "opt": opt, "step": 0}, folder, ctx)
    assert parallel_state.get_tensor_model_parallel_world_size() == 1
    return full_state(model), full_optimizer(model, opt), train(ctx, model, opt, start=2)


def union(results):
    """Return the state, the states of the optimizer and the last losses of all ranks."""
    state, states = {}, {}
    for rank_state, rank_states, _ in results:
        for name, value in rank_state.items():
            assert torch.equal(state.setdefault(name, value), value), name
        for name, entries in rank_states.items():
            for key, value in entries.items():
                assert torch.equal(states.setdefault((name, key), value), value), (name, key)
    losses, norms = results[0][2]
    return state, states, losses + norms


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


SAVED_ON = {
    "tensor parallel": (
        2,
        {"mesh": "tp=2"},
        {"sequence_parallel": True},
        ("pipeline", "one process"),
    ),
    "distributed optimizer": (2, {"zero": 1}, {}, ("tensor parallel",)),
    "pipeline": (2, {"mesh": "pp=2"}, {}, ("distributed optimizer",)),
    "gated layers": (4, {"zero": 1, "mesh": "dp_replicate=2,tp=2"}, SWIGLU, ("pipeline",)),
}
LOADED_ON = {
    "pipeline": (2, {"mesh": "pp=2"}),
    "tensor parallel": (2, {"mesh": "tp=2"}),
    "one process": (1, {}),
    "distributed optimizer": (2, {"zero": 1}),
}


@pytest.mark.parametrize("saved_on", SAVED_ON)
def test_a_checkpoint_loads_bit_for_bit_on_other_meshes(saved_on, tmp_path):
    world_size, settings, options, targets = SAVED_ON[saved_on]
    first = initial(**SWIGLU) if "tied" in options else initial()
    fn = functools.partial(saves, first=first, **options)
    state, states, results = union(on(world_size, fn, str(tmp_path), **settings))
    assert len(states) == 3 * len(first)
    options = {name: value for name, value in options.items() if name != "sequence_parallel"}
    for target in targets:
        world_size, settings = LOADED_ON[target]
        loaded = union(
            on(world_size, functools.partial(loads, **options), str(tmp_path), **settings)
        )
        assert_same(loaded[0], state)
        assert_same(loaded[1], states)
        assert loaded[2] == pytest.approx(results, rel=1e-5)


def test_a_checkpoint_loads_bit_for_bit_without_the_strategy(tmp_path):
    state, states, results = union(on(2, saves, str(tmp_path), initial(), mesh="tp=2"))
    loaded = union(on(1, loads_without_strategy, str(tmp_path), strategy=None))
    assert_same(loaded[0], state)
    assert_same(loaded[1], states)
    assert loaded[2] == pytest.approx(results, rel=1e-5)


def trains_by_hand(ctx, first):
    """The loop without `forward_backward`, with a schedule, a skipped update and `has_aux`."""
    model, opt = prepared(ctx)
    model.load_state_dict(first)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    scaler, losses, norms = faccel.init_scaler(ctx), [], []
    with torch.no_grad():
        faccel.unwrap(model).eval()
        loss_of(model, rows(0, 2))
        faccel.unwrap(model).train()
    for number in range(UPDATES):
        mine = rows(8 * number, 8 * number + 8).chunk(ctx.data_world_size)[ctx.data_rank].chunk(2)
        for i, tokens in enumerate(mine):
            with faccel.grad_sync(model, on=i == 1):
                loss = loss_of(model, tokens)
                scaler = faccel.scaled_backward(loss, scaler, ctx, scale=0.5)
            losses.append(loss.detach())
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=LIMIT, scheduler=schedule)
        norms.append(info.grad_norm.item())
    before = full_state(model)
    scaler = faccel.scaled_backward(loss_of(model, rows(0, 2)) * float("nan"), scaler, ctx)
    info, scaler = faccel.optimizer_step(opt, scaler, ctx, skip_nonfinite=True, scheduler=schedule)
    assert info.skipped
    assert_same(full_state(model), before)
    assert opt.param_groups[0]["lr"] == 0.01 * 0.5**UPDATES
    loader = faccel.shard(DataLoader(rows(0, 8), batch_size=2), ctx)
    for window in faccel.windows(loader, ctx, size=4 // ctx.data_world_size):
        result = faccel.forward_backward(with_aux, model, window, scaler, ctx, has_aux=True)
        (values, auxs), scaler = result
        assert auxs == [2] * len(values)
    mean = faccel.reduce(torch.stack(losses).mean(), ctx, op="mean").item()
    return before, norms, mean


def with_aux(model, batch):
    return loss_fn(model, batch), len(batch.data)


def trains_by_hand_in_plain_torch(ctx):
    net = built(ctx)
    opt, losses, norms = adamw(groups_of(net)), [], []
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    for number in range(UPDATES):
        opt.zero_grad()
        loss = loss_of(net, rows(8 * number, 8 * number + 8))
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(net.parameters(), LIMIT).item())
        opt.step()
        schedule.step()
        losses.append(loss.item())
    return plain_state(net), norms, sum(losses) / len(losses)


@pytest.mark.parametrize("settings", [{"mesh": "tp=2"}, {"zero": 1}], ids=["tp", "zero-1"])
def test_a_loop_with_a_schedule_equals_pytorch_and_skips_what_is_not_finite(settings):
    state, norms, mean = on(1, trains_by_hand_in_plain_torch)[0]
    for rank_state, rank_norms, rank_mean in on(2, trains_by_hand, initial(), **settings):
        assert rank_norms == pytest.approx(norms, rel=1e-5)
        assert rank_mean == pytest.approx(mean, rel=1e-5)
        for name, value in rank_state.items():
            assert (value - state[name]).abs().max() < 2e-5, name


BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


def trains_in_bf16(ctx, first, folder):
    model, opt = prepared(ctx, **BF16)
    model.load_state_dict(first)
    losses, norms = train(ctx, model, opt)
    state = {"model": model, "opt": opt}
    faccel.save(state, folder, ctx, step=UPDATES)
    saved = full_state(model)
    train(ctx, model, opt)
    faccel.load(state, folder, ctx)
    assert_same(full_state(model), saved)
    rounded = {name: value.bfloat16() for name, value in saved.items()}
    for layout_name, param in model.named_parameters():
        if param.shape == rounded[layout_name].shape:
            assert torch.equal(param, rounded[layout_name]), layout_name
    return saved, losses, norms


@pytest.mark.parametrize("settings", [{"zero": 1}, {"mesh": "pp=2"}], ids=["zero-1", "pp"])
def test_bf16_keeps_fp32_parameters_in_the_optimizer_and_in_checkpoints(settings, tmp_path):
    state, losses, norms, _ = expected()
    fn = functools.partial(trains_in_bf16, first=initial(), folder=str(tmp_path))
    for saved, rank_losses, rank_norms in on(2, fn, mixed_precision="bf16", **settings):
        assert {value.dtype for value in saved.values()} == {torch.float32}
        # 8 bits of the mantissa: 2**-8 of each value
        assert rank_losses == pytest.approx(losses, rel=0.01)
        assert rank_norms == pytest.approx(norms, rel=0.05)
        for name, value in saved.items():
            assert (value - state[name]).abs().max() < 0.02, name


def message_of(fn):
    try:
        fn()
    except FaccelError as error:
        return str(error)
    return "no error"


def makes_mistakes(ctx):
    net = built(ctx)
    messages = {
        "another module": message_of(lambda: faccel.wrap(torch.nn.Linear(2, 2), ctx)),
        "a plan": message_of(lambda: faccel.wrap(net, ctx, plan=faccel.Plan(compile="whole"))),
        "bf16": message_of(lambda: faccel.wrap(built(ctx, **BF16), ctx)),
        "fp64": message_of(lambda: faccel.wrap(built(ctx).double(), ctx)),
        "per token": message_of(
            lambda: faccel.wrap(built(ctx, calculate_per_token_loss=True), ctx)
        ),
        "two chunks": message_of(lambda: faccel.wrap(torch.nn.ModuleList([net, net]), ctx)),
        "a second start": message_of(lambda: start(ctx)),
    }
    model = faccel.wrap(net, ctx)
    params = list(model.parameters())

    def connect(opt):
        return faccel.wrap_optimizer(opt, model, ctx)

    used = torch.optim.SGD(params, lr=0.1)
    used.state[params[0]] = {"momentum_buffer": torch.zeros(1)}
    scheduled = torch.optim.SGD(params, lr=0.1)
    torch.optim.lr_scheduler.StepLR(scheduled, 1)
    messages |= {
        "Adam": message_of(lambda: connect(torch.optim.Adam(params))),
        "amsgrad": message_of(lambda: connect(torch.optim.AdamW(params, amsgrad=True))),
        "a tensor": message_of(lambda: connect(torch.optim.AdamW(params, lr=torch.tensor(0.1)))),
        "some parameters": message_of(lambda: connect(torch.optim.AdamW(params[:2]))),
        "a used optimizer": message_of(lambda: connect(used)),
        "a scheduler": message_of(lambda: connect(scheduled)),
        "a method": message_of(lambda: model.call("set_input_tensor", None)),
    }
    opt, scaler = connect(torch.optim.AdamW(params)), faccel.init_scaler(ctx)
    messages["a second optimizer"] = message_of(lambda: connect(torch.optim.AdamW(params)))
    loss = loss_of(model, rows(0, 2))
    messages["a graph"] = message_of(
        lambda: faccel.scaled_backward(loss, scaler, ctx, create_graph=True)
    )
    after = faccel.scaled_backward(loss, scaler, ctx)
    messages["clip_value"] = message_of(
        lambda: faccel.optimizer_step(opt, after, ctx, clip_value=1.0)
    )
    messages["another optimizer"] = message_of(
        lambda: faccel.optimizer_step(torch.optim.AdamW(params), after, ctx)
    )
    _, after = faccel.optimizer_step(opt, after, ctx)
    messages["no gradients"] = message_of(lambda: faccel.optimizer_step(opt, after, ctx))
    messages["a closure"] = message_of(lambda: opt.step(lambda: 0.0))
    return messages


MISTAKES = {
    "another module": "Got a torch.nn.modules.linear.Linear",
    "a plan": "a `Plan` is unsupported under Megatron-core",
    "bf16": "bf16=True, mixed_precision=no",
    "fp64": "fp32 or bf16",
    "per token": r"calculate_per_token_loss=True, `faccel.windows\(weight=...\)`",
    "two chunks": "several model chunks",
    "a second start": "has parallel groups already",
    "Adam": "use `torch.optim.AdamW` or `torch.optim.SGD`",
    "amsgrad": "amsgrad=True of a AdamW",
    "a tensor": "`lr` must be a number",
    "some parameters": "leaves out parameters that require gradients",
    "a used optimizer": "stepped before `wrap_optimizer`",
    "a scheduler": "a scheduler was made for this optimizer",
    "a method": "Megatron-core runs `forward` only",
    "no gradients": "no parameter of `opt` has a gradient",
    "a second optimizer": "already has an optimizer",
    "a graph": "`create_graph=True` is unsupported",
    "clip_value": "`clip_value` is unsupported",
    "another optimizer": "does not belong to an engine",
    "a closure": "`closure` is unsupported",
}


def test_a_mistake_raises_on_every_rank_and_names_the_fix():
    for messages in on(2, makes_mistakes, mesh="tp=2"):
        assert messages.keys() == MISTAKES.keys()
        for name, message in messages.items():
            assert re.search(MISTAKES[name], message), (name, message)
            assert "To fix: " in message, name


def runs_a_pipeline_wrongly(ctx):
    model, _ = prepared(ctx)
    scaler = faccel.init_scaler(ctx)
    loader = faccel.shard(DataLoader(rows(0, 8), batch_size=2), ctx)
    window = next(faccel.windows(loader, ctx, size=4))

    def run(fn):
        return message_of(lambda: faccel.forward_backward(fn, model, window, scaler, ctx))

    return [
        message_of(lambda: loss_of(model, rows(0, 2))),
        run(lambda model, batch: torch.zeros((), requires_grad=True)),
        run(lambda model, batch: model(batch.data[0], None, None).mean()),
    ]


def test_a_pipeline_names_what_it_cannot_run():
    for with_gradients, no_call, no_tokens in on(2, runs_a_pipeline_wrongly, mesh="pp=2"):
        assert "forward and backward of all micro-batches together" in with_gradients
        assert "must call its model once" in no_call
        assert "must be the tokens" in no_tokens


def makes_sgd(ctx):
    return message_of(lambda: prepared(ctx, sgd))


def test_the_distributed_optimizer_is_for_adamw():
    assert "zero=1, a SGD" in on(1, makes_sgd, zero=1)[0]


def wraps_in_a_simulation(ctx):
    faccel.wrap(torch.nn.Linear(1, 1), faccel.backends.use(ctx, BACKENDS["megatron"]))


def test_a_cpu_without_a_gpu_and_a_simulated_world_are_refused():
    with pytest.raises(FaccelError, match="on CUDA devices only"):
        faccel.init(env={}, strategy="megatron", device="cpu")
    with pytest.raises(FaccelError, match="does not run in a simulated world"):
        simulate(wraps_in_a_simulation, 2)


@pytest.mark.parametrize(
    ("mesh", "settings", "message"),
    [
        ("dp_shard=2", {}, "does not run this mesh"),
        ("cp=2", {}, "does not run this mesh"),
        ("dp_shard=2,ep=2", {}, "does not run this mesh"),
        ("tp=2", {"zero": 2}, "its distributed optimizer is zero=1"),
        ("tp=2", {"mixed_precision": "fp16"}, "it is no or bf16"),
    ],
)
def test_a_mesh_or_setting_that_megatron_does_not_have_is_refused(mesh, settings, message):
    config = faccel.Config(strategy="megatron", **settings)
    with pytest.raises(FaccelError, match=message):
        choose(MeshSpec.parse(mesh).fill(2), os.environ, config, "cuda")
