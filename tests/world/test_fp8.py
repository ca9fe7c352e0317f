"""Linear layers in fp8: the same numbers on every mesh, plain checkpoints, and clear refusals."""

import importlib.util
import logging

import attrs
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import faccel
from faccel.errors import BackendError, ConfigError, DeviceError
from faccel.parallel import ActivationCheckpointing, Fp8, FsdpConfig, PipelineConfig
from faccel.parallel.fp8 import fp8_layers
from faccel.testing import fake_context, simulate
from faccel.tree import full_tensor

torchao_float8 = pytest.importorskip("torchao.float8", reason="torchao is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
MESHES = {
    "dp_replicate=2": 2,
    "dp_shard=2": 2,
    "dp_replicate=2,dp_shard=2": 4,
    "tp=2": 2,
    "pp=2,dp_shard=2": 4,
}
FP8 = {"mixed_precision": "fp8"}
PLAN = faccel.Plan(
    fp8=Fp8(emulate=True),
    tensor={"0": "colwise", "2": "rowwise"},
    units=("0", "2"),
    pipeline=PipelineConfig(chain=("0", "1", "2", "3"), split=("2",)),
)
ROWS = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 4))


def with_fp8(plan=PLAN, **options):
    return attrs.evolve(plan, fp8=Fp8(emulate=True, **options))


def loss_fn(model, batch):
    return (model(batch.data) - batch.data[:, :4]).square().mean()


def train(ctx, plan=PLAN, num_steps=3, state=None):
    """Return the losses, and the model with its optimizer."""
    model = faccel.wrap(make_net(), ctx, plan=plan)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler = faccel.init_scaler(ctx)
    loader = faccel.shard(torch.utils.data.DataLoader(ROWS, 8), ctx, split_batches=True)
    losses = []
    for window in faccel.windows(loader, ctx, size=2):
        if len(losses) == num_steps:
            break
        loss, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
        losses.append(faccel.reduce(loss.mean(), ctx, op="mean").item())
    return losses, model, opt


def losses_of(ctx, plan):
    return train(ctx, plan)[0]


def by_hand(recipe):
    """Return the losses of torchao on one process, without faccel."""
    import dataclasses

    config = torchao_float8.Float8LinearConfig.from_recipe_name(recipe)
    config = dataclasses.replace(config, emulate=True)
    net = make_net()
    for index in (0, 2):
        net[index] = torchao_float8.convert_to_float8_training(net[index], config=config)
        # Autocast casts its input on CUDA only.
        net[index].register_forward_pre_hook(lambda layer, args: (args[0].bfloat16(),))
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for step in range(2):
        loss = 0
        for rows in ROWS[16 * step :][:16].split(8):
            with torch.autocast("cpu", torch.bfloat16):
                out = net(rows).float()
            loss = loss + (out - rows[:, :4]).square().mean() / 2
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_process_computes_what_torchao_computes(recipe):
    (losses,) = simulate(losses_of, 1, with_fp8(recipe=recipe), config=FP8)
    assert losses == by_hand(recipe)
    (bf16,) = simulate(
        losses_of, 1, attrs.evolve(PLAN, fp8=None), config={"mixed_precision": "bf16"}
    )
    assert losses != bf16  # it is not bf16 under another name
    assert losses == pytest.approx(bf16, rel=0.02)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("recipe", RECIPES[:2])
@pytest.mark.slow
def test_every_mesh_computes_the_losses_of_one_process(recipe, mesh):
    expected = by_hand(recipe)
    for losses in simulate(losses_of, MESHES[mesh], with_fp8(recipe=recipe), config=FP8, mesh=mesh):
        # Each rank has other rows, so other scales: they round differently.
        assert losses == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("checkpointing", [None, ActivationCheckpointing()])
def test_sharded_weights_compute_the_losses_of_replicas_bit_for_bit(checkpointing):
    plan = attrs.evolve(PLAN, activation_checkpoint=checkpointing)
    expected = simulate(losses_of, 2, plan, config=FP8)
    for all_gather in (True, False):
        plan = with_fp8(plan, all_gather=all_gather)
        assert list(simulate(losses_of, 2, plan, config=FP8, mesh="dp_shard=2")) == list(expected)


def gathered_bytes(plan, precision):
    """Return the bytes of weights that rank 0 sends in the all-gathers of one step."""

    def step(ctx):
        net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
        model = faccel.wrap(net, ctx, plan=plan)
        model(torch.ones(4, 64)).sum().backward()

    trace = simulate(step, 2, config={"mixed_precision": precision}, mesh="dp_shard=2").trace
    gathers = [event for event in trace if event.rank == 0 and event.op == "all_gather"]
    return sum(event.num_bytes for event in gathers if event.num_bytes > 100)  # not of metadata


