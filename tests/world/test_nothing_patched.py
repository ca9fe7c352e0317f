"""faccel sets no attribute on the user's module, parameters or optimizer, and replaces none."""

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import OptimizerError
from faccel.testing import simulate
from faccel.tree import full_tensor

# PyTorch's attributes: what FSDP2 registers, and what an optimizer adds at its first step.
PYTORCH_MODULE = {
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_fsdp_use_orig_params", "_is_fsdp_managed_module",
    "_load_state_dict_post_hooks", "_load_state_dict_pre_hooks", "_modules", "_parameters",
    "_state_dict_pre_hooks",
}  # fmt: skip
PYTORCH_PREFIX = "__composable_api_state_key"  # FSDP2 stores its state there
PYTORCH_DTENSOR = {"_is_param", "_local_tensor", "_spec"}  # a sharded parameter is a new object
PYTORCH_OPTIMIZER = {"state", "param_groups"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.norm(x)


def snapshot(owner):
    """Return the identity of each attribute; of a dict, such as those of hooks, of each item."""
    identities = {}
    for name, value in vars(owner).items():
        identities[name] = id(value)
        if isinstance(value, dict):
            identities[name] = {key: id(item) for key, item in value.items()}
    return identities


def attributes(net):
    """Return the snapshots of each module and of each parameter, by name."""
    modules = {name: snapshot(module) for name, module in net.named_modules()}
    params = {name: snapshot(param) for name, param in net.named_parameters()}
    return modules, params


def changed(before, after):
    """Return the names of attributes that were added, removed or replaced."""
    names = before.keys() | after.keys()
    return {name for name in names if before.get(name) != after.get(name)}


def train_and_save(ctx, folder):
    net = Net()
    modules, params = attributes(net)
    wrapped = faccel.wrap(net, ctx)
    opt = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
    optimizer = snapshot(opt)
    assert faccel.wrap_optimizer(opt, wrapped, ctx) is opt
    scaler = faccel.init_scaler(ctx)
    x = torch.randn(6, 4, generator=faccel.random.generator(ctx.rank))
    for on in (False, True):
        with faccel.grad_sync(wrapped, on=on):
            scaler = faccel.scaled_backward(wrapped(x).square().sum(), scaler, ctx)
    faccel.optimizer_step(opt, scaler, ctx, clip_norm=1.0)
    faccel.save({"model": wrapped, "opt": opt}, folder, ctx, step=1)
    wrapped.eval()

    modules_after, params_after = attributes(net)
    for name, before in modules.items():
        names = changed(before, modules_after[name])
        if ctx.mesh.spec.dp_shard > 1:
            names = {n for n in names - PYTORCH_MODULE if not n.startswith(PYTORCH_PREFIX)}
        assert names <= {"training"}, name
    for name, before in params.items():
        assert changed(before, params_after[name]) <= PYTORCH_DTENSOR, name
    assert changed(optimizer, snapshot(opt)) - PYTORCH_OPTIMIZER <= {"_zero_grad_profile_name"}
    return type(net).__name__


@pytest.mark.parametrize(
    ("world_size", "mesh", "name"),
    [(1, None, "Net"), (2, "dp_replicate=2", "Net"), (2, "dp_shard=2", "FSDPNet")],
)
def test_no_attribute_is_set_on_the_users_objects(world_size, mesh, name, tmp_path):
    assert set(simulate(train_and_save, world_size, str(tmp_path), mesh=mesh)) == {name}


def test_a_step_without_a_reduced_gradient_is_an_error():
    def fn(ctx):
        wrapped = faccel.wrap(Net(), ctx)
        opt = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        with faccel.grad_sync(wrapped, on=False):
            loss = wrapped(torch.ones(2, 4)).square().sum()
            scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        with pytest.raises(OptimizerError, match="not reduced"):
            faccel.optimizer_step(opt, scaler, ctx)

    simulate(fn, 2, mesh="dp_shard=2")


@pytest.mark.parametrize("num_cleared", [1, 2])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_without_sync_are_cleared_after_any_micro_batch(num_cleared, set_to_none):
    """`num_cleared` micro-batches are accumulated and cleared, then two are reduced."""

    def fn(ctx):
        torch.manual_seed(0)
        wrapped = faccel.wrap(nn.Linear(4, 4).double(), ctx)
        opt = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        scaler = faccel.init_scaler(ctx)
        x = torch.ones(2, 4, dtype=torch.float64)
        for factor in range(1, num_cleared + 1):
            with faccel.grad_sync(wrapped, on=False):
                faccel.scaled_backward(wrapped(factor * x).square().sum(), scaler, ctx)
        for factor, on in ((5, False), (7, True)):
            with faccel.grad_sync(wrapped, on=on):
                loss = wrapped(factor * x).square().sum()
                if factor == 5:
                    opt.zero_grad(set_to_none=set_to_none)  # between forward and backward
                faccel.scaled_backward(loss, scaler, ctx)
        grads = {}
        for name, param in wrapped.named_parameters():
            grad = param.grad
            grads[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        return grads

    (expected,) = simulate(fn, 1)
    for grads in simulate(fn, 2, mesh="dp_shard=2"):
        for name, grad in grads.items():
            assert torch.allclose(grad, expected[name], rtol=0, atol=1e-12)


def unreduced(ctx, model, factor=1.0, *, on=False):
    with faccel.grad_sync(model, on=on):
        x = factor * torch.ones(2, 4, dtype=torch.float64)
        faccel.scaled_backward(model(x).square().sum(), faccel.init_scaler(ctx), ctx)


def test_a_reduced_gradient_and_an_unreduced_one_are_cleared_together():
    """Two backwards are dropped by `zero_grad`, the first of them reduced; a third one remains."""

    def fn(ctx, set_to_none):
        torch.manual_seed(0)
        model = faccel.wrap(nn.Linear(4, 4).double(), ctx)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        unreduced(ctx, model, 3.0, on=True)
        unreduced(ctx, model, 5.0)
        opt.zero_grad(set_to_none=set_to_none)
        unreduced(ctx, model, 7.0, on=True)
        return [param.grad.full_tensor() for param in model.parameters()]

    torch.manual_seed(0)
    net = nn.Linear(4, 4).double()
    net(7.0 * torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
    for set_to_none in (False, True):
        for grads in simulate(fn, 2, set_to_none, mesh="dp_shard=2"):
            for grad, param in zip(grads, net.parameters(), strict=True):
                assert torch.allclose(grad, param.grad, rtol=0, atol=1e-9)


def test_a_reduced_gradient_and_an_unreduced_one_are_added():
    def fn(ctx):
        torch.manual_seed(0)
        model = faccel.wrap(nn.Linear(4, 4).double(), ctx)
        for factor, on in ((3.0, True), (5.0, False), (7.0, True)):
            unreduced(ctx, model, factor, on=on)
        return [param.grad.full_tensor() for param in model.parameters()]

    torch.manual_seed(0)
    net = nn.Linear(4, 4).double()
    for factor in (3.0, 5.0, 7.0):
        net(factor * torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
    for grads in simulate(fn, 2, mesh="dp_shard=2"):
        for grad, param in zip(grads, net.parameters(), strict=True):
            assert torch.allclose(grad, param.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("has_reduced", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_direct_step_with_an_unreduced_gradient_is_an_error(has_reduced, foreach):
    def fn(ctx):
        model = faccel.wrap(nn.Linear(4, 4).double(), ctx)
        opt = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=foreach)
        if has_reduced:
            unreduced(ctx, model, on=True)
        unreduced(ctx, model)
        with pytest.raises(OptimizerError, match="not reduced yet"):
            opt.step()
        with pytest.raises(OptimizerError, match="not reduced yet"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert "UnreducedGrad" in repr(model.weight.grad)
        unreduced(ctx, model, on=True)
        opt.step()

    simulate(fn, 2, mesh="dp_shard=2")


def test_a_penalty_on_shards_is_accumulated_with_unreduced_gradients():
    def fn(ctx):
        torch.manual_seed(0)
        model = faccel.wrap(nn.Linear(4, 4).double(), ctx)
        x = torch.ones(2, 4, dtype=torch.float64)
        for on in (False, False, True):
            with faccel.grad_sync(model, on=on):
                weights = sum(full_tensor(p).square().sum() for p in model.parameters())
                loss = model(x).square().sum() + weights
                faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        return [full_tensor(param.grad) for param in model.parameters()]

    (expected,) = simulate(fn, 1)
    for grads in simulate(fn, 2, mesh="dp_shard=2"):
        for grad, expected_grad in zip(grads, expected, strict=True):
            assert torch.allclose(grad, expected_grad, rtol=0, atol=1e-9)
