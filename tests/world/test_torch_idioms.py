"""What users of PyTorch do with a model works on shards, or raises an error with a fix."""

import copy

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ModelError, OptimizerError
from faccel.testing import simulate
from faccel.tree import full_tensor
from tests.laws.test_backends import PLAN
from tests.laws.test_backends import Net as LayerNet

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's advice on layouts
UNITS = faccel.Plan(units=("blocks.*",))
NO_RESHARD = faccel.Plan(fsdp=faccel.parallel.FsdpConfig(reshard_after_forward=False))
SHARDED = {
    "fsdp": (2, "dp_shard=2", None),
    "units": (2, "dp_shard=2", UNITS),
    "no-reshard": (2, "dp_shard=2", NO_RESHARD),
    "hsdp": (4, "dp_replicate=2,dp_shard=2", None),
}
WORLDS = {"ddp": (2, "dp_replicate=2", None), **SHARDED}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x).tanh()
        return self.last(x)


def rows(ctx, seed=0):
    data = torch.randn(8, 4, generator=faccel.random.generator(seed))
    return data.chunk(ctx.data_world_size)[ctx.data_rank]


def values(model):
    return {name: full_tensor(value).clone() for name, value in model.state_dict().items()}


def check_equal_to_one_process(fn, world, *args):
    world_size, mesh, plan = WORLDS[world]
    (expected,) = simulate(fn, 1, plan, *args)
    for params in simulate(fn, world_size, plan, *args, mesh=mesh):
        assert params.keys() == expected.keys()
        for name, value in params.items():
            assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-6), name


class LinearNet(Net):
    """The second derivative of its output is zero: a gradient penalty depends on weights only."""

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


# Values of a model.


@pytest.mark.parametrize("world", [*WORLDS, "tp", "fsdp-tp"])
def test_a_full_state_dict_loads_into_a_wrapped_model(world):
    worlds = {**WORLDS, "tp": (2, "tp=2", PLAN), "fsdp-tp": (4, "dp_shard=2,tp=2", PLAN)}
    world_size, mesh, plan = worlds[world]
    make = LayerNet if world.endswith("tp") else Net
    expected = make().state_dict()

    def fn(ctx):
        net = make()
        nn.init.zeros_(net.last.weight)
        model = faccel.wrap(net, ctx, plan=plan)
        params = dict(model.named_parameters())
        model.load_state_dict(expected)
        assert all(param is params[name] for name, param in model.named_parameters())
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict({"last.bias": expected["last.bias"]})
        model.load_state_dict({"last.bias": expected["last.bias"]}, strict=False)
        return values(model)

    for state in simulate(fn, world_size, mesh=mesh):
        assert all(torch.equal(state[name], value) for name, value in expected.items())


@pytest.mark.parametrize("world", WORLDS)
def test_a_wrapped_model_is_not_copied_and_its_values_are(world):
    world_size, mesh, plan = WORLDS[world]

    def fn(ctx):
        model = faccel.wrap(Net(), ctx, plan=plan)
        with pytest.raises(ModelError, match="copy the module before"):
            copy.deepcopy({"model": model})
        best = {name: x.clone() for name, x in model.state_dict().items()}
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        model.load_state_dict(best)
        return values(model)

    for state in simulate(fn, world_size, mesh=mesh):
        assert all(torch.equal(state[name], value) for name, value in Net().state_dict().items())


# Losses.


def weight_penalty(ctx, plan):
    model = faccel.wrap(Net(), ctx, plan=plan)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    scaler = faccel.init_scaler(ctx)
    for update in range(2):
        loss = model(rows(ctx, update)).square().mean()
        penalty = sum(full_tensor(param).square().sum() for param in model.parameters())
        scaler = faccel.scaled_backward(loss + 0.1 * penalty, scaler, ctx)
        faccel.optimizer_step(opt, scaler, ctx)
    return values(model)


@pytest.mark.parametrize("world", WORLDS)
def test_a_penalty_on_parameters_equals_one_process(world):
    check_equal_to_one_process(weight_penalty, world)


