"""Parameters, and what else holds them: optimizers, checkpoints, hooks, averages, other modules."""

import contextlib
import copy
from collections.abc import Callable

import attrs
import pytest
import torch
from torch import nn

import faccel
from faccel.errors import ModelError, OptimizerError
from tests.cases.worlds import (
    OPTIMIZERS,
    PLAN,
    WORLDS,
    Net,
    backward,
    build,
    check_values,
    plain_net,
    rows,
    square,
    values,
)  # fmt: skip

# baseline_eval, optimizer_after_eval


@contextlib.contextmanager
def with_gradients():
    """A forward without a backward."""
    yield


EVALUATIONS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "with gradients": with_gradients,
}


def train_after_evaluation(ctx, plan, optimizer, evaluation):
    model = faccel.wrap(Net().double(), ctx, plan=plan)
    with EVALUATIONS[evaluation]():
        model(rows())  # how good is it before training?
    opt = OPTIMIZERS[optimizer](model.parameters())
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler, norms = faccel.init_scaler(ctx), []
    for update in range(3):
        scaler = backward(ctx, model, scaler, update)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1e9)
        norms.append(info.grad_norm.item())
    return values(model), norms


def an_evaluation_before_the_optimizer(folder, world, optimizer, evaluation):
    """Every parameter is trained, and the norm is the norm of all gradients."""
    ranks = WORLDS[world].run(train_after_evaluation, WORLDS[world].plan, optimizer, evaluation)
    net, norms = plain_net(optimizer, 3)
    check_values([params for params, _ in ranks], net)
    assert all(got == pytest.approx(norms, rel=1e-9) for _, got in ranks)


# eval_then_save


def run_in_order(ctx, plan, order, folder, optimizer):
    model, opt = build(ctx, plan, optimizer)
    scaler, update = faccel.init_scaler(ctx), 0
    for word in order.split():
        if word == "train":
            scaler = backward(ctx, model, scaler, update)
            _, scaler = faccel.optimizer_step(opt, scaler, ctx)
            update += 1
        if word == "evaluate":
            with torch.no_grad():
                model(rows())
        if word in ("save", "background"):
            state = {"model": model, "opt": opt}
            faccel.save(state, folder, ctx, step=update, background=word == "background")
        if word == "restart":
            model, opt = build(ctx, plan, optimizer)
        if word == "load":
            faccel.load({"model": model, "opt": opt}, folder, ctx)
    return values(model)


def an_evaluation_around_a_save(folder, world, order, optimizer):
    """A run that evaluates, saves, restarts and loads ends as one that only trains."""
    args = (WORLDS[world].plan, order, str(folder), optimizer)
    ranks = WORLDS[world].run(run_in_order, *args)
    net, _ = plain_net(optimizer, order.split().count("train"))
    check_values(ranks, net)


# grad_hook


MASK = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)[:, None]


def tensor_hook(param):
    param.register_hook(lambda grad: grad * MASK)


def accumulate_hook(param):
    def mask(param):
        param.grad.mul_(MASK)

    param.register_post_accumulate_grad_hook(mask)


HOOKS = {"tensor hook": tensor_hook, "post-accumulate hook": accumulate_hook}


def train_with_hook(ctx, plan, hook, optimizer):
    net = Net().double()
    HOOKS[hook](net.first.weight)
    model = faccel.wrap(net, ctx, plan=plan)
    opt = OPTIMIZERS[optimizer](model.parameters())
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler = faccel.init_scaler(ctx)
    for update in range(2):
        scaler = backward(ctx, model, scaler, update)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    return values(model)


def a_hook_of_a_parameter(folder, world, hook, optimizer):
    """A hook that freezes two rows freezes them, and the others are trained."""
    ranks = WORLDS[world].run(train_with_hook, WORLDS[world].plan, hook, optimizer)
    net, _ = plain_net(optimizer, 2, prepare=lambda net: HOOKS[hook](net.first.weight))
    check_values(ranks, net)
    assert torch.equal(net.first.weight[:2], Net().double().first.weight[:2])


# ema_fsdp


DECAY = 0.9


def average_with_faccel(ctx, plan, optimizer):
    model, opt = build(ctx, plan, optimizer)
    ema = faccel.parallel.init_ema(model, ctx, decay=DECAY)
    scaler = faccel.init_scaler(ctx)
    for update in range(3):
        scaler = backward(ctx, model, scaler, update)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        ema = faccel.parallel.update_ema(ema, model, ctx)
    with faccel.parallel.ema_weights(model, ema, ctx):
        return values(model)


