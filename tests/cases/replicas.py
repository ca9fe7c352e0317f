"""Gradients and buffers of replicas: what may change them, and what one rank does alone."""

import copy
import math
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

import faccel
from faccel.errors import DesyncError, FaccelError, OptimizerError
from tests.cases.worlds import RATE, WORLDS, full
from tests.world.test_replicas import CHANGES, RAISES, check_same, plain_torch, train

# ddp_diverges


CHANGE_OF = {change.__name__: change for change in CHANGES}


def a_change_after_wrap(folder, world, change):
    """With `rewrap` it trains as one process; without, the step raises and names the parameter."""
    change = CHANGE_OF[change]
    ranks = WORLDS[world].run(train, change, True)
    check_same(ranks, plain_torch(change), 1e-6 if change is CHANGE_OF["cast"] else 1e-12)
    if change in RAISES and WORLDS[world].size > 1 and not WORLDS[world].is_real:
        with pytest.raises(FaccelError) as caught:
            WORLDS[world].run(train, change, False)
        assert RAISES[change] in str(caught.value)
        assert "faccel.rewrap(model, ctx)" in caught.value.fix


def train_criterion(ctx, is_wrapped):
    torch.manual_seed(0)
    model, criterion = faccel.wrap(nn.Linear(4, 4), ctx), nn.Linear(4, 4)
    if is_wrapped:
        criterion = faccel.wrap(criterion, ctx)
    opt = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=RATE)
    x = torch.full((2, 4), ctx.rank + 1.0)
    loss = criterion(model(x)).square().sum()
    scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    faccel.optimizer_step(opt, scaler, ctx)
    return [full(param) for param in (*model.parameters(), *criterion.parameters())]


def a_criterion_with_parameters(folder, world):
    """The step raises; a wrapped criterion trains as on one process."""
    if WORLDS[world].size > 1:
        with pytest.raises(OptimizerError, match="parameter 2 of group 0") as caught:
            WORLDS[world].run(train_criterion, False)
        assert "criterion = faccel.wrap(criterion, ctx)" in caught.value.fix
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 4), nn.Linear(4, 4)
    num_ranks = WORLDS[world].size
    losses = [
        criterion(model(torch.full((2, 4), rank + 1.0))).square().sum() for rank in range(num_ranks)
    ]
    (sum(losses) / num_ranks).backward()
    params = (*model.parameters(), *criterion.parameters())
    expected = [(param - RATE * param.grad).detach() for param in params]
    check_same(WORLDS[world].run(train_criterion, True), expected, 1e-4)


# eval_on_main_only, helper_on_main


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(self.linear(x))

    def num_parameters(self):
        return sum(param.numel() for param in self.parameters())


def chunk(update, rank, num_ranks):
    generator = faccel.random.generator(6, update)
    return torch.randn(12, 4, generator=generator, dtype=torch.float64).chunk(num_ranks)[rank]


X = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(4, 4)


def evaluated(net):
    net.eval()
    with torch.no_grad():
        output = net(X)
    net.train()
    return output


