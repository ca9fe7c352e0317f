"""Replicas never drift apart: what may change a model, its calls or its backwards, on two ranks.

Expected values are those of plain torch on one process with the batches of all ranks.
"""

import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ConfigError, FaccelError, ModelError, OptimizerError
from faccel.testing import simulate

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's advice on layouts
ROWS, UPDATES, RATE = 8, 4, 0.1
TENSOR = {"encoder": "colwise", "decoder": "rowwise"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def encode(self, x):
        return self.encoder(x)


def batch(step, rank=0, world_size=1, dtype=torch.float64):
    rows = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(step), dtype=dtype)
    return rows.chunk(world_size)[rank]


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


# Changes of a model before an update; `rewrap` is the identity on plain torch.


def unfreeze(net, model, opt, step, rewrap):
    if step == 1:
        net.encoder.requires_grad_(True)
        model = rewrap(model)
    return model


def add_layer(net, model, opt, step, rewrap):
    if step == 1:
        torch.manual_seed(9)
        net.decoder = nn.Sequential(net.decoder, nn.Linear(4, 4).double())
        model = rewrap(model)
        opt.add_param_group({"params": list(net.decoder[1].parameters())})
    return model


def replace_layer(net, model, opt, step, rewrap):
    if step == 1:
        torch.manual_seed(9)
        opt.param_groups.clear()
        net.decoder = nn.Linear(6, 4).double()  # as `resize_token_embeddings` does
        model = rewrap(model)
        opt.add_param_group({"params": list(net.parameters())})
    return model


def reinitialize(net, model, opt, step, rewrap):
    if step == 0:
        torch.manual_seed(9)
        net.decoder.reset_parameters()
    return model


def cast(net, model, opt, step, rewrap):
    if step == 1:
        net.to(torch.float32)
        model = rewrap(model)
    return model


def freeze(net, model, opt, step, rewrap):
    if step == 1:
        net.encoder.requires_grad_(False)
        model = rewrap(model)
    return model


CHANGES = [unfreeze, add_layer, replace_layer, reinitialize, cast, freeze]


def start(change):
    torch.manual_seed(0)
    net = Net().double()
    if change is unfreeze:
        net.encoder.requires_grad_(False)
    return net


def plain_torch(change):
    net = start(change)
    opt = torch.optim.SGD(net.parameters(), lr=RATE)
    for step in range(UPDATES):
        change(net, net, opt, step, lambda model: model)
        x = batch(step).to(net.decoder.weight.dtype if isinstance(net.decoder, nn.Linear) else None)
        opt.zero_grad()
        (net(x) - x).square().mean().backward()
        opt.step()
    return [p.detach().clone() for p in net.parameters()]


