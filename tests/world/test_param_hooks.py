"""What users attach to parameters works on every mesh, or raises in `wrap`."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import faccel
from faccel.errors import ModelError
from faccel.testing import simulate
from faccel.tree import full_tensor
from tests.laws.test_backends import PLAN
from tests.laws.test_backends import Net as LayerNet

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's advice on layouts
MASK = torch.tensor([0.0, 0, 0, 0, 1, 1])[:, None]
MESHES = {
    "ddp": (2, "dp_replicate=2", None),
    "fsdp": (2, "dp_shard=2", None),
    "units": (2, "dp_shard=2", faccel.Plan(units="Embedding")),
    "no-reshard": (
        2,
        "dp_shard=2",
        faccel.Plan(
            units="Embedding", fsdp=faccel.parallel.FsdpConfig(reshard_after_forward=False)
        ),
    ),
    "hsdp": (4, "dp_replicate=2,dp_shard=2", None),
    "cp": (2, "cp=2", None),
}


class Net(nn.Module):
    """An embedding of six tokens, and a head that reads an attribute of its weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4)
        self.head = nn.Linear(12, 1)
        self.head.weight.factor = 3.0

    def forward(self, tokens):
        return self.head(self.embed(tokens).flatten(1)) * self.head.weight.factor


def tensor_hook(param):
    return param.register_hook(lambda grad: grad * MASK)


def accumulate_hook(param):
    def mask(param):
        param.grad.mul_(MASK)

    return param.register_post_accumulate_grad_hook(mask)


def tokens(ctx, update):
    data = torch.tensor([[0, 4, 2], [1, 5, 3], [0, 1, 2], [3, 4, 5]]).roll(update, 0)
    if ctx.mesh.spec.cp > 1:
        return data
    return data.chunk(ctx.data_world_size)[ctx.data_rank]


def train(ctx, model, num_updates=2):
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler = faccel.init_scaler(ctx)
    for update in range(num_updates):
        for number in range(2):
            with faccel.grad_sync(model, on=number == 1):
                loss = model(tokens(ctx, 2 * update + number)).square().mean()
                scaler = faccel.scaled_backward(loss, scaler, ctx, scale=0.5)
        faccel.optimizer_step(opt, scaler, ctx)
    return {name: full_tensor(param).clone() for name, param in model.named_parameters()}


def hook_before_wrap(ctx, hook, plan):
    net = Net()
    handle = hook(net.embed.weight)
    model = faccel.wrap(net, ctx, plan=plan)
    first = train(ctx, model)
    handle.remove()
    return first, train(ctx, model, 1)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("hook", [tensor_hook, accumulate_hook])
def test_a_hook_that_was_registered_before_wrap_runs_until_it_is_removed(hook, mesh):
    (expected,) = simulate(hook_before_wrap, 1, hook, None)
    world_size, spec, plan = MESHES[mesh]
    for params in simulate(hook_before_wrap, world_size, hook, plan, mesh=spec):
        assert torch.equal(params[0]["embed.weight"][:4], Net().embed.weight[:4])
        assert not torch.equal(params[1]["embed.weight"][:4], Net().embed.weight[:4])
        for values, expected_values in zip(params, expected, strict=True):
            for name, value in values.items():
                assert torch.allclose(value, expected_values[name], atol=1e-5), name


@pytest.mark.parametrize("mesh", ["dp_shard=2", "dp_replicate=2,dp_shard=2", "pp=2,dp_shard=2"])
@pytest.mark.parametrize("is_meta", [False, True])
def test_a_hook_or_an_attribute_may_be_on_one_rank_only(mesh, is_meta):
    if is_meta and "pp" in mesh:
        pytest.skip("a pipeline is not built from a model on meta")
    num_calls = []

    def fn(ctx):
        with torch.device("meta" if is_meta and not ctx.is_main else "cpu"):
            net = LayerNet()
        if ctx.is_main:
            net.first.weight.register_hook(num_calls.append)
            net.last.bias.note = "of rank 0"
        model = faccel.wrap(net, ctx, plan=PLAN)
        loader = torch.utils.data.DataLoader(torch.ones(8, 4), 2)
        window = next(faccel.windows(faccel.shard(loader, ctx), ctx, size=2))
        loss_fn = lambda f, batch: f(batch.data).square().mean()  # noqa: E731
        faccel.forward_backward(loss_fn, model, window, faccel.init_scaler(ctx), ctx)

    simulate(fn, faccel.MeshSpec.of(mesh).size, mesh=mesh)
    assert num_calls


def hook_after_wrap(ctx, num_updates_before):
    model = faccel.wrap(Net(), ctx)
    before = train(ctx, model, num_updates_before)
    handle = tensor_hook(model.embed.weight)
    hooked = train(ctx, model, 2)
    handle.remove()
    return before, hooked, train(ctx, model, 1)