def evaluate_on_one_rank(ctx, rank):
    model = faccel.wrap(Norm().double(), ctx)
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler, outputs = faccel.init_scaler(ctx), []
    for update in range(3):
        x = chunk(update, ctx.data_rank, ctx.data_world_size)
        scaler = faccel.scaled_backward(model(x).square().sum(), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        if ctx.rank == rank:
            outputs.append(evaluated(model))
    return outputs


def plain_replicas(num_ranks):
    """Replicas of plain torch: each has its own batch, and the buffers of rank 0."""
    nets = [Norm().double() for _ in range(num_ranks)]
    outputs = []
    for update in range(3):
        for rank, net in enumerate(nets):
            net.zero_grad()
            net(chunk(update, rank, num_ranks)).square().sum().backward()
        grads = zip(*([param.grad for param in net.parameters()] for net in nets), strict=True)
        with torch.no_grad():
            for param, ranks in zip(nets[0].parameters(), grads, strict=True):
                param -= RATE * sum(ranks) / num_ranks
        nets = [copy.deepcopy(nets[0]) for _ in nets]
        outputs.append(evaluated(nets[0]))
    return outputs


def an_evaluation_on_one_rank(folder, world, rank):
    """It is local: the other ranks do not wait, and its outputs are those of plain replicas."""
    rank = int(rank.removeprefix("rank "))
    ranks = WORLDS[world].run(evaluate_on_one_rank, rank)
    expected = plain_replicas(WORLDS[world].size)
    torch.testing.assert_close(ranks[rank], expected, rtol=0, atol=1e-9)


def call_on_main(ctx, name):
    model = faccel.wrap(Norm(), ctx)
    result = None
    for update in range(3):
        if ctx.is_main and update == 1:
            result = getattr(model, name)()
        x = chunk(update, ctx.data_rank, ctx.data_world_size).float()
        faccel.scaled_backward(model(x).square().sum(), faccel.init_scaler(ctx), ctx)
    return result


# The weights of a linear layer and a norm; `eval` and `train` return the module.
MODULE_METHODS = {"num_parameters": 4 * 4 + 4 + 4 + 4, "eval": None, "train": None}


def a_method_on_the_main_rank(folder, world, name):
    """A method that needs no values of other ranks is local."""
    result = WORLDS[world].run(call_on_main, name)[0]
    expected = MODULE_METHODS[name]
    assert expected is None or result == expected


# save_on_main_only


def save(state, folder, ctx, step):
    faccel.save(state, folder, ctx, step=step)


def export(state, folder, ctx, step):
    faccel.checkpoint.export_model(state["model"], folder, ctx)


def reduce(state, folder, ctx, step):
    faccel.reduce(torch.ones(1), ctx)


def barrier(state, folder, ctx, step):
    faccel.barrier(ctx)


COLLECTIVE = {fn.__name__: fn for fn in (save, export, reduce, barrier)}


def call_collective_on_main(ctx, name, folder):
    model = faccel.wrap(nn.Linear(2, 1), ctx)
    opt = torch.optim.SGD(model.parameters(), 0.1)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler = faccel.init_scaler(ctx)
    for step in range(1, 4):
        scaler = faccel.scaled_backward(model(torch.ones(2, 2)).sum(), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
        if ctx.is_main:
            COLLECTIVE[name]({"model": model, "opt": opt}, folder, ctx, step)


def a_collective_on_the_main_rank(folder, world, name, mode):
    """Every rank raises, and the error names the call site of each rank."""
    with pytest.raises(DesyncError) as caught:
        WORLDS[world].run(call_collective_on_main, name, str(folder), debug=mode == "debug")
    assert re.search(r"rank 0: .*, ranks? 1(: | to 2: )", caught.value.got), caught.value.got
    assert caught.value.got.count("tests/cases/replicas.py:") >= 2


# sync_backward_only


def by_hand(loss, scaler, ctx):
    loss.backward()
    return scaler


def step_by_hand(opt, scaler, ctx):
    opt.step()


BACKWARDS = {"scaled_backward": faccel.scaled_backward, "loss.backward": by_hand}
STEPS = {"scaled_backward": faccel.optimizer_step, "loss.backward": step_by_hand}


def reduce_in_the_last_backward(ctx, backward):
    torch.manual_seed(0)
    model = faccel.wrap(nn.Linear(1, 1), ctx)
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    x = torch.full((2, 1), ctx.data_rank + 1.0)
    scaler = faccel.init_scaler(ctx)
    with faccel.grad_sync(model, on=False):
        losses = [model(x).sum() for _ in range(2)]
        scaler = BACKWARDS[backward](losses[0], scaler, ctx)
    with faccel.grad_sync(model, on=True):  # the last one: reduce now
        scaler = BACKWARDS[backward](losses[1], scaler, ctx)
    grad = full(model.weight.grad).item()
    STEPS[backward](opt, scaler, ctx)
    return grad, full(model.weight).item()


def forwards_before_the_last_backward(folder, world, backward):
    """The sum of two losses over two rows of `rank + 1`, averaged over ranks."""
    ranks = WORLDS[world].run(reduce_in_the_last_backward, backward)
    num_ranks = WORLDS[world].size
    grad = 4 * (num_ranks + 1) / 2
    torch.manual_seed(0)
    weight = nn.Linear(1, 1).weight.item() - RATE * grad
    assert ranks == [(pytest.approx(grad), pytest.approx(weight))] * num_ranks


# two_backwards


def without_sync(model, loss):
    with faccel.grad_sync(model, on=False):
        loss.backward(retain_graph=True)


FIRST_BACKWARDS = {
    "retain_graph": lambda model, loss, scaler, ctx: faccel.scaled_backward(
        loss, scaler, ctx, retain_graph=True
    ),
    "by hand": lambda model, loss, scaler, ctx: loss.backward(retain_graph=True),
    "by hand, grad_sync off": lambda model, loss, scaler, ctx: without_sync(model, loss),
}


def two_losses(out):
    return out[:, 0].square().mean(), out[:, 1].square().mean()


def backward_twice(ctx, first):
    torch.manual_seed(0)
    model = faccel.wrap(nn.Linear(4, 2).double(), ctx)
    opt = torch.optim.SGD(model.parameters(), lr=RATE)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler = faccel.init_scaler(ctx)
    for update in range(2):
        a, b = two_losses(model(chunk(update, ctx.data_rank, ctx.data_world_size)))
        FIRST_BACKWARDS[first](model, a, scaler, ctx)
        scaler = faccel.scaled_backward(b, scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    return [full(param) for param in model.parameters()]


def two_backwards_over_one_forward(folder, world, first):
    """The gradients of both losses add up, as on one process."""
    torch.manual_seed(0)
    net = nn.Linear(4, 2).double()
    opt = torch.optim.SGD(net.parameters(), lr=RATE)
    for update in range(2):
        opt.zero_grad()
        sum(two_losses(net(chunk(update, 0, 1)))).backward()
        opt.step()
    check_same(WORLDS[world].run(backward_twice, first), list(net.parameters()))


# unscale


def clip_by_hand(model, opt, scaler, ctx):
    nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type=math.inf)
    return faccel.optimizer_step(opt, scaler, ctx)


def clip_in_step(model, opt, scaler, ctx):
    return faccel.optimizer_step(opt, scaler, ctx, clip_norm=0.1, norm_type=math.inf)


CLIPS = {"by hand": clip_by_hand, "clip_norm": clip_in_step}


def clip_in_fp16(ctx, clip):
    torch.manual_seed(0)
    net = nn.Linear(4, 4)
    before = net.weight.detach().clone()
    model = faccel.wrap(net, ctx)
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    loss = model(torch.ones(2, 4)).mean()
    scaler = faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    scaler = faccel.unscale(opt, scaler, ctx)
    norm = faccel.grad_norm(model.parameters(), ctx, norm_type=math.inf).item()
    CLIPS[clip](model, opt, scaler, ctx)
    return norm, (full(net.weight) - before).abs().max().item()


def unscaled_gradients(folder, world, clip):
    """They are those of `mean(W x + b)`, 1/4 each; clipped to 0.1, SGD moves by 0.1."""
    ranks = WORLDS[world].run(clip_in_fp16, clip, mixed_precision="fp16")
    assert ranks == [(pytest.approx(0.25), pytest.approx(0.1, rel=1e-4))] * len(ranks)


# sparse_simulated


def sparse_sum(ctx):
    x = torch.sparse_coo_tensor([[ctx.rank, 3]], torch.tensor([1.0, 10.0]), (5,))
    dist.all_reduce(x)
    return x.to_dense().tolist()


def sparse_gradient(ctx):
    table = nn.Embedding(4, 1, sparse=True)
    model = faccel.wrap(table, ctx)
    loss = model(torch.tensor([ctx.rank, 3])).sum()
    faccel.scaled_backward(loss, faccel.init_scaler(ctx), ctx)
    return table.weight.grad.to_dense().flatten().tolist()


SPARSE = {
    "all_reduce": (sparse_sum, [1.0, 1.0, 0.0, 20.0, 0.0]),
    "gradients": (sparse_gradient, [0.5, 0.5, 0.0, 1.0]),
}


def sparse_tensors(folder, world, call):
    """A simulated world computes what gloo does."""
    fn, expected = SPARSE[call]
    assert WORLDS[world].run(fn) == [expected] * 2