def train(ctx, change, is_rewrapped, plan=None):
    net = start(change)
    model = faccel.wrap(net, ctx, plan=plan)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)

    def rewrap(model):
        return faccel.rewrap(model, ctx) if is_rewrapped else model

    for step in range(UPDATES):
        model = change(net, model, opt, step, rewrap)
        x = batch(step, ctx.data_rank, ctx.data_world_size)
        x = x.to(next(net.decoder.parameters()).dtype)
        scaler = faccel.scaled_backward((model(x) - x).square().mean(), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    return [full(p) for p in net.parameters()]


def check_same(ranks, expected, atol=1e-12):
    for params in ranks:
        assert len(params) == len(expected)
        for param, value in zip(params, expected, strict=True):
            assert torch.allclose(param, value.to(param.dtype), rtol=0, atol=atol)


RAISES = {
    unfreeze: "`encoder.weight`",
    add_layer: "`decoder.1.weight`",
    replace_layer: "`decoder.weight`",
    cast: "`encoder.weight`",
    freeze: "`encoder.weight`",
}


@pytest.mark.parametrize("mesh", ["dp_shard=2", "tp=2", "dp_replicate=2,dp_shard=2"])
@pytest.mark.parametrize("change", [unfreeze, freeze], ids=lambda change: change.__name__)
def test_freezing_works_where_parameters_are_sharded(change, mesh):
    world_size = 4 if "," in mesh else 2
    plan = faccel.Plan(tensor=TENSOR)
    check_same(simulate(train, world_size, change, True, plan, mesh=mesh), plain_torch(change))


@pytest.mark.parametrize("is_rewrapped", [True, False])
def test_a_new_layer_raises_where_parameters_are_sharded(is_rewrapped):
    with pytest.raises(FaccelError, match=r"decoder\.1\.weight"):
        simulate(train, 2, add_layer, is_rewrapped, mesh="dp_shard=2")


def test_zero_1_keeps_its_optimizer_after_unfreezing():
    plan = faccel.Plan(ddp=faccel.parallel.DdpConfig(shard_optimizer=True))
    check_same(simulate(train, 2, unfreeze, True, plan), plain_torch(unfreeze))


def test_values_that_differ_between_ranks_raise_at_the_first_step():
    def fn(ctx):
        model = faccel.wrap(Net(), ctx)
        opt = torch.optim.SGD(model.parameters(), lr=RATE)
        torch.manual_seed(ctx.rank)
        model.decoder.reset_parameters()
        scaler = faccel.scaled_backward(model(torch.ones(2, 4)).sum(), faccel.init_scaler(ctx), ctx)
        with pytest.raises(ModelError, match=r"`decoder\.weight` and 1 more"):
            faccel.optimizer_step(opt, scaler, ctx)
        model = faccel.rewrap(model, ctx)  # the fix
        scaler = faccel.scaled_backward(model(torch.ones(2, 4)).sum(), scaler, ctx)
        faccel.optimizer_step(opt, scaler, ctx)
        return model.decoder.weight.detach()

    first, second = simulate(fn, 2)
    assert torch.equal(first, second)


def test_the_old_model_raises_after_rewrap():
    def fn(ctx):
        model = faccel.wrap(Net(), ctx)
        faccel.rewrap(model, ctx)
        with pytest.raises(ModelError, match=r"replaced by `faccel\.rewrap`"):
            model(torch.ones(1, 4))

    simulate(fn, 2)


def test_rewrap_of_a_pipeline_is_an_error():
    plan = faccel.Plan(pipeline=faccel.parallel.PipelineConfig(chain=("encoder", "decoder")))

    def fn(ctx):
        with pytest.raises(ConfigError, match="cannot change"):
            faccel.rewrap(faccel.wrap(Net(), ctx, plan=plan), ctx)

    simulate(fn, 2, mesh="pp=2")


# Ways to call parts of a model in one loss, each equal to one call of the model.
CALLS = {
    "the model": lambda model, x: model(x),
    "submodules through `call`": lambda model, x: model.call("decoder", model.call("encoder", x)),
    "a method and a submodule": lambda model, x: model.call("decoder", model.call("encode", x)),
    "two forwards": lambda model, x: (model(x) + model(x)) / 2,
    "a forward and submodules": lambda model, x: (
        (model(x) + model.call("decoder", model.call("encoder", x))) / 2
    ),
    "submodules read from the model": lambda model, x: model.decoder(model.encoder(x)),
}
LOCAL = {"submodules read from the model"}  # their parameters are not gathered
PLANS = {
    "default": faccel.Plan(tensor=TENSOR),
    "unused": faccel.Plan(
        ddp=faccel.parallel.DdpConfig(find_unused_parameters=True), tensor=TENSOR
    ),
    "units": faccel.Plan(units=("encoder",), tensor=TENSOR),
}
MESHES = {
    "ddp": (2, "dp_replicate=2"),
    "fsdp": (2, "dp_shard=2"),
    "hsdp": (4, "dp_replicate=2,dp_shard=2"),
    "tp": (2, "tp=2"),
    "single": (1, None),
}


def train_by_calls(ctx, call, plan):
    torch.manual_seed(0)
    model = faccel.wrap(Net().double(), ctx, plan=plan)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)
    for step in range(UPDATES):
        x = batch(step, ctx.data_rank, ctx.data_world_size)
        loss = (CALLS[call](model, x) - x).square().mean()
        scaler = faccel.scaled_backward(loss, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    return [full(p) for p in model.parameters()]


def nothing(net, model, opt, step, rewrap):
    return model


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("call", CALLS)
def test_parts_of_a_model_are_called_in_one_loss(call, plan, mesh):
    if call in LOCAL and mesh in ("fsdp", "hsdp", "tp"):
        pytest.skip("parameters are sharded: use `call`")
    world_size, axes = MESHES[mesh]
    ranks = simulate(train_by_calls, world_size, call, PLANS[plan], mesh=axes)
    check_same(ranks, plain_torch(nothing))


def test_a_part_alone_raises_in_the_same_update_and_names_the_other():
    def fn(ctx):
        model = faccel.wrap(Net(), ctx)
        opt = torch.optim.SGD(model.parameters(), lr=RATE)
        scaler = faccel.scaled_backward(
            model.encoder(torch.ones(2, 4)).sum(), faccel.init_scaler(ctx), ctx
        )
        with pytest.raises(ModelError, match=r"`decoder\.weight`"):
            faccel.optimizer_step(opt, scaler, ctx)

    simulate(fn, 2)


def test_a_part_alone_trains_with_find_unused_parameters():
    def fn(ctx):
        torch.manual_seed(0)
        model = faccel.wrap(Net().double(), ctx, plan=PLANS["unused"])
        opt = torch.optim.SGD(model.parameters(), lr=RATE)
        scaler = faccel.init_scaler(ctx)
        for part, width in (("encoder", 4), ("decoder", 6)):
            x = batch(0, ctx.data_rank, ctx.data_world_size).repeat(1, 2)[:, :width]
            loss = model.call(part, x).square().mean()
            scaler = faccel.scaled_backward(loss, scaler, ctx)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        return [full(p) for p in model.parameters()]

    check_same(simulate(fn, 2), simulate(fn, 1)[0])
    torch.manual_seed(0)
    net = Net().double()
    loss = (
        net.encoder(batch(0)).square().mean()
        + net.decoder(batch(0).repeat(1, 2)[:, :6]).square().mean()
    )
    loss.backward()
    check_same(simulate(fn, 2), [p - RATE * p.grad for p in net.parameters()])


# Optimizers with a parameter that no engine averages.


@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2"])
@pytest.mark.parametrize("debug", [False, True])
def test_a_forgotten_wrap_raises_at_the_first_step(mesh, debug):
    def fn(ctx):
        net = Net()
        opt = torch.optim.SGD(net.parameters(), lr=RATE)
        scaler = faccel.scaled_backward(
            net(torch.ones(2, 4) * ctx.rank).sum(), faccel.init_scaler(ctx), ctx
        )
        with pytest.raises(OptimizerError, match="which no wrapped model has") as caught:
            faccel.optimizer_step(opt, scaler, ctx)
        assert "faccel.wrap(net, ctx)" in caught.value.fix

    simulate(fn, 2, mesh=mesh, config={"debug": debug})


@pytest.mark.parametrize("mesh", [None, "dp_replicate=2"])
def test_a_module_is_wrapped_once(mesh):
    def fn(ctx):
        net = Net()
        model = faccel.wrap(net, ctx)
        for other in (net, nn.Sequential(net.encoder)):
            with pytest.raises(ModelError, match="another wrapped model has"):
                faccel.wrap(other, ctx)
        model = faccel.rewrap(model, ctx)  # the fix
        del model
        faccel.wrap(net, ctx)

    simulate(fn, 2 if mesh else 1, mesh=mesh)


class CustomSGD(torch.optim.SGD):
    """An optimizer that PyTorch does not have."""


@pytest.mark.parametrize(
    ("make_opt", "mesh"),
    [
        (torch.optim.SGD, None),
        (CustomSGD, "dp_shard=2"),
        # Debug mode searches the objects of this process, which takes seconds after other tests.
        pytest.param(CustomSGD, None, marks=pytest.mark.slow),
        pytest.param(torch.optim.SGD, "dp_shard=2", marks=pytest.mark.slow),
        pytest.param(torch.optim.SGD, "dp_replicate=2", marks=pytest.mark.slow),
        pytest.param(CustomSGD, "dp_replicate=2", marks=pytest.mark.slow),
    ],
)
def test_an_optimizer_made_before_wrap_raises_on_every_mesh_in_debug_mode(make_opt, mesh):
    def fn(ctx):
        net, other = Net(), Net()
        early = make_opt(net.parameters(), lr=RATE)
        make_opt(other.parameters(), lr=RATE)
        model = faccel.wrap(net, ctx)
        with pytest.raises(OptimizerError, match="before `wrap`") as caught:
            faccel.wrap_optimizer(early, model, ctx)
        assert "`model.parameters()`" in caught.value.fix
        late = faccel.wrap_optimizer(make_opt(model.parameters(), lr=RATE), model, ctx)
        second = faccel.wrap(other, ctx)  # `late` has none of its parameters
        faccel.wrap_optimizer(make_opt(second.parameters(), lr=RATE), second, ctx)
        # Where the parameters stay, an optimizer may outlive `rewrap`.
        if mesh != "dp_shard=2":
            faccel.wrap_optimizer(late, faccel.rewrap(model, ctx), ctx)

    simulate(fn, 2 if mesh else 1, mesh=mesh, config={"debug": True})


# Orders of forwards, backwards and `grad_sync`: gradients of replicas are equal, or a step raises.


def by_hand(loss, ctx, **options):
    loss.backward(**options)


def scaled(loss, ctx, **options):
    faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx, **options)