def test_fsdp_gathers_the_weights_in_fp8():
    plan = faccel.Plan(units=("0", "1", "2"))
    shards = 3 * 64 * 64 // 2  # elements
    num_gathers = 2  # in forward and in backward
    assert gathered_bytes(with_fp8(plan), "fp8") == num_gathers * shards
    assert gathered_bytes(with_fp8(plan, all_gather=False), "fp8") == num_gathers * shards * 4
    low = attrs.evolve(plan, fsdp=FsdpConfig(low_precision_params=True))
    assert gathered_bytes(low, "bf16") == num_gathers * shards * 2


def reductions(ctx):
    """Return the numbers of all-reduces over the shards in four forwards."""
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model = faccel.wrap(net, ctx, plan=with_fp8(faccel.Plan()))
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    faccel.barrier(ctx)  # ends the part of `wrap`
    for _ in range(2):
        for _ in range(2):  # micro-batches
            faccel.scaled_backward(model(torch.ones(4, 64)).sum(), faccel.init_scaler(ctx), ctx)
        opt.step()
        opt.zero_grad()


def test_all_scales_are_reduced_at_once_after_each_update_and_not_in_each_forward():
    trace = simulate(reductions, 2, config=FP8, mesh="dp_shard=2").trace
    ops = [event.op for event in trace if event.rank == 0]
    ops = ops[ops.index("barrier") :]
    assert ops.count("all_reduce") == 2
    assert ops.count("all_gather") == 4  # the root stays gathered from forward to backward


def outputs_after_writes(ctx, write):
    """Return the output of a model whose weights `write` has changed, before and after."""
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model = faccel.wrap(net, ctx, plan=with_fp8(faccel.Plan(units=("0",))))
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, ctx)
    model(ROWS).sum().backward()
    opt.step()
    opt.zero_grad()
    model(ROWS).sum().backward()
    opt.zero_grad()
    full = {name: full_tensor(value).clone() for name, value in model.state_dict().items()}
    write(model, {name: 100 * value for name, value in full.items()}, opt, ctx)
    after = model(ROWS).detach()
    other = faccel.wrap(
        nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), ctx, plan=with_fp8(faccel.Plan())
    )
    other.load_state_dict({name: 100 * value for name, value in full.items()})
    return after, other(ROWS).detach()


def by_load_state_dict(model, state, opt, ctx):
    model.load_state_dict(state)


def by_copy(model, state, opt, ctx):
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(100)


def by_gathered(model, state, opt, ctx):
    with faccel.parallel.gathered(model, ctx, modifier_rank=0) as params, torch.no_grad():
        if ctx.is_main:
            for param in params.values():
                param.mul_(100)


def by_an_optimizer_that_writes_to_data(model, state, opt, ctx):
    class Times100(torch.optim.Optimizer):
        def step(self):
            for param in self.param_groups[0]["params"]:
                param.data.mul_(100)

    faccel.wrap_optimizer(Times100(model.parameters(), {}), model, ctx).step()


@pytest.mark.parametrize(
    "write", [by_load_state_dict, by_copy, by_gathered, by_an_optimizer_that_writes_to_data]
)
def test_weights_that_were_written_get_new_scales(write):
    for after, expected in simulate(outputs_after_writes, 2, write, config=FP8, mesh="dp_shard=2"):
        assert torch.equal(after, expected)


def save_and_load(ctx, folder, plan):
    _, model, opt = train(ctx, plan, num_steps=2)
    faccel.save({"model": model, "opt": opt}, folder, ctx, step=1)
    return faccel.parallel.full_state_dict(model, ctx, rank=None), opt_state(opt)


def opt_state(opt):
    return {
        f"{index}.{key}": full_tensor(value).clone()
        for index, state in enumerate(opt.state.values())
        for key, value in state.items()
    }


def load_and_save_again(ctx, folder, plan, second_folder, background):
    model = faccel.wrap(make_net(), ctx, plan=plan)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    faccel.load({"model": model, "opt": opt}, folder, ctx)
    loaded = faccel.parallel.full_state_dict(model, ctx, rank=None), opt_state(opt)
    faccel.save({"model": model, "opt": opt}, second_folder, ctx, step=1, background=background)
    return loaded