def gradient_penalty(ctx, plan, make, num_micro_batches, has_other_losses):
    """WGAN-GP. The first micro-batch of each update is dropped by `zero_grad`."""
    model = faccel.wrap(make(), ctx, plan=plan)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.5), model, ctx)
    scaler = faccel.init_scaler(ctx)
    for update in range(3):
        for number in range(num_micro_batches):
            with faccel.grad_sync(model, on=number == num_micro_batches - 1):
                x = rows(ctx, 10 * update + number).requires_grad_()
                (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
                loss = (grad.norm(dim=1) - 1).square().mean()
                if has_other_losses:
                    real, generated = model(rows(ctx, update)), model(rows(ctx, update + 100))
                    loss = 0.1 * loss + generated.mean() - real.tanh().mean()
                scaler = faccel.scaled_backward(loss, scaler, ctx)
                if number == 0 and num_micro_batches > 1:
                    opt.zero_grad()
        faccel.optimizer_step(opt, scaler, ctx)
    # An ordinary update afterwards.
    scaler = faccel.scaled_backward(model(rows(ctx)).square().mean(), scaler, ctx)
    faccel.optimizer_step(opt, scaler, ctx)
    return values(model)


@pytest.mark.parametrize("world", SHARDED)
@pytest.mark.parametrize("make", [Net, LinearNet])
@pytest.mark.parametrize("has_other_losses", [False, True])
def test_a_gradient_penalty_equals_one_process(world, make, has_other_losses):
    check_equal_to_one_process(gradient_penalty, world, make, 1, has_other_losses)


@pytest.mark.parametrize("world", ["fsdp", "units"])
@pytest.mark.parametrize("make", [Net, LinearNet])
def test_a_gradient_penalty_is_accumulated(world, make):
    check_equal_to_one_process(gradient_penalty, world, make, 3, False)


def test_parameters_are_the_same_objects_around_a_gradient_penalty():
    def fn(ctx):
        model = faccel.wrap(Net(), ctx, plan=UNITS)
        params = list(model.parameters())
        x = rows(ctx).requires_grad_()
        for is_used in (False, True, True):
            (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
            if is_used:
                faccel.scaled_backward(grad.square().sum(), faccel.init_scaler(ctx), ctx)
            assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
        groups = model.engine.registration.slots
        assert all(group.is_sharded for group in groups)  # nothing stays gathered in memory

    simulate(fn, 2, mesh="dp_shard=2")


# Optimizers.


@pytest.mark.parametrize("world", [*SHARDED, "tp"])
@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Muon])
def test_an_optimizer_of_full_parameters_is_an_error_on_shards(optimizer, world):
    world_size, mesh, plan = {**SHARDED, "tp": (2, "tp=2", PLAN)}[world]
    make = LayerNet if world == "tp" else Net

    def fn(ctx):
        model = faccel.wrap(make(), ctx, plan=plan)
        opt = optimizer([param for param in model.parameters() if param.ndim == 2], lr=0.1)
        with pytest.raises(OptimizerError, match="dp_replicate=-1"):
            faccel.wrap_optimizer(opt, model, ctx)

    simulate(fn, world_size, mesh=mesh)


class NoisySgd(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.grad.add_(torch.ones(param.shape))
        super().step(closure)


def test_a_step_that_dtensor_does_not_support_is_an_error_with_a_fix():
    def fn(ctx):
        model = faccel.wrap(nn.Linear(4, 2), ctx)
        opt = faccel.wrap_optimizer(NoisySgd(model.parameters(), lr=0.1), model, ctx)
        scaler = faccel.init_scaler(ctx)
        scaler = faccel.scaled_backward(model(rows(ctx)).sum(), scaler, ctx)
        with pytest.raises(OptimizerError, match="sharded parameters"):
            faccel.optimizer_step(opt, scaler, ctx)

    simulate(fn, 2, mesh="dp_shard=2")


def train_matrices(ctx, plan, optimizer):
    # In double precision: LBFGS amplifies rounding.
    model = faccel.wrap(Net().double(), ctx, plan=plan)
    matrices = [param for param in model.parameters() if param.ndim == 2]
    opt = faccel.wrap_optimizer(optimizer(matrices, lr=0.1), model, ctx)
    scaler = faccel.init_scaler(ctx)

    def closure():
        opt.zero_grad()
        loss = model(rows(ctx).double()).square().mean()
        faccel.scaled_backward(loss, scaler, ctx)
        return faccel.reduce(loss.detach(), ctx, op="mean")

    for _ in range(2):
        opt.step(closure)
    return values(model)


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.Muon])
def test_the_fix_for_an_optimizer_of_full_parameters_works(optimizer):
    check_equal_to_one_process(train_matrices, "ddp", optimizer)


# Modules.


@pytest.mark.parametrize(("world_size", "mesh"), [(1, None), (2, None), (2, "dp_shard=2")])
def test_a_lazy_module_is_an_error_until_it_has_seen_a_batch(world_size, mesh):
    def fn(ctx):
        torch.manual_seed(0)
        net = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 1))
        with pytest.raises(ModelError, match=r"`0.weight` of `model` has no shape"):
            faccel.wrap(net, ctx)
        with torch.no_grad():
            net(torch.ones(2, 4))
        return faccel.wrap(net, ctx)(torch.ones(2, 4)).shape

    assert set(simulate(fn, world_size, mesh=mesh)) == {(2, 1)}


class TwoMethods(Net):
    """Each loss leaves parameters without a gradient."""

    def forward(self, x):
        return self.first(x)

    def other(self, x):
        return self.blocks[0](x)


@pytest.mark.parametrize("world", WORLDS)
def test_two_methods_in_one_loss_leave_other_parameters_unused(world):
    world_size, mesh, plan = WORLDS[world]
    unused = faccel.parallel.DdpConfig(find_unused_parameters=True)

    def fn(ctx):
        model = faccel.wrap(TwoMethods(), ctx, plan=plan or faccel.Plan(ddp=unused))
        x = rows(ctx)
        for _ in range(2):
            loss = model(x).square().mean() + model.call("other", x).square().mean()
            faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        params = model.named_parameters()
        return {name: full_tensor(p.grad) for name, p in params if p.grad is not None}

    (expected,) = simulate(fn, 1)
    assert expected.keys() == {"first.weight", "first.bias", "blocks.0.weight", "blocks.0.bias"}
    for grads in simulate(fn, world_size, mesh=mesh):
        assert grads.keys() == expected.keys()
        for name, grad in grads.items():
            assert torch.allclose(grad, expected[name], atol=1e-5), name
