"""Layers that are stored in a smaller dtype than they compute in; compared with rounded weights."""

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ConfigError, ModelError, OptimizerError
from faccel.parallel import Compile, LayerwiseCasting, PipelineConfig
from faccel.plan_values import plan_values, to_plan
from faccel.testing import fake_context, simulate
from tests.ranks import run_ranks

STORED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
IMAGES = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
ONE = fake_context(0, 1)
FP8 = faccel.Plan(layerwise_casting="float8_e4m3fn")


def image_net(*, is_frozen=True):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(),
        nn.Linear(100, 32),
        nn.ReLU(),
        nn.Linear(32, 4, bias=False),
    )
    return net.requires_grad_(not is_frozen)


def rounded(net, dtype):
    """Return the same net with weights that were stored in `dtype`, in their former dtype."""
    for layer in net.modules():
        if type(layer) in STORED:
            for param in layer.parameters(recurse=False):
                param.data = param.data.to(dtype).to(param.dtype)
    return net


def run_wrapped(ctx, plan):
    net = image_net()
    params = dict(net.named_parameters())
    out = faccel.wrap(net, ctx, plan=plan)(IMAGES)
    assert all(param is params[name] for name, param in net.named_parameters())
    return out, {name: param.dtype for name, param in net.named_parameters()}


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16", "bf16-true"])
@pytest.mark.parametrize("storage", ["float8_e4m3fn", "float8_e5m2", "bfloat16"])
def test_a_layer_computes_with_rounded_weights(storage, precision, num_ranks):
    dtype = getattr(torch, storage)
    expected, images = image_net(), IMAGES
    if precision == "bf16-true":
        expected, images = expected.to(torch.bfloat16), images.to(torch.bfloat16)
    rounded(expected, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        value = expected(images).float()
    plan = faccel.Plan(layerwise_casting=storage)
    config = {"mixed_precision": precision}
    for out, dtypes in simulate(run_wrapped, num_ranks, plan, config=config):
        assert torch.equal(out, value)
        assert {dtypes[name] for name in dtypes if name[0] != "1"} == {dtype}
        assert dtypes["1.weight"] == expected[1].weight.dtype


@pytest.mark.slow
def test_the_peer_computes_the_same():
    hooks = pytest.importorskip("accelerate.big_modeling")
    net = image_net().to(torch.bfloat16)
    hooks.attach_layerwise_casting_hooks(
        net, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16,
        skip_modules_classes=(nn.GroupNorm,), skip_modules_pattern=("none",),
    )  # fmt: skip
    expected = net(IMAGES.to(torch.bfloat16))
    model = faccel.wrap(image_net().to(torch.bfloat16), ONE, plan=FP8)
    assert torch.equal(model(IMAGES.to(torch.bfloat16)), expected)


def test_an_error_in_forward_leaves_the_stored_weights():
    net = image_net()
    model = faccel.wrap(net, ONE, plan=FP8)
    params = dict(net.named_parameters())
    with pytest.raises(RuntimeError):
        model(torch.zeros(2, 5, 4, 4))
    assert dict(net.named_parameters()) == params
    assert net[0].weight.dtype == torch.float8_e4m3fn
    assert model(IMAGES).isfinite().all()


class Adapted(nn.Module):
    """A frozen layer with a trained adapter, as PEFT makes them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.base.requires_grad_(False)
        self.adapter = nn.Linear(6, 6)

    def forward(self, x):
        return self.base(x + self.adapter(x))


ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))


def train_adapter(ctx, plan):
    model = faccel.wrap(Adapted(), ctx, plan=plan)
    # All parameters, as scripts write it: frozen ones are not stepped.
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.5), model, ctx)
    for _ in range(3):
        rows = ROWS[ctx.data_rank :: ctx.data_world_size]
        loss = model(rows).square().mean()
        scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        faccel.optimizer_step(opt, scaler, ctx)
    assert model.module.base[0].weight.dtype == torch.float8_e4m3fn
    return {name: param.detach().clone() for name, param in model.module.adapter.named_parameters()}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_adapters_train_on_stored_layers(num_ranks, checkpointed):
    net = rounded(Adapted(), torch.float8_e4m3fn)
    torch.manual_seed(0)
    net.adapter.load_state_dict(Adapted().adapter.state_dict())  # not rounded: it is trained
    opt = torch.optim.SGD(net.adapter.parameters(), lr=0.5)
    for _ in range(3):
        net(ROWS).square().mean().backward()
        opt.step()
        opt.zero_grad()
    options = {"units": ("base",), "activation_checkpoint": "full"} if checkpointed else {}
    plan = faccel.Plan(layerwise_casting="float8_e4m3fn", **options)
    for params in simulate(train_adapter, num_ranks, plan):
        for name, expected in net.adapter.named_parameters():
            torch.testing.assert_close(params[name], expected.detach())


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm1 = nn.ModuleDict({"linear": nn.Linear(16, 16)})
        self.up = nn.Linear(16, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied.weight = self.embed.weight
        self.lm_head = nn.Linear(16, 16)

    def forward(self, x):
        x = self.embed(x)
        x = self.attention(x, x, x)[0]
        return self.lm_head(self.tied(self.up(self.norm1["linear"](x))))


def stored_names(plan):
    net = Names().requires_grad_(False)
    faccel.wrap(net, ONE, plan=plan)(torch.zeros(2, 3, dtype=torch.long))
    return {
        name.rpartition(".")[0]
        for name, param in net.named_parameters()
        if param.dtype == torch.float8_e4m3fn
    }


@pytest.mark.parametrize(
    ("skip", "names"),
    [
        (None, {"up"}),
        ((), {"up", "norm1.linear", "lm_head"}),
        ("up", {"norm1.linear", "lm_head"}),
        (("norm1", "lm_head"), {"up"}),
    ],
)
def test_which_layers_are_stored(skip, names):
    assert stored_names(faccel.Plan(layerwise_casting=LayerwiseCasting(skip=skip))) == names


def test_a_trainable_layer_keeps_its_dtype():
    net = image_net()
    net[4].requires_grad_(True)
    faccel.wrap(net, ONE, plan=FP8)
    assert net[4].weight.dtype == torch.float32
    assert net[6].weight.dtype == torch.float8_e4m3fn


def too_large():
    net = image_net()
    net[4].weight.data[0, 0] = 1000
    return net


REFUSED = {
    "trainable": (lambda: image_net(is_frozen=False), ConfigError, "requires_grad_"),
    "too large": (too_large, ModelError, "1000 in `4.weight`"),
    "stored already": (
        lambda: image_net().to(torch.float8_e4m3fn), ModelError, "the dtype to compute in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_an_error_and_changes_nothing(name):
    make, error, message = REFUSED[name]
    net = make()
    before = {key: param.dtype for key, param in net.named_parameters()}
    with pytest.raises(error, match=message):
        faccel.wrap(net, ONE, plan=FP8)
    assert {key: param.dtype for key, param in net.named_parameters()} == before


PIPELINE = {"pipeline": PipelineConfig(chain=("*",))}


@pytest.mark.parametrize(
    ("num_ranks", "mesh", "options"),
    [(2, "dp_shard=2", {}), (2, "tp=2", {"tensor": {"4": "colwise"}}), (2, "pp=2", PIPELINE)],
)
def test_sharded_parameters_are_refused(num_ranks, mesh, options):
    plan = faccel.Plan(layerwise_casting="bfloat16", **options)
    with pytest.raises(ConfigError, match="full copy of the parameters"):
        simulate(run_wrapped, num_ranks, plan, mesh=mesh)


def test_stored_weights_are_not_trained():
    net = image_net()
    model = faccel.wrap(net, ONE, plan=FP8)
    net.requires_grad_(True)
    with pytest.raises(OptimizerError, match="cannot train a parameter that is stored in fp8"):
        faccel.wrap_optimizer(torch.optim.SGD(net.parameters(), lr=1.0), model, ONE)
    with pytest.raises(ModelError, match="has a trainable parameter"):
        model(IMAGES)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), rounded(image_net(), torch.float8_e4m3fn)(IMAGES))


def test_a_second_call_inside_of_the_first_is_an_error():
    net = image_net()
    model = faccel.wrap(net, ONE, plan=FP8)
    net[4].register_forward_pre_hook(lambda layer, args: layer(*args))
    with pytest.raises(ModelError, match="overlap"):
        model(IMAGES)
    assert net[4].weight.dtype == torch.float8_e4m3fn


def test_checkpoints_and_exports_have_the_stored_weights(tmp_path):
    model = faccel.wrap(image_net(), ONE, plan=FP8)
    expected = model(IMAGES)
    faccel.save({"model": model}, tmp_path / "run", ONE, step=1)
    faccel.checkpoint.export_model(model, tmp_path / "export", ONE)
    other = faccel.wrap(nn.Sequential(*image_net()).apply(zero), ONE, plan=FP8)
    faccel.load({"model": other}, tmp_path / "run", ONE)
    assert torch.equal(other(IMAGES), expected)
    # A model in fp32 takes the exported weights, too.
    plain = image_net().apply(zero)
    faccel.checkpoint.load_model(plain, tmp_path / "export", ONE)
    assert torch.equal(plain(IMAGES), expected)


def zero(layer):
    for param in layer.parameters(recurse=False):
        param.data.zero_()


def grow(ctx):
    net = image_net()
    model = faccel.wrap(net, ctx, plan=FP8)
    before = model(IMAGES)
    net.append(nn.Linear(4, 4).requires_grad_(False))
    nn.init.eye_(net[7].weight)
    nn.init.zeros_(net[7].bias)
    model = faccel.rewrap(model, ctx)
    assert net[7].weight.dtype == torch.float8_e4m3fn
    assert [len(layer._forward_pre_hooks) for layer in net] == [1, 0, 1, 0, 1, 0, 1, 1]
    return before, model(IMAGES)


def check_grown(results):
    for before, after in results:
        assert torch.equal(before, after)


def test_rewrap_stores_new_layers():
    check_grown(simulate(grow, 1))
    check_grown(simulate(grow, 2))


@pytest.mark.slow
def test_rewrap_in_processes():
    check_grown(run_ranks(grow, 2))


@pytest.mark.parametrize("what", ["whole", "units"])
def test_compiled_layers_are_stored(what):
    options = Compile(what, backend="eager")
    plan = faccel.Plan(layerwise_casting="float8_e4m3fn", compile=options, units=("4",))
    model = faccel.wrap(image_net(), ONE, plan=plan)
    expected = rounded(image_net(), torch.float8_e4m3fn)(IMAGES)
    for _ in range(2):
        torch.testing.assert_close(model(IMAGES), expected)
    assert model.module[4].weight.dtype == torch.float8_e4m3fn


def test_a_configuration_has_it():
    assert to_plan("layerwise_casting=float8_e4m3fn") == FP8
    plan = to_plan("layerwise_casting.storage_dtype=bfloat16,layerwise_casting.skip=[a,b]")
    assert plan.layerwise_casting == LayerwiseCasting(storage_dtype="bfloat16", skip=("a", "b"))
    assert to_plan(plan_values(plan)) == plan
    with pytest.raises(ConfigError, match="layerwise_casting"):
        faccel.Plan(layerwise_casting="int8")