@pytest.mark.parametrize("num_updates_before", [0, 1])
@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
def test_a_hook_of_a_shard_runs_on_the_gradient_of_the_parameter(mesh, num_updates_before):
    (expected,) = simulate(hook_after_wrap, 1, num_updates_before)
    for params in simulate(hook_after_wrap, 2, num_updates_before, mesh=mesh):
        before, hooked, after = (values["embed.weight"] for values in params)
        assert torch.equal(before[:4], hooked[:4])
        assert not torch.equal(after[:4], hooked[:4])
        assert torch.allclose(after, expected[2]["embed.weight"], atol=1e-5)


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
def test_a_parameter_with_a_hook_may_be_frozen_for_some_updates(mesh):
    def fn(ctx):
        model = faccel.wrap(Net(), ctx)
        handle = tensor_hook(model.embed.weight)
        model.embed.weight.requires_grad_(False)
        model = faccel.rewrap(model, ctx)
        frozen = train(ctx, model, 1)["embed.weight"]
        model.embed.weight.requires_grad_(True)
        model = faccel.rewrap(model, ctx)
        hooked = train(ctx, model, 1)["embed.weight"]
        handle.remove()
        return frozen, hooked

    start = Net().embed.weight
    for frozen, hooked in simulate(fn, 2, mesh=mesh):
        assert torch.equal(frozen, start)
        assert torch.equal(hooked[:4], start[:4])
        assert not torch.equal(hooked[4:], start[4:])


def test_a_hook_of_a_shard_runs_in_a_pipeline():
    def fn(ctx):
        model = faccel.wrap(LayerNet(), ctx, plan=PLAN)
        params = dict(model.named_parameters())
        for param in params.values():
            param.register_hook(lambda grad: grad * 0)
        before = {name: full_tensor(param).clone() for name, param in params.items()}
        loader = torch.utils.data.DataLoader(torch.ones(4, 4), 2)
        window = next(faccel.windows(faccel.shard(loader, ctx), ctx, size=2))
        loss_fn = lambda f, batch: f(batch.data).square().mean()  # noqa: E731
        opt = torch.optim.SGD(params.values(), lr=1.0)
        opt = faccel.wrap_optimizer(opt, model, ctx)
        scaler = faccel.init_scaler(ctx)
        _, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx)
        faccel.optimizer_step(opt, scaler, ctx)
        return all(torch.equal(full_tensor(params[name]), value) for name, value in before.items())

    assert simulate(fn, 2, mesh="pp=2") == (True, True)


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
@pytest.mark.parametrize("is_meta", [False, True])
def test_attributes_are_on_the_parameters_of_the_optimizer_and_of_forward(mesh, is_meta):
    def fn(ctx):
        with torch.device("meta" if is_meta else "cpu"):
            net = Net()
        model = faccel.wrap(net, ctx)
        marked = [name for name, p in model.named_parameters() if hasattr(p, "factor")]
        return marked, model(tokens(ctx, 0)).shape

    for marked, shape in simulate(fn, 2, mesh=mesh):
        assert (marked, shape) == (["head.weight"], (2, 1))


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).transpose(-1, -2)


PARAMETRIZATIONS = {
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize("units", [(), ("ParametrizedLinear",)])
def test_parametrizations_train_as_on_one_process(kind, units):
    def fn(ctx):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        PARAMETRIZATIONS[kind](net[0])
        model = faccel.wrap(net, ctx, plan=faccel.Plan(units=units))
        opt = torch.optim.SGD(model.parameters(), lr=0.5)
        opt = faccel.wrap_optimizer(opt, model, ctx)
        scaler = faccel.init_scaler(ctx)
        x = torch.arange(16.0).reshape(4, 4).sin().chunk(ctx.data_world_size)[ctx.data_rank]
        for _ in range(3):
            scaler = faccel.scaled_backward(model(x).square().mean(), scaler, ctx)
            faccel.optimizer_step(opt, scaler, ctx)
        return {name: full_tensor(value) for name, value in model.state_dict().items()}

    (expected,) = simulate(fn, 1)
    for state in simulate(fn, 2, mesh="dp_shard=2"):
        for name, value in state.items():
            assert torch.allclose(value, expected[name], atol=1e-5), name


class Scaled(nn.Parameter):
    pass


def test_a_subclass_of_parameter_is_an_error_and_may_stay_replicated():
    def fn(ctx, ignored):
        net = nn.Linear(4, 4)
        net.weight = Scaled(torch.ones(4, 4))
        plan = faccel.Plan(fsdp=faccel.parallel.FsdpConfig(ignored=ignored))
        return type(faccel.wrap(net, ctx, plan=plan).weight)

    with pytest.raises(ModelError, match="without its class"):
        simulate(fn, 2, (), mesh="dp_shard=2")
    assert simulate(fn, 2, ("weight",), mesh="dp_shard=2") == (Scaled, Scaled)


def test_a_hook_of_a_tensor_parallel_parameter_is_an_error_before_wrap_and_runs_after_it():
    plan = faccel.Plan(tensor={"0": "colwise", "1": "rowwise"})

    def fn(ctx, is_before):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        if is_before:
            net[0].weight.register_hook(lambda grad: grad * 0)
        model = faccel.wrap(net, ctx, plan=plan)
        model.module[0].weight.register_hook(lambda grad: grad * 0)
        faccel.scaled_backward(model(torch.ones(2, 4)).sum(), faccel.init_scaler(ctx), ctx)
        return full_tensor(net[0].weight.grad)

    with pytest.raises(ModelError, match="part of the gradient"):
        simulate(fn, 2, True, mesh="tp=2")
    for grad in simulate(fn, 2, False, mesh="tp=2"):
        assert not grad.any()