BF16_PLAN = attrs.evolve(PLAN, fp8=None)
RUNS = {
    "fp8 on one process": (1, None, "fp8", PLAN),
    "bf16 on one process": (1, None, "bf16", BF16_PLAN),
    "fp8 under DDP": (2, "dp_replicate=2", "fp8", PLAN),
    "fp8 under FSDP2": (2, "dp_shard=2", "fp8", PLAN),
    "bf16 under FSDP2": (2, "dp_shard=2", "bf16", BF16_PLAN),
}
CHAINS = [
    ("fp8 on one process", "bf16 on one process", "fp8 on one process"),
    ("fp8 under DDP", "bf16 under FSDP2", "fp8 under FSDP2"),
    ("fp8 under FSDP2", "bf16 under FSDP2", "fp8 under FSDP2"),
    ("fp8 under FSDP2", "bf16 on one process", "fp8 under DDP"),
    ("bf16 under FSDP2", "fp8 under FSDP2", "bf16 on one process"),
]


def run(name, fn, *args):
    num_ranks, mesh, precision, plan = RUNS[name]
    config = {"mixed_precision": precision}
    args = [plan if arg is PLAN else arg for arg in args]
    return list(simulate(fn, num_ranks, *args, config=config, mesh=mesh))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
def test_checkpoints_are_plain_and_load_with_and_without_fp8(tmp_path, chain, background):
    expected = run(chain[0], save_and_load, tmp_path / "0", PLAN)[0]
    for values in expected:
        assert {value.dtype for value in values.values()} == {torch.float32}
        assert {type(value) for value in values.values()} == {torch.Tensor}
    for index, name in enumerate(chain[1:]):
        folders = tmp_path / str(index), tmp_path / str(index + 1)
        for loaded in run(name, load_and_save_again, folders[0], PLAN, folders[1], background):
            for values, expected_values in zip(loaded, expected, strict=True):
                torch.testing.assert_close(values, expected_values, rtol=0, atol=0)


def test_an_export_has_the_weights_of_a_run_without_fp8(tmp_path):
    from safetensors.torch import load_file

    def export(ctx):
        model = faccel.wrap(make_net(), ctx, plan=PLAN)
        faccel.checkpoint.export_model(model, tmp_path, ctx)

    simulate(export, 2, config=FP8, mesh="dp_shard=2")
    (path,) = tmp_path.glob("*.safetensors")
    expected = {name: value.detach() for name, value in make_net().state_dict().items()}
    torch.testing.assert_close(load_file(path), expected, rtol=0, atol=0)

    def load(ctx):
        net = make_net()
        nn.init.zeros_(net[0].weight)
        model = faccel.wrap(net, ctx, plan=PLAN)
        faccel.checkpoint.load_model(model, tmp_path, ctx)
        return faccel.parallel.full_state_dict(model, ctx, rank=None)

    for state in simulate(load, 2, config=FP8, mesh="dp_shard=2"):
        torch.testing.assert_close(state, expected, rtol=0, atol=0)


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
def test_debug_mode_computes_the_same(mesh):
    expected = simulate(losses_of, 2, PLAN, config=FP8, mesh=mesh)
    assert list(simulate(losses_of, 2, PLAN, config=FP8 | {"debug": True}, mesh=mesh)) == list(
        expected
    )


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "dp_shard=2"])
def test_compiled_units_compute_the_same(mesh):
    num_ranks = 1 if mesh is None else 2
    plan = attrs.evolve(PLAN, compile="units")
    # The compiler runs in other processes, for which the simulation waits.
    compiled = simulate(losses_of, num_ranks, plan, config=FP8, mesh=mesh, timeout_s=float("inf"))
    for losses in compiled:
        assert losses == pytest.approx(by_hand("tensorwise"), rel=0.02)


def averages(ctx):
    model = faccel.wrap(make_net(), ctx, plan=PLAN)
    ema = faccel.parallel.init_ema(model, ctx, decay=0.5)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)
    ema = faccel.parallel.update_ema(ema, model, ctx)
    with faccel.parallel.ema_weights(model, ema, ctx):
        return faccel.parallel.full_state_dict(model, ctx, rank=None)


def test_averages_of_weights_that_are_gathered_in_fp8():
    for state in simulate(averages, 2, config=FP8, mesh="dp_shard=2"):
        expected = {name: 2 * value.detach() for name, value in make_net().state_dict().items()}
        torch.testing.assert_close(state, expected)


