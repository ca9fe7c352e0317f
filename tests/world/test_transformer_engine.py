"""fp8 by Transformer Engine, on a stand-in: its recipes, its contexts, and clear refusals."""

import importlib.util
import sys

import attrs
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import faccel
from faccel.errors import BackendError, ConfigError, DeviceError, ModelError
from faccel.parallel import Fp8, PipelineConfig, TransformerEngineConfig
from faccel.parallel.fp8 import Fp8Layers, fp8_layers
from faccel.parallel.transformer_engine import recipe_of
from faccel.testing import fake_context, simulate
from tests import engine_stand_in
from tests.engine_stand_in import (
    FP8,
    DelayedScaling,
    Float8CurrentScaling,
    Format,
    MXFP8BlockScaling,
    plan_of,
)

ROWS = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def engine(monkeypatch):
    yield engine_stand_in.install(monkeypatch)
    recipe_of.cache_clear()


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Linear(32, 4))


RECIPES = [
    ("tensorwise", None, Float8CurrentScaling()),
    ("tensorwise", {"format": "e4m3"}, Float8CurrentScaling(fp8_format=Format.E4M3)),
    ("mxfp8", {"in_eval": False}, MXFP8BlockScaling()),
    ("mxfp8", {"format": "hybrid"}, MXFP8BlockScaling(fp8_format=Format.HYBRID)),
    ("delayed", None, DelayedScaling(reduce_amax=False)),
    (
        "delayed",
        {"margin": 2, "amax_history": 16, "amax": "most_recent", "format": "e4m3"},
        DelayedScaling(2, Format.E4M3, 16, "most_recent", reduce_amax=False),
    ),
]


@pytest.mark.parametrize(("recipe", "te", "expected"), RECIPES)
def test_options_are_arguments_of_the_recipe_of_the_library(recipe, te, expected, engine):
    config = None if te is None else TransformerEngineConfig(**te)
    options = Fp8(backend="te", recipe=recipe, te=config)
    assert recipe_of(options) == expected
    assert recipe_of(options) is recipe_of(attrs.evolve(options))


INVALID = [
    ({"recipe": "rowwise"}, 'write `backend="torchao"`, or one of the recipes delayed, mxfp8'),
    ({"emulate": True}, 'write `backend="torchao"`'),
    ({"recipe": "mxfp8", "backend": "torchao"}, 'write `backend="te"`, or one of the recipes row'),
    ({"backend": "torchao", "te": TransformerEngineConfig()}, "`te` has the options of `backend="),
    ({"te": {"margin": 1}}, "write `te=faccel.parallel.TransformerEngineConfig"),
    ({"te": TransformerEngineConfig(margin=0)}, "'tensorwise' keeps no history. Got margin=0"),
    ({"recipe": "mxfp8", "te": TransformerEngineConfig(amax="max")}, "Got amax='max'"),
    ({"recipe": "mxfp8", "te": TransformerEngineConfig(amax_history=9)}, "remove `amax_history`"),
]


@pytest.mark.parametrize(("options", "text"), INVALID)
def test_options_that_exclude_each_other_are_errors(options, text):
    with pytest.raises(ConfigError) as caught:
        Fp8(**{"backend": "te", **options})
    assert text in str(caught.value)


INVALID_VALUES = [
    ({"format": "e5m2"}, "e4m3 in forward, and e5m2 for gradients"),
    ({"format": "E4M3"}, "use one of `e4m3`, `hybrid`"),
    ({"margin": -1}, "`margin` must be an int of at least 0"),
    ({"amax_history": 0}, "`amax_history` must be an int of at least 1"),
    ({"amax": "mean"}, "'max', 'most_recent'"),
    ({"in_eval": 1}, "`in_eval` must be True or False"),
]


@pytest.mark.parametrize(("values", "text"), INVALID_VALUES)
def test_an_invalid_value_is_an_error_with_valid_ones(values, text):
    with pytest.raises(ConfigError) as caught:
        TransformerEngineConfig(**values)
    assert text in str(caught.value)


def error_of(cls, plan, mesh="dp_replicate=1", world_size=1):
    ctx = fake_context(0, world_size, config=FP8, mesh=mesh)
    with pytest.raises(cls) as caught:
        fp8_layers(make_net(), plan, ctx)
    return str(caught.value)


OLD_DEVICES = [
    ("tensorwise", (8, 0), "8.9"),
    ("delayed", (8, 0), "8.9"),
    ("mxfp8", (9, 0), "10.0"),
    ("tensorwise", (8, 9), None),
    ("delayed", (8, 9), None),
    ("mxfp8", (10, 0), None),
]


@pytest.mark.parametrize(("recipe", "capability", "needed"), OLD_DEVICES)
def test_an_old_device_is_an_error_with_a_recipe_that_it_has(
    recipe, capability, needed, engine, monkeypatch
):
    engine_stand_in.set_capability(monkeypatch, capability)
    if needed is None:
        ctx = fake_context(0, 1, config=FP8)
        assert list(fp8_layers(make_net(), plan_of(recipe), ctx).layers) == ["0", "2"]
        return
    message = error_of(DeviceError, plan_of(recipe))
    assert f"needs a device of compute capability {needed}" in message
    assert ('recipe="tensorwise"' in message) == (capability >= (8, 9))
    assert 'mixed_precision="bf16"' in message


def test_a_device_that_the_library_refuses_is_an_error_with_its_reason(engine):
    engine.mxfp8 = (False, "MXFP8 is not supported on 12.0+ architectures yet.")
    message = error_of(DeviceError, plan_of("mxfp8"))
    assert "12.0+" in message and 'recipe="tensorwise"' in message
    assert fp8_layers(make_net(), plan_of(), fake_context(0, 1, config=FP8)).layers


