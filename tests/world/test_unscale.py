"""Gradients between backward and step: unscaled, measured and clipped as PyTorch does."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import ConfigError, OptimizerError, ScalerError
from faccel.testing import fake_context, simulate
from tests.models import loss_of, model, tokens
from tests.training import TIED, full, loss_fn, plan_of

SCALE, ROWS, NORM_TYPES = 1024.0, 16, (1.0, 2.0, 3.0, math.inf)
MESHES = {
    "dp_replicate=1": 1, "dp_replicate=2": 2, "dp_shard=2": 2, "dp_replicate=2,dp_shard=2": 4,
    "dp_shard=2,tp=2": 4, "pp=2": 2, "pp=2,dp_shard=2": 4,
}  # fmt: skip
ZERO_1 = faccel.Plan(ddp=faccel.parallel.DdpConfig(shard_optimizer=True))
PLANS = {mesh: plan_of(mesh) for mesh in MESHES} | {"zero-1": ZERO_1}
pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's advice on layouts


def in_block(named_params):
    return [param for name, param in named_params if name.startswith("blocks.0")]


def in_torch(poison=None):
    """One update of plain torch: GradScaler, then its clipping of a part and of all."""
    net = model(torch.float64)
    opt = torch.optim.SGD(net.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    batch = tokens(ROWS)
    scaler.scale(loss_of(net(batch[:, :-1]), batch[:, 1:])).backward()
    if poison is not None:
        net.blocks[0].up.weight.grad[0, 0] = poison
    scaler.unscale_(opt)
    norms = [
        torch.nn.utils.get_total_norm([param.grad for param in net.parameters()], norm_type)
        for norm_type in NORM_TYPES
    ]
    part = in_block(net.named_parameters())
    norms.append(torch.nn.utils.clip_grad_norm_(part, 0.001, math.inf))
    scaler.step(opt)
    scaler.update()
    params = {name: param.detach() for name, param in net.named_parameters()}
    return [norm.item() for norm in norms], params, scaler.get_scale()


def backward(ctx, plan):
    wrapped = faccel.wrap(model(torch.float64), ctx, plan=plan)
    opt = torch.optim.SGD(wrapped.parameters(), lr=1.0)
    opt = faccel.wrap_optimizer(opt, wrapped, ctx)
    loader = faccel.shard(DataLoader(tokens(ROWS), ROWS // 2 // ctx.data_world_size), ctx)
    window = next(faccel.windows(loader, ctx, size=2))
    scaler = faccel.ScalerState(enabled=True, scale=SCALE)
    _, scaler = faccel.forward_backward(
        lambda net, batch: loss_fn(net, batch.data, ctx), wrapped, window, scaler, ctx
    )
    return wrapped, opt, scaler


def poison_gradient(ctx, wrapped, value):
    """Write `value` on one rank; on all of DDP's, which have the same gradients."""
    is_last = ctx.rank == ctx.world_size - 1
    for name, param in wrapped.named_parameters():
        if name == "blocks.0.up.weight" and (is_last or ctx.is_replicated or ctx.mesh.spec.pp > 1):
            faccel.tree.local_tensor(param.grad)[0, 0] = value


def in_faccel(ctx, plan, poison=None):
    wrapped, opt, scaler = backward(ctx, plan)
    if poison is not None:
        poison_gradient(ctx, wrapped, poison)
    scaler = faccel.unscale(opt, scaler, ctx)
    part = in_block(wrapped.named_parameters())
    norms = [
        faccel.grad_norm(wrapped.parameters(), ctx, norm_type=norm_type) for norm_type in NORM_TYPES
    ]
    limit = torch.tensor(0.001, dtype=torch.float64)
    info, scaler = faccel.optimizer_step(
        opt, scaler, ctx, clip_norm=limit, norm_type=math.inf, clip_params=part
    )
    norms.append(info.grad_norm)
    params = {name: full(param) for name, param in wrapped.named_parameters()}
    norms = [norm.item() for norm in norms]
    return norms, params, (info.scale, scaler.scale, info.skipped)


def distance(tensors, expected):
    return max(
        (value - expected[name if name in expected else TIED[name]]).abs().max().item()
        for name, value in tensors.items()
    )