def two_backwards(model, x, ctx, backward):
    loss = model(x).square().mean()
    backward(loss, ctx, retain_graph=True)
    backward(2 * loss, ctx)
    return 3


def two_forwards_then_two_backwards(model, x, ctx, backward):
    losses = [model(x).square().mean(), 2 * model(x).square().mean()]
    for loss in losses:
        backward(loss, ctx)
    return 3


def forwards_without_sync(model, x, ctx, backward):
    with faccel.grad_sync(model, on=False):
        losses = [model(x).square().mean() for _ in range(2)]
        backward(losses[0], ctx)
    with faccel.grad_sync(model, on=True):
        backward(losses[1], ctx)
    return 2


def a_backward_without_sync_inside(model, x, ctx, backward):
    losses = [model(x).square().mean() for _ in range(2)]
    with faccel.grad_sync(model, on=False):
        backward(losses[0], ctx)
    backward(losses[1], ctx)
    return 2


def a_backward_without_sync_that_is_cleared(model, x, ctx, backward):
    with faccel.grad_sync(model, on=False):
        backward(5 * model(x).square().mean(), ctx)
    model.zero_grad()
    backward(model(x).square().mean(), ctx)
    return 1


def mixed(model, x, ctx, backward):
    loss = model(x).square().mean()
    by_hand(loss, ctx, retain_graph=True)
    scaled(loss, ctx, retain_graph=True)
    by_hand(loss, ctx)
    return 3