def test_a_model_on_meta_gets_rank_0s_values():
    def build(ctx):
        with torch.device("cpu" if ctx.is_main else "meta"):
            net = make_net()
        model = faccel.wrap(net, ctx, plan=PLAN)
        return model(ROWS).detach(), faccel.parallel.full_state_dict(model, ctx, rank=None)

    for _, state in simulate(build, 2, config=FP8, mesh="dp_shard=2"):
        expected = {name: value.detach() for name, value in make_net().state_dict().items()}
        torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_a_weight_with_fewer_rows_than_ranks_is_gathered_as_it_is_stored():
    def step(ctx):
        model = faccel.wrap(nn.Linear(32, 16), ctx, plan=with_fp8(faccel.Plan()))
        out = model(ROWS)
        out.sum().backward()
        return out.detach()

    outputs = simulate(step, 12, config=FP8, mesh="dp_shard=12")  # 2 rows on each of 8 ranks
    assert all(torch.equal(out, outputs[0]) for out in outputs)


# What is converted, and what is reported.


def test_hooks_names_and_references_stay():
    net = make_net()
    layer, calls = net[0], []
    layer.register_forward_hook(lambda *args: calls.append(1))
    parameters = dict(net.named_parameters())
    model = faccel.wrap(net, fake_context(0, 1, config=FP8), plan=PLAN)
    model(ROWS)
    assert calls == [1]
    assert net[0] is layer and isinstance(layer, torchao_float8.float8_linear.Float8Linear)
    assert all(parameters[name] is param for name, param in model.named_parameters())
    assert "Float8Linear" in repr(net)


def in_fp8(net):
    cls = torchao_float8.float8_linear.Float8Linear
    return [name for name, module in net.named_modules() if isinstance(module, cls)]


