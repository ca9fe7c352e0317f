"""`retain_graph`, `create_graph` and `inputs` of `scaled_backward`, compared with one process."""

import pytest
import torch
from torch import nn

import faccel
from faccel.backends.deepspeed.engine import DEEPSPEED
from faccel.errors import ModelError
from faccel.testing import simulate
from faccel.update_options import BackwardOptions
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's advice on layouts
ROWS, RATE = 8, 0.1
PLAN = faccel.Plan(tensor={"trunk": "colwise", "heads.0": "rowwise", "heads.1": "rowwise"})
MESHES = {
    "single": (1, None),
    "ddp": (2, "dp_replicate=2"),
    "ddp-3": (3, "dp_replicate=3"),
    "fsdp": (2, "dp_shard=2"),
    "hsdp": (4, "dp_replicate=2,dp_shard=2"),
    "tp": (2, "tp=2"),
    "fsdp-tp": (4, "dp_shard=2,tp=2"),
}


class Tasks(nn.Module):
    """One trunk and a head for each task: the loss of a task does not reach the other head."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleList([nn.Linear(6, 2) for _ in range(2)])

    def forward(self, x):
        hidden = torch.tanh(self.trunk(x))
        return [head(hidden) for head in self.heads]


def net():
    torch.manual_seed(0)
    return Tasks().double()


def batch(step, rank=0, world_size=1):
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return rows.chunk(world_size)[rank]


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def task_losses(model, x):
    return [out.square().mean() * (i + 1) for i, out in enumerate(model(x))]


def pcgrad(params, losses, backward):
    """Project each task's gradient off the others' conflicting ones (Yu et al. 2020)."""
    tasks = []
    for i, loss in enumerate(losses):
        backward(loss, retain_graph=i < len(losses) - 1)
        tasks.append([full(p.grad) if p.grad is not None else torch.zeros(1) for p in params])
        for p in params:
            p.grad = None
    shared = [grads[:2] for grads in tasks]  # weight and bias of the trunk
    result = []
    for i, own in enumerate(shared):
        projected = [grad.clone() for grad in own]
        other = shared[1 - i]
        dot = sum((a * b).sum() for a, b in zip(projected, other, strict=True))
        norm = sum(b.square().sum() for b in other)
        if dot < 0:
            projected = [a - dot / norm * b for a, b in zip(projected, other, strict=True)]
        result.append(projected)
    return [sum(pair) for pair in zip(*result, strict=True)], tasks


def check_same(got, expected, atol=1e-12):
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=atol)


def run_pcgrad(ctx):
    model = faccel.wrap(net(), ctx, plan=PLAN)
    params = list(model.parameters())
    scaler = faccel.init_scaler(ctx)
    results = []

    def backward(loss, **options):
        faccel.scaled_backward(loss, scaler, ctx, **options)

    for step in range(2):
        losses = task_losses(model, batch(step, ctx.data_rank, ctx.data_world_size))
        results += pcgrad(params, losses, backward)[0]
    return results


def expected_pcgrad():
    plain, results = net(), []
    for step in range(2):
        losses = task_losses(plain, batch(step))
        results += pcgrad(list(plain.parameters()), losses, torch.Tensor.backward)[0]
    return results


@pytest.mark.parametrize("mesh", MESHES)
def test_pcgrad_equals_one_process(mesh):
    world_size, axes = MESHES[mesh]
    for got in simulate(run_pcgrad, world_size, mesh=axes):
        check_same(got, expected_pcgrad())


def test_pcgrad_over_gloo():
    for got in run_ranks(run_pcgrad, 2):
        check_same(got, expected_pcgrad())


ALPHA, WEIGHT_RATE = 1.5, 0.2


def gradnorm_weights(weights, norms, losses, first_losses):
    """Return the next weights of the tasks (Chen et al. 2018, algorithm 1, SGD).

    `norms` are those of `weights[i] * gradient of loss i` of the shared layer. The loss of the
    weights is the sum of `|norm_i - mean(norm) * rate_i ** ALPHA|`, with a constant target.
    """
    weights, norms, losses, first_losses = (
        torch.tensor(values, dtype=torch.float64)
        for values in (weights, norms, losses, first_losses)
    )
    relative = losses / first_losses
    target = norms.mean() * (relative / relative.mean()) ** ALPHA
    weights = weights - WEIGHT_RATE * torch.sign(norms - target) * norms / weights
    return (weights * len(weights) / weights.sum()).tolist()


def gradnorm(model, opt, num_steps, batch_of, backward, norm_of, mean_of, step):
    """Train both tasks by GradNorm; return the weights and the parameters."""
    weights, history = [1.0, 1.0], []
    first_losses = None
    for index in range(num_steps):
        losses = task_losses(model, batch_of(index))
        norms = []
        for weight, loss in zip(weights, losses, strict=True):
            backward(weight * loss, retain_graph=True, inputs=list(model.trunk.parameters()))
            norms.append(norm_of(list(model.trunk.parameters())))
            for param in model.trunk.parameters():
                param.grad = None
        backward(sum(w * loss for w, loss in zip(weights, losses, strict=True)))
        step(opt)
        values = [mean_of(loss.detach()) for loss in losses]
        first_losses = first_losses or values
        weights = gradnorm_weights(weights, norms, values, first_losses)
        history += weights
    return history, [full(param) for param in model.parameters()]


def run_gradnorm(ctx):
    model = faccel.wrap(net(), ctx, plan=PLAN)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)

    def backward(loss, **options):
        nonlocal scaler
        scaler = faccel.scaled_backward(loss, scaler, ctx, **options)

    def step(opt):
        nonlocal scaler
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)

    return gradnorm(
        model,
        opt,
        4,
        lambda index: batch(index, ctx.data_rank, ctx.data_world_size),
        backward,
        lambda params: faccel.grad_norm(params, ctx).item(),
        lambda loss: faccel.reduce(loss, ctx, op="mean").item(),
        step,
    )


def expected_gradnorm():
    def step(opt):
        opt.step()
        opt.zero_grad()

    plain = net()
    return gradnorm(
        plain,
        torch.optim.SGD(plain.parameters(), lr=RATE),
        4,
        batch,
        torch.Tensor.backward,
        lambda params: torch.nn.utils.get_total_norm([p.grad for p in params]).item(),
        torch.Tensor.item,
        step,
    )


@pytest.mark.parametrize("mesh", MESHES)
def test_gradnorm_equals_one_process(mesh):
    world_size, axes = MESHES[mesh]
    weights, params = expected_gradnorm()
    assert max(abs(weight - 1) for weight in weights) > 0.1  # the tasks are balanced differently
    for got_weights, got_params in simulate(run_gradnorm, world_size, mesh=axes):
        assert got_weights == pytest.approx(weights, rel=1e-9)
        check_same(got_params, params, atol=1e-10)


def updates(ctx, losses_of, options_of):
    """Train with several backwards per update; return the parameters."""
    model = faccel.wrap(net(), ctx, plan=PLAN)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=RATE), model, ctx)
    scaler = faccel.init_scaler(ctx)
    for step in range(3):
        x = batch(step, ctx.data_rank, ctx.data_world_size)
        for loss, options in zip(losses_of(model, x), options_of(model), strict=True):
            scaler = faccel.scaled_backward(loss, scaler, ctx, **options)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    return [full(p) for p in model.parameters()]


def plain_updates(losses_of, options_of):
    plain = net()
    opt = torch.optim.SGD(plain.parameters(), lr=RATE)
    for step in range(3):
        opt.zero_grad()
        for loss, options in zip(losses_of(plain, batch(step)), options_of(plain), strict=True):
            loss.backward(**options)
        opt.step()
    return [p.detach() for p in plain.parameters()]


OPTIONS = {
    "retained": lambda model: [{"retain_graph": True}, {}],
    "all retained": lambda model: [{"retain_graph": True}, {"retain_graph": True}],
    "inputs": lambda model: [
        {"retain_graph": True, "inputs": list(model.trunk.parameters())},
        {"inputs": list(model.parameters())[-2:]},
    ],
    "one input": lambda model: [{"retain_graph": True, "inputs": model.trunk.weight}, {}],
}


def full_losses(model, x):
    outs = model(x)
    loss = sum(out.square().mean() for out in outs)
    return [loss, 2 * loss]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("losses", [task_losses, full_losses], ids=lambda fn: fn.__name__)
def test_several_backwards_equal_one_process(losses, options, mesh):
    world_size, axes = MESHES[mesh]
    expected = plain_updates(losses, OPTIONS[options])
    for got in simulate(updates, world_size, losses, OPTIONS[options], mesh=axes):
        check_same(got, expected)


def test_accumulation_without_sync_then_several_backwards():
    def fn(ctx):
        model = faccel.wrap(net(), ctx)
        scaler = faccel.init_scaler(ctx)
        with faccel.grad_sync(model, on=False):
            for loss in [sum(task_losses(model, batch(0, ctx.data_rank, ctx.data_world_size)))]:
                faccel.scaled_backward(loss, scaler, ctx)
        first, second = task_losses(model, batch(1, ctx.data_rank, ctx.data_world_size))
        faccel.scaled_backward(first, scaler, ctx, retain_graph=True)
        faccel.scaled_backward(second, scaler, ctx)
        return [full(p.grad) for p in model.parameters()]

    plain = net()
    for step in range(2):
        sum(task_losses(plain, batch(step))).backward()
    for mesh in ("dp_replicate=2", "dp_shard=2"):
        for got in simulate(fn, 2, mesh=mesh):
            check_same(got, [p.grad for p in plain.parameters()])


def penalty(model, x, ctx=None):
    """Return the gradient of a penalty on the gradients: a second derivative."""
    loss = sum(task_losses(model, x))
    if ctx is None:
        loss.backward(create_graph=True)
    else:
        faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx, create_graph=True)
    grads = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    value = sum(grad.square().sum() for grad in grads)
    if ctx is None:
        value.backward()
    else:
        faccel.scaled_backward(value, faccel.init_scaler(ctx), ctx)
    return [value.detach(), *(full(p.grad) for p in model.parameters())]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_create_graph_gives_the_derivative_of_the_averaged_gradient(world_size):
    def fn(ctx):
        model = faccel.wrap(net(), ctx)
        return penalty(model, batch(0, ctx.data_rank, ctx.data_world_size), ctx)

    for got in simulate(fn, world_size):
        check_same(got, penalty(net(), batch(0)))


def test_create_graph_where_parameters_are_sharded_is_an_error():
    def fn(ctx):
        model = faccel.wrap(net(), ctx)
        with pytest.raises(ModelError, match="create_graph"):
            penalty(model, batch(0, ctx.data_rank, ctx.data_world_size), ctx)

    simulate(fn, 2, mesh="dp_shard=2")


@pytest.mark.parametrize("name", ["retain_graph", "create_graph", "inputs"])
def test_an_engine_of_deepspeed_takes_no_option_of_backward(name):
    # The interface of the strategy, which needs no DeepSpeed.
    module = nn.Linear(2, 2)
    reducer = DEEPSPEED.grad_reducer(module, module)
    loss = module(torch.ones(1, 2)).mean()
    values = {"retain_graph": True, "create_graph": True, "inputs": (module.weight,)}
    with pytest.raises(ModelError, match=f"{name}=.*under DeepSpeed") as caught:
        reducer.before_backward(loss, BackwardOptions(**{name: values[name]}))
    assert "loss = loss_1 + loss_2" in caught.value.fix
    reducer.before_backward(loss, BackwardOptions(retain_graph=False))
    assert reducer.param_ids == {id(module.weight), id(module.bias)}


def test_sparse_gradients_and_static_graphs_are_errors():
    def fn(ctx):
        embedding = faccel.wrap(nn.Embedding(4, 2, sparse=True), ctx)
        loss = embedding(torch.tensor([ctx.rank])).sum()
        with pytest.raises(ModelError, match="sparse"):
            faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx, retain_graph=True)
        plan = faccel.Plan(ddp=faccel.parallel.DdpConfig(static_graph=True))
        model = faccel.wrap(nn.Linear(2, 2), ctx, plan=plan)
        loss = model(torch.ones(1, 2)).sum()
        with pytest.raises(ModelError, match="one backward per forward"):
            faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx, retain_graph=True)

    simulate(fn, 2)


def test_fp16_scales_several_backwards():
    def fn(ctx):
        model = faccel.wrap(net().float(), ctx)
        opt = torch.optim.SGD(model.parameters(), lr=RATE)
        scaler = faccel.init_scaler(ctx, scale=256.0)
        first, second = task_losses(model, batch(0, ctx.data_rank, ctx.data_world_size).float())
        scaler = faccel.scaled_backward(first, scaler, ctx, retain_graph=True)
        scaler = faccel.scaled_backward(second, scaler, ctx)
        info, _ = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1e9)
        return info.grad_norm.item()

    plain = net()
    sum(task_losses(plain, batch(0))).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]).item()
    for got in simulate(fn, 2, config={"mixed_precision": "fp16"}):
        assert got == pytest.approx(norm, rel=1e-2)