@pytest.mark.parametrize("mesh", [*MESHES, "zero-1"])
def test_unscaled_measured_and_clipped_gradients_are_those_of_torch(mesh):
    norms, params, _ = in_torch()
    on = {"mesh": mesh} if mesh in MESHES else {}
    # SGD with a rate of 1: parameters move by the gradients, of which a block is clipped.
    for rank_norms, rank_params, scales in simulate(
        in_faccel, MESHES.get(mesh, 2), PLANS[mesh], **on
    ):
        assert rank_norms == pytest.approx(norms, rel=1e-9)
        assert distance(rank_params, params) < 1e-8
        assert scales == (SCALE, SCALE, False)


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2", "pp=2"])
def test_an_overflow_that_unscale_finds_on_one_rank_is_skipped_by_all(mesh):
    poison = math.nan if mesh == "pp=2" else math.inf
    _, params, scale = in_torch(poison)
    for _, rank_params, (_, next_scale, skipped) in simulate(
        in_faccel, MESHES[mesh], PLANS[mesh], poison, mesh=mesh
    ):
        assert (next_scale, skipped) == (scale, True)
        assert distance(rank_params, params) == 0


def fp16():
    ctx = fake_context(0, 1, config={"mixed_precision": "fp16"})
    torch.manual_seed(0)
    net = nn.Linear(4, 4)
    wrapped = faccel.wrap(net, ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(wrapped.parameters(), lr=1.0), wrapped, ctx)
    return ctx, net, wrapped, opt


def test_gradients_are_divided_once_and_can_be_clipped_by_hand():
    ctx, net, wrapped, opt = fp16()
    before = net.weight.detach().clone()
    loss = wrapped(torch.ones(2, 4)).mean()
    scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    scaler = faccel.unscale(opt, scaler, ctx)
    nn.utils.clip_grad_norm_(net.parameters(), 0.1, norm_type=math.inf)
    _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    assert (net.weight - before).abs().max().item() == pytest.approx(0.1, rel=1e-4)
    # The next update is scaled and unscaled as usual.
    before = net.bias.detach().clone()
    scaler = faccel.scaled_backward(wrapped(torch.ones(2, 4)).mean(), scaler, ctx)
    faccel.optimizer_step(opt, scaler, ctx)
    assert (before - net.bias).tolist() == pytest.approx([0.25] * 4, rel=1e-3)


def test_misuses_of_unscale_raise_with_a_fix():
    ctx, _, wrapped, opt = fp16()
    scaler = faccel.init_scaler(ctx)
    with pytest.raises(OptimizerError, match="no parameter with a gradient"):
        faccel.unscale(opt, scaler, ctx)
    before = faccel.scaled_backward(wrapped(torch.ones(2, 4)).mean(), scaler, ctx)
    with pytest.raises(ScalerError, match="was not returned by"):
        faccel.unscale(opt, scaler, ctx)
    unscaled = faccel.unscale(opt, before, ctx)
    with pytest.raises(ScalerError, match="unscaled already"):
        faccel.unscale(opt, unscaled, ctx)
    with pytest.raises(ScalerError, match="add scaled gradients to unscaled"):
        faccel.scaled_backward(wrapped(torch.ones(2, 4)).mean(), unscaled, ctx)
    with pytest.raises(OptimizerError, match="`clip_params`"):
        faccel.optimizer_step(
            opt, unscaled, ctx, clip_norm=1.0, clip_params=[nn.Parameter(torch.ones(1))]
        )
    for limit in (torch.ones(2), 0.0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="`clip_norm`"):
            faccel.optimizer_step(opt, unscaled, ctx, clip_norm=limit)
    with pytest.raises(ConfigError, match="`norm_type`"):
        faccel.grad_norm(wrapped.parameters(), ctx, norm_type=0)
    # All of these left the gradients and the scaler as they were.
    info, _ = faccel.optimizer_step(opt, unscaled, ctx)
    assert not info.skipped


def test_one_optimizer_may_be_unscaled_while_another_is_not():
    ctx, _, wrapped, opt = fp16()
    other_model = faccel.wrap(nn.Linear(4, 4), ctx)
    other = torch.optim.SGD(other_model.parameters(), lr=1.0)
    other = faccel.wrap_optimizer(other, other_model, ctx)
    x = torch.ones(2, 4)
    loss = wrapped(x).mean() + other_model(x).mean()
    scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    scaler = faccel.unscale(opt, scaler, ctx)
    norms = []
    for stepped in (other, opt):
        info, scaler = faccel.optimizer_step(stepped, scaler, ctx, clip_norm=math.inf)
        norms.append(info.grad_norm.item())
    # d mean(W x + b) / d W is x_j / 4, and d / d b is 1/4: 20 elements of 1/4.
    assert norms == pytest.approx([math.sqrt(20) / 4] * 2, rel=1e-3)