class Tied(nn.Module):
    """Layers that fp8 leaves out, and one that it takes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 16)
        self.body = nn.Linear(16, 16)
        self.odd = nn.Linear(16, 24)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.embed.weight
        self.lm_head = nn.Linear(16, 16)

    def forward(self, x):
        return self.lm_head(self.body(x))


def test_layers_that_stay_in_bf16_are_reported_with_the_reason(caplog, log_records):
    net = Tied()
    with caplog.at_level(logging.INFO):
        faccel.wrap(net, fake_context(0, 1, config=FP8), plan=with_fp8(faccel.Plan()))
    assert in_fp8(net) == ["body"]
    text = "\n".join(record.getMessage() for record in log_records() if "fp8" in record.name)
    assert "fp8 in 1 of 4 linear layers of Tied" in text
    assert "`odd` (24 x 16, not multiples of 16)" in text
    assert "`tied` (its weight is tied)" in text
    assert "too small to gain from fp8 (tensorwise): `body`" in text
    assert "not compiled" in text


def test_rank_0_alone_reports(log_records):
    simulate(losses_of, 2, PLAN, config=FP8)
    warnings = [record for record in log_records() if record.levelno >= logging.WARNING]
    texts = [record.getMessage() for record in warnings if "fp8" in record.name]
    assert len(texts) == len(set(texts)) == 3


@pytest.mark.parametrize(
    ("skip", "expected"),
    [(None, ["body"]), (("body",), ["lm_head"]), ((), ["body", "lm_head"]), (("*",), [])],
)
def test_skip_names_layers_that_stay_in_bf16(skip, expected):
    net = Tied()
    faccel.wrap(net, fake_context(0, 1, config=FP8), plan=with_fp8(faccel.Plan(), skip=skip))
    assert in_fp8(net) == expected


def test_layers_whose_weight_is_computed_stay_in_bf16():
    net = nn.Sequential(prune.identity(nn.Linear(16, 16), "weight"), nn.Linear(16, 16))
    faccel.wrap(net, fake_context(0, 1, config=FP8), plan=with_fp8(faccel.Plan()))
    assert in_fp8(net) == ["1"]


def test_skip_leaves_out_the_layers_inside_of_a_module():
    net = nn.ModuleDict({"a": nn.Sequential(nn.Linear(16, 16)), "b": nn.Linear(16, 16)})
    faccel.wrap(net, fake_context(0, 1, config=FP8), plan=with_fp8(faccel.Plan(), skip="a"))
    assert in_fp8(net) == ["b"]


def test_routers_stay_in_bf16():
    net = nn.Sequential(faccel.parallel.MoE(16, 32, 16), nn.Linear(16, 16))
    faccel.wrap(net, fake_context(0, 1, config=FP8), plan=with_fp8(faccel.Plan()))
    assert in_fp8(net) == ["1"]


def test_a_layer_that_is_added_later_is_converted_by_rewrap():
    ctx = fake_context(0, 1, config=FP8)
    net = make_net()
    model = faccel.wrap(net, ctx, plan=PLAN)
    net.append(nn.Linear(16, 16))
    faccel.rewrap(model, ctx)
    assert in_fp8(net) == ["0", "2", "4"]


def test_units_in_fp32_stay_in_fp32():
    def convert(ctx):
        net = make_net()
        fsdp = FsdpConfig(fp32_units=("2",))
        faccel.wrap(net, ctx, plan=attrs.evolve(PLAN, fsdp=fsdp, pipeline=None))
        return in_fp8(net)

    assert list(simulate(convert, 2, config=FP8, mesh="dp_shard=2")) == [["0"], ["0"]]


# What is an error.


class Device:
    """A pretended device of an old compute capability."""

    def __init__(self, capability):
        self.capability = capability

    def get_device_capability(self, device):
        return self.capability


def error_of(cls, plan, config=FP8, device="cpu"):
    ctx = attrs.evolve(fake_context(0, 1, config=config), device=torch.device(device))
    with pytest.raises(cls) as info:
        fp8_layers(make_net(), plan, ctx)
    return str(info.value)


def test_a_cpu_needs_emulate():
    message = error_of(DeviceError, faccel.Plan())
    assert "the device `cpu`" in message and "Fp8(emulate=True)" in message


OLD_DEVICES = [
    ("tensorwise", (8, 0), "8.9"),
    ("rowwise", (8, 9), "9.0"),
    ("rowwise_with_gw_hp", (8, 9), "9.0"),
    ("tensorwise", (8, 9), None),
    ("rowwise", (9, 0), None),
]


@pytest.mark.parametrize(("recipe", "capability", "needed"), OLD_DEVICES)
def test_an_old_device_is_an_error_with_what_it_has(recipe, capability, needed, monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: Device(capability))
    plan = faccel.Plan(fp8=Fp8(recipe=recipe))
    if needed is None:
        ctx = attrs.evolve(fake_context(0, 1, config=FP8), device=torch.device("cuda:0"))
        assert list(fp8_layers(make_net(), plan, ctx).layers) == ["0", "2"]
        return
    message = error_of(DeviceError, plan, device="cuda:0")
    assert f"needs a device of compute capability {needed}" in message
    assert f"compute capability {capability[0]}.{capability[1]}" in message
    assert 'mixed_precision="bf16"' in message


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_plan_with_fp8_needs_the_precision_fp8(precision):
    message = error_of(ConfigError, PLAN, config={"mixed_precision": precision})
    assert f"mixed_precision='{precision}'" in message
    assert 'faccel.init(mixed_precision="fp8")' in message


def test_a_missing_package_is_an_error_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert 'pip install "faccel[ao]"' in error_of(BackendError, PLAN)


@pytest.mark.parametrize("pattern", ["heads", "*.*"])
def test_a_pattern_of_skip_that_matches_nothing_is_an_error(pattern):
    assert pattern in error_of(ConfigError, with_fp8(faccel.Plan(), skip=pattern))


def test_a_pattern_for_a_model_of_one_module_is_an_error_that_explains_it():
    plan = with_fp8(faccel.Plan(), skip="head")
    with pytest.raises(ConfigError, match="a model without a named module") as caught:
        faccel.wrap(nn.Linear(16, 16), fake_context(0, 1, config=FP8), plan=plan)
    assert "remove `head`" in caught.value.fix


INVALID = [
    ({"recipe": "blockwise"}, "rowwise_with_gw_hp"),
    ({"backend": "msamp"}, "torchao"),
    ({"emulate": 1}, "emulate"),
    ({"skip": 3}, "patterns"),
]


@pytest.mark.parametrize(("options", "text"), INVALID)
def test_invalid_options_are_errors(options, text):
    with pytest.raises(ConfigError) as info:
        Fp8(**options)
    assert text in str(info.value)


def test_a_plan_takes_a_record_of_options():
    with pytest.raises(ConfigError, match=r"faccel\.parallel\.Fp8"):
        faccel.Plan(fp8="rowwise")


def test_parameters_in_fp8_cannot_be_kept_on_fewer_ranks():
    plan = attrs.evolve(PLAN, fsdp=FsdpConfig(reshard_after_forward=2))
    with pytest.raises(ConfigError, match="reshard_after_forward=2"):
        simulate(losses_of, 4, plan, config=FP8, mesh="dp_shard=4")


def test_deepspeed_refuses_fp8():
    refuse = faccel.backends.BACKENDS["deepspeed"].refuse
    assert "fp8" in refuse(faccel.Config(mixed_precision="fp8"), "cuda")


def test_pure_functions_refuse_fp8():
    ctx = fake_context(0, 1, config=FP8)
    with pytest.raises(ConfigError, match="mixed_precision='fp8'"):
        faccel.func.value_and_grad(lambda params, batch, generator: 0, ctx)
    with pytest.raises(ConfigError, match="mixed_precision='fp8'"):
        faccel.func.init_state(make_net(), faccel.func.sgd(0.1), ctx, seed=0)