def average_with_torch(optimizer, module, updates):
    average = torch.optim.swa_utils.AveragedModel(
        module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(DECAY)
    )
    # The first call copies; faccel starts with the values of `init_ema`.
    average.update_parameters(module)
    opt = OPTIMIZERS[optimizer](module.parameters())
    for update in updates:
        opt.zero_grad()
        square(module, rows(update)).backward()
        opt.step()
        average.update_parameters(module)
    return average.module


def averages_of_parameters(folder, world, optimizer):
    """An exponential moving average equals the one of `AveragedModel` on one process."""
    ranks = WORLDS[world].run(average_with_faccel, WORLDS[world].plan, optimizer)
    check_values(ranks, average_with_torch(optimizer, Net().double(), range(3)))


# holder


class System(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.backbone(x))


CONTAINERS = {
    "attribute": lambda model: model,
    "list": lambda model: [model],
    "dict": lambda model: {"a": model},
    "module": System,
}


def hold(ctx, plan, container, folder):
    system = System(CONTAINERS[container](faccel.wrap(nn.Linear(4, 4), ctx)))
    with pytest.raises(ModelError, match="backbone` is a wrapped model inside a module"):
        faccel.wrap(system, ctx)
    # It would save the head alone.
    with pytest.raises(ModelError, match="backbone` is a wrapped model inside a module"):
        faccel.save({"model": system}, folder, ctx, step=1)
    # The fix: the outer module is wrapped.
    torch.manual_seed(0)
    model = faccel.wrap(System(nn.Linear(4, 4)), ctx)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    before = values(model)
    scaler = faccel.scaled_backward(model(torch.ones(2, 4)).sum(), faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(opt, scaler, ctx)
    after = values(model)
    return [name for name in before if torch.equal(before[name], after[name])]


def a_wrapped_model_inside_a_module(folder, world, container):
    """It raises in `wrap` and in `save`; what the message suggests trains all parameters."""
    ranks = WORLDS[world].run(hold, WORLDS[world].plan, container, str(folder))
    assert ranks == [[]] * WORLDS[world].size


# meta


class Tied(nn.Module):
    """With a tied parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.down.weight = self.up.weight
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.down(self.up(x)))


NUM_ON_META = {"every rank": 0, "all but rank 0": 1}


def make_on_meta(ctx, on_meta):
    torch.manual_seed(0)
    is_meta = ctx.rank >= NUM_ON_META[on_meta]
    with torch.device("meta" if is_meta else "cpu"):
        net = Tied()
    model = faccel.wrap(net, ctx, plan=faccel.Plan(tensor={"up": "replicate"}))
    assert net.down.weight is net.up.weight
    return values(model), model(torch.randn(4, 4)).shape


def a_model_on_meta(folder, world, on_meta):
    """It gets the values of one process with the seed of rank 0."""
    ranks = WORLDS[world].run(make_on_meta, on_meta)
    # `reset_parameters` of both layers, in the order of `modules()`; then they are tied.
    torch.manual_seed(0)
    expected = Tied().state_dict()
    for params, shape in ranks:
        assert shape == (4, 4)
        for name, value in params.items():
            assert torch.equal(value, expected[name]), name


# raw_errors


def full_state_dict(ctx, model):
    model.load_state_dict(Net().double().state_dict())


def copied(ctx, model):
    copy.deepcopy(model)


def averaged(ctx, model):
    torch.optim.swa_utils.AveragedModel(model)


def averaged_module(ctx, model):
    torch.optim.swa_utils.AveragedModel(faccel.unwrap(model)).update_parameters(
        faccel.unwrap(model)
    )


def wrapped_again(ctx, model):
    faccel.wrap(faccel.unwrap(model), ctx)


def penalized(ctx, model):
    loss = square(model, rows()) + sum(param.square().sum() for param in model.parameters())
    scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(torch.optim.SGD(model.parameters(), lr=0.1), scaler, ctx)


def penalized_in_full(ctx, model):
    penalty = sum(faccel.tree.full_tensor(param).square().sum() for param in model.parameters())
    loss = square(model, rows()) + penalty
    scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(torch.optim.SGD(model.parameters(), lr=0.1), scaler, ctx)


def gradient_penalized(ctx, model):
    x = rows().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    scaler = faccel.scaled_backward(grad.square().mean(), faccel.init_scaler(ctx), ctx)
    # The bias of the output has no gradient.
    params = [param for name, param in model.named_parameters() if name != "last.bias"]
    faccel.optimizer_step(torch.optim.SGD(params, lr=0.1), scaler, ctx)


def muon(ctx, model):
    opt = torch.optim.Muon([param for param in model.parameters() if param.ndim == 2], lr=0.1)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler = faccel.scaled_backward(square(model, rows()), faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(opt, scaler, ctx)


def lbfgs(ctx, model):
    opt = torch.optim.LBFGS(model.parameters(), lr=0.1)
    opt = faccel.wrap_optimizer(opt, model, ctx)

    def closure():
        opt.zero_grad()
        loss = square(model, rows())
        faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
        return loss

    opt.step(closure)


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(2, 4, 2, padding=1), nn.Linear(4, 1)

    def forward(self, x):
        x = x.reshape(-1, 2, 1, 2).to(memory_format=torch.channels_last)
        return self.head(self.conv(x).relu().mean((2, 3)))


def channels_last():
    return Image().to(memory_format=torch.channels_last)


def lazy():
    return nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 1))


def train_once(ctx, model):
    scaler = faccel.scaled_backward(square(model, rows()), faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(torch.optim.SGD(model.parameters(), lr=0.1), scaler, ctx)


@attrs.frozen
class Idiom:
    """What users of PyTorch write, and the error that it raises.

    Args:
        run: Takes the context and the wrapped model.
        make: Makes the model.
        error: The class of the error, and a part of its text.
        raises: Where it raises: on "shards" or on "every mesh".
    """

    run: Callable[[faccel.DistContext, faccel.WrappedModel], None]
    make: Callable[[], nn.Module] = Net
    error: tuple[type[Exception], str] | None = None
    raises: str = "never"


COPY = (ModelError, "faccel.parallel.init_ema(model, ctx)")
MATRICES = (OptimizerError, "dp_replicate=-1")
IDIOMS = {
    "full state dict": Idiom(full_state_dict),
    "deepcopy": Idiom(copied, error=COPY, raises="every mesh"),
    "AveragedModel": Idiom(averaged, error=COPY, raises="every mesh"),
    # PyTorch's error, because no function of faccel is called.
    "AveragedModel of the module": Idiom(
        averaged_module, error=(AssertionError, "does not support deepcopy"), raises="shards"
    ),
    "wrap again": Idiom(wrapped_again, error=(ModelError, "wrapped"), raises="every mesh"),
    "L2 penalty": Idiom(penalized, error=(ModelError, "full_tensor()"), raises="shards"),
    "L2 penalty of full tensors": Idiom(penalized_in_full),
    "gradient penalty": Idiom(gradient_penalized),
    "Muon": Idiom(muon, error=MATRICES, raises="shards"),
    "LBFGS": Idiom(lbfgs, error=MATRICES, raises="shards"),
    "channels_last": Idiom(train_once, channels_last),
    "lazy": Idiom(train_once, lazy, (ModelError, "has no shape"), "every mesh"),
}


def run_idiom(ctx, name):
    # A gradient penalty does not use the last bias.
    plan = faccel.Plan(ddp=faccel.parallel.DdpConfig(find_unused_parameters=True))
    if not ctx.is_replicated and IDIOMS[name].make is Net:
        plan = PLAN
    model = faccel.wrap(IDIOMS[name].make().double(), ctx, plan=plan)
    IDIOMS[name].run(ctx, model)
    return values(model)


def an_idiom_of_torch(folder, world, name):
    """It computes what one process does, or raises an error of faccel's."""
    idiom, is_sharded = IDIOMS[name], "dp_shard" in WORLDS[world].mesh
    if idiom.raises == "every mesh" or (idiom.raises == "shards" and is_sharded):
        error, text = idiom.error
        with pytest.raises(error) as caught:
            WORLDS[world].run(run_idiom, name)
        assert text in str(caught.value)
        return
    (expected,) = WORLDS["single"].run(run_idiom, name)
    for params in WORLDS[world].run(run_idiom, name):
        torch.testing.assert_close(params, expected, rtol=0, atol=1e-9)