ORDERS = [
    two_backwards, two_forwards_then_two_backwards, forwards_without_sync,
    a_backward_without_sync_inside, a_backward_without_sync_that_is_cleared, mixed,
]  # fmt: skip


@pytest.mark.parametrize("backward", [by_hand, scaled], ids=lambda fn: fn.__name__)
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.__name__)
@pytest.mark.parametrize("mesh", ["dp_replicate=2", "dp_shard=2", "dp_replicate=2,dp_shard=2"])
def test_every_order_of_backwards_averages(order, backward, mesh):
    def fn(ctx):
        torch.manual_seed(0)
        model = faccel.wrap(Net().double(), ctx)
        for step in range(2):  # DDP rebuilds its buckets after the first
            model.zero_grad()
            order(model, batch(step, ctx.data_rank, ctx.data_world_size), ctx, backward)
        return [full(p.grad) for p in model.parameters()]

    torch.manual_seed(0)
    net = Net().double()
    loss = net(batch(1)).square().mean()
    factor = {mixed: 3, two_backwards: 3, two_forwards_then_two_backwards: 3}.get(order, 2)
    if order is a_backward_without_sync_that_is_cleared:
        factor = 1
    (factor * loss).backward()
    world_size = 4 if "," in mesh else 2
    check_same(simulate(fn, world_size, mesh=mesh), [p.grad for p in net.parameters()])


def unsynchronised(model, x, ctx, opt):
    with faccel.grad_sync(model, on=False):
        return faccel.scaled_backward(model(x).sum(), faccel.init_scaler(ctx), ctx)


def through_submodules_by_hand(model, x, ctx, opt):
    scaler = faccel.scaled_backward(model(x).sum(), faccel.init_scaler(ctx), ctx)
    _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    model.decoder(model.encoder(x)).sum().backward()
    return scaler


def through_the_users_module(model, x, ctx, opt):
    scaler = faccel.scaled_backward(model(x).sum(), faccel.init_scaler(ctx), ctx)
    _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    faccel.unwrap(model)(x).sum().backward()
    return scaler


@pytest.mark.parametrize(
    "order",
    [unsynchronised, through_submodules_by_hand, through_the_users_module],
    ids=lambda order: order.__name__,
)
def test_a_step_with_gradients_of_one_rank_raises(order):
    def fn(ctx):
        model = faccel.wrap(Net(), ctx)
        opt = torch.optim.SGD(model.parameters(), lr=RATE)
        scaler = order(model, torch.ones(2, 4) * ctx.rank, ctx, opt)
        with pytest.raises(OptimizerError, match="drift apart"):
            faccel.optimizer_step(opt, scaler, ctx)
        with faccel.grad_sync(model, on=False):  # the fix for local SGD
            faccel.optimizer_step(opt, scaler, ctx)

    simulate(fn, 2)