def test_a_version_without_the_recipe_is_an_error_with_the_command(monkeypatch):
    engine_stand_in.install(monkeypatch, recipes=(DelayedScaling,))
    message = error_of(BackendError, plan_of("mxfp8"))
    assert "`MXFP8BlockScaling`" in message and "pip install --upgrade" in message
    recipe_of.cache_clear()


def test_a_missing_package_is_an_error_with_the_command(engine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "transformer_engine[pytorch]" in error_of(BackendError, plan_of())


def test_the_library_refuses_tensor_parallel(engine):
    message = error_of(ConfigError, plan_of(), "tp=2", 2)
    assert "tp=2" in message and 'backend="torchao"' in message


EXCLUDED = {
    "activation_checkpoint": "full",
    "compile": "units",
    "pipeline": PipelineConfig(chain=("0", "1", "2", "3")),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_a_history_excludes_what_runs_forwards_in_another_order(name, engine):
    mesh, world_size = ("pp=2", 2) if name == "pipeline" else ("dp_replicate=1", 1)
    fields = {name: EXCLUDED[name]}
    message = error_of(ConfigError, plan_of("delayed", **fields), mesh, world_size)
    assert f"excludes `{name}`" in message and 'recipe="tensorwise"' in message
    ctx = fake_context(0, world_size, config=FP8, mesh=mesh)
    assert fp8_layers(make_net(), plan_of("tensorwise", **fields), ctx).layers


def test_a_forward_that_runs_again_in_backward_is_an_error_with_a_history(engine):
    net = make_net()
    Fp8Layers({"0": net[0]}, Fp8(backend="te", recipe="delayed")).convert()
    out = checkpoint(net, ROWS, use_reentrant=False)
    with pytest.raises(ModelError, match="activation checkpointing"):
        out.sum().backward()


SHAPES = [(32,), (5, 32), (2, 5, 32), (32, 32), (0, 32), (4, 0, 32)]


@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8", "delayed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_layers_compute_with_the_parameters_of_the_model_for_any_number_of_rows(
    shape, recipe, engine
):
    net, expected = make_net(), make_net()
    Fp8Layers({"0": net[0], "2": net[2]}, Fp8(backend="te", recipe=recipe)).convert()
    x, y = (torch.ones(shape, requires_grad=True) for _ in range(2))
    out, expected_out = net(x), expected(y)
    assert out.shape == expected_out.shape
    torch.testing.assert_close(out, expected_out)
    out.square().sum().backward()
    expected_out.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for param, other in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(param.grad, other.grad)
    assert net.state_dict().keys() == expected.state_dict().keys()


def test_sides_of_mxfp8_are_multiples_of_its_blocks(engine):
    net = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32))
    ctx = fake_context(0, 1, config=FP8)
    assert list(fp8_layers(net, plan_of("mxfp8"), ctx).layers) == ["1"]
    assert list(fp8_layers(net, plan_of("tensorwise"), ctx).layers) == ["0", "1"]


@pytest.mark.parametrize("in_eval", [True, False])
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed"])
def test_evaluation_is_in_fp8_or_not(recipe, in_eval, engine):
    plan = plan_of(recipe, TransformerEngineConfig(in_eval=in_eval))
    model = faccel.wrap(make_net(), fake_context(0, 1, config=FP8), plan=plan)
    model(ROWS)
    model.eval()(ROWS)
    enabled = [contexts[-1][0] for contexts in engine.calls.forwards]
    assert enabled == [True, True, in_eval, in_eval]


def test_an_older_version_is_called_by_its_names(monkeypatch):
    stand_in = engine_stand_in.install(monkeypatch)

    def fp8_autocast(enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None):
        return stand_in.autocast(enabled, recipe=fp8_recipe)

    engine = sys.modules["transformer_engine.pytorch"]
    del engine.autocast, engine.is_mxfp8_available
    engine.fp8_autocast = fp8_autocast
    ctx = fake_context(0, 1, config=FP8)
    net = make_net()
    fp8_layers(net, plan_of("mxfp8"), ctx).convert()
    net(ROWS)
    assert stand_in.calls.forwards == [((True, MXFP8BlockScaling()),)] * 2
    recipe_of.cache_clear()


def train(ctx, plan, engine):
    """Return the losses of some updates, and how often histories have moved."""
    model = faccel.wrap(make_net(), ctx, plan=plan)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler = faccel.init_scaler(ctx)
    losses = []
    for _ in range(3):
        loss = (model(ROWS) - ROWS[:, :4]).square().mean()
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        losses.append(loss.item())
    with torch.no_grad():
        model.eval()(ROWS)
    calls = engine.calls
    return losses, (calls.num_updates, calls.num_grad_updates), calls.forwards


MESHES = {"dp_replicate=1": 1, "dp_replicate=2": 2, "dp_shard=2": 2}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_histories_move_once_in_a_training_forward_of_the_model(recipe, mesh, engine):
    world_size = MESHES[mesh]
    results = simulate(train, world_size, plan_of(recipe), engine, config=FP8, mesh=mesh)
    bf16 = {"mixed_precision": "bf16"}
    expected = simulate(train, world_size, faccel.Plan(), engine, config=bf16, mesh=mesh)
    num_updates = 3 if recipe == "delayed" else 0
    for result, (expected_losses, *_) in zip(results, expected, strict=True):
        losses, updates, forwards = result
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert updates == (num_updates, num_updates)
        # Two layers in three updates and an evaluation, each in one context.
        context = (True, recipe_of(plan_of(recipe).fp8))
        assert forwards == [(context,)] * 8