def test_a_direct_step_in_fp16_raises_and_changes_nothing():
    ctx, net, wrapped, opt = fp16()
    before = net.weight.detach().clone()
    scaler = faccel.scaled_backward(wrapped(torch.ones(2, 4)).mean(), faccel.init_scaler(ctx), ctx)
    with pytest.raises(ScalerError, match="optimizer_step"):
        opt.step()
    assert torch.equal(net.weight, before)
    faccel.optimizer_step(opt, scaler, ctx)
    with pytest.raises(ScalerError, match="optimizer_step"):
        opt.step()


@pytest.mark.parametrize("limit", [0.1, 100.0, math.inf])
def test_a_tensor_as_a_limit_clips_as_the_number_does(limit):
    def clipped(clip_norm, clip_value):
        ctx = fake_context(0, 1)
        torch.manual_seed(0)
        net = nn.Linear(4, 4)
        opt = torch.optim.SGD(net.parameters(), lr=1.0)
        scaler = faccel.scaled_backward(net(torch.ones(2, 4)).sum(), faccel.init_scaler(ctx), ctx)
        faccel.optimizer_step(opt, scaler, ctx, clip_norm=clip_norm, clip_value=clip_value)
        return net.weight.detach()

    expected = clipped(limit, limit)
    assert torch.allclose(
        clipped(torch.tensor(limit), torch.tensor(limit)), expected, rtol=1e-6, atol=1e-7
    )


def test_gradients_that_are_not_reduced_yet_are_not_measured():
    def measure(ctx):
        wrapped = faccel.wrap(nn.Linear(4, 4), ctx)
        with faccel.grad_sync(wrapped, on=False):
            loss = wrapped(torch.ones(2, 4)).mean()
            faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        with pytest.raises(OptimizerError, match="not reduced yet"):
            faccel.grad_norm(wrapped.parameters(), ctx)

    simulate(measure, 2, mesh="dp_shard=2")


@pytest.mark.parametrize("mesh", ["dp_shard=2", "dp_replicate=2,dp_shard=2"])
def test_an_update_without_a_backward_that_reduces_names_the_cause(mesh):
    def update(ctx):
        wrapped = faccel.wrap(nn.Linear(4, 4), ctx)
        opt = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        opt = faccel.wrap_optimizer(opt, wrapped, ctx)
        scaler = faccel.init_scaler(ctx)
        for _ in range(2):
            with faccel.grad_sync(wrapped, on=False):
                scaler = faccel.scaled_backward(wrapped(torch.ones(2, 4)).mean(), scaler, ctx)
        with pytest.raises(OptimizerError, match="not reduced over the data ranks") as caught:
            faccel.optimizer_step(opt, scaler, ctx)
        assert "grad_sync(model, on=False)" in caught.value.got
        # the fix: the last micro-batch reduces
        scaler = faccel.scaled_backward(wrapped(torch.ones(2, 4)).mean(), scaler, ctx)
        info, _ = faccel.optimizer_step(opt, scaler, ctx)
        return not info.skipped

    assert all(simulate(update, faccel.MeshSpec.of(mesh).size, mesh=mesh))


@pytest.mark.parametrize("mesh", ["dp_replicate=1", "dp_replicate=2", "dp_shard=2", "pp=2"])
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_one_optimizer_of_two_models_is_connected_to_both(precision, mesh):
    """The update and the norm are those of two equal models in one optimizer of plain PyTorch."""

    def fn(ctx):
        wrapped = [faccel.wrap(model(), ctx, plan=PLANS[mesh]) for _ in range(2)]
        params = [param for one in wrapped for param in one.parameters()]
        opt = torch.optim.SGD(params, lr=1.0)
        for one in wrapped:
            opt = faccel.wrap_optimizer(opt, one, ctx)
        scaler = faccel.init_scaler(ctx)
        loss_of_rows = lambda f, x: loss_of(f(x.data[:, :-1]), x.data[:, 1:])  # noqa: E731
        for one in wrapped:
            loader = faccel.shard(DataLoader(tokens(ROWS), 4 // ctx.data_world_size), ctx)
            window = next(faccel.windows(loader, ctx, size=4))
            _, scaler = faccel.forward_backward(loss_of_rows, one, window, scaler, ctx)
        info, _ = faccel.optimizer_step(opt, scaler, ctx, clip_norm=math.inf)
        return info.grad_norm.item()

    net = model()
    batch = tokens(ROWS)
    loss_of(net(batch[:, :-1]), batch[:, 1:]).backward()
    expected = math.sqrt(2) * torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
    for norm in simulate(fn, MESHES[mesh], mesh=mesh, config={"mixed_precision": precision}):
        assert norm == pytest.approx(expected.item(), rel=1e-2)