def test_two_optimizers_of_one_model_use_the_same_backward():
    def fn(ctx):
        model = faccel.wrap(Net(), ctx)
        opts = [
            torch.optim.SGD(part.parameters(), lr=RATE) for part in (model.encoder, model.decoder)
        ]
        scaler = faccel.init_scaler(ctx)
        for step in range(2):
            x = batch(step, ctx.rank, ctx.world_size, torch.float32)
            scaler = faccel.scaled_backward(model(x).square().mean(), scaler, ctx)
            for opt in opts:
                _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        return [p.detach() for p in model.parameters()]

    first, second = simulate(fn, 2)
    check_same([first], second, 0)


# Buffers are equal between updates, so that one rank may evaluate alone.


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("num_calls", torch.zeros(()))

    def forward(self, x):
        self.num_calls += x.sum().detach()
        return self.norm(self.linear(x))

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())


def one_rank_evaluates(ctx, backward=scaled):
    torch.manual_seed(0)
    model = faccel.wrap(Norm(), ctx)
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    outputs, x = [], torch.ones(4, 4)
    for step in range(3):
        backward(model(batch(step, ctx.rank, ctx.world_size, torch.float32)).square().sum(), ctx)
        opt.step(), opt.zero_grad()
        outputs.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        if ctx.rank == step % ctx.world_size:
            assert model.num_parameters() == 28
            model.eval()
            with torch.no_grad():
                outputs[-1]["output"] = model(x)
            model.train()
    model.eval()
    with torch.no_grad():
        last = model(x)
    return outputs, last


@pytest.mark.parametrize("backward", [by_hand, scaled], ids=lambda fn: fn.__name__)
def test_buffers_are_rank_0s_after_each_update_and_one_rank_evaluates_alone(backward):
    (first, first_last), (second, second_last) = simulate(one_rank_evaluates, 2, backward)
    for step in range(3):
        for name in ("norm.running_mean", "norm.running_var", "num_calls"):
            assert torch.equal(first[step][name], second[step][name])
    assert torch.equal(first_last, second_last)
    assert "output" in first[0] and "output" in second[1]
    # Rank 0's statistics of the first step, by hand: a running mean moves by a tenth.
    torch.manual_seed(0)
    net = Norm()
    x = batch(0, 0, 2, torch.float32)
    assert torch.allclose(first[0]["norm.running_mean"], 0.1 * net.linear(x).mean(0), atol=1e-6)
    assert torch.allclose(second[0]["num_calls"], x.sum(), atol=1e-6)


def test_buffers_cost_one_broadcast_per_update_and_none_in_evaluation():
    def fn(ctx, updates, evaluations):
        model = faccel.wrap(Norm(), ctx)
        for step in range(updates):
            scaled(model(batch(step, ctx.rank, 2, torch.float32)).sum(), ctx)
            model.zero_grad()
        for _ in range(evaluations):
            model.eval()
            with torch.no_grad():
                model(torch.ones(2, 4))
            model.train()

    def count(*numbers):
        trace = simulate(fn, 2, *numbers).trace
        return sum(event.op == "broadcast" and event.rank == 0 for event in trace)

    per_update = count(4, 0) - count(3, 0)
    assert per_update == 2  # one for each dtype of the buffers, as in DDP's forward
    assert count(3, 5) == count(3, 0)


def test_several_forwards_of_a_batch_norm_and_a_retained_graph():
    def fn(ctx):
        torch.manual_seed(0)
        model = faccel.wrap(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double(), ctx)
        x = batch(0, ctx.rank, ctx.world_size)
        losses = [model(x).exp().mean() for _ in range(2)]
        scaled(losses[0], ctx, retain_graph=True)
        scaled(losses[0], ctx)
        scaled(losses[1], ctx)
        return [full(p.grad) for p in model.parameters()]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).double()
    # Each rank normalizes its own rows: the mean of the losses of two halves.
    (3 * sum(net(half).exp().mean() for half in batch(0).chunk(2)) / 2).backward()
    check_same(simulate(fn, 2), [p.grad for p in net.parameters()])
