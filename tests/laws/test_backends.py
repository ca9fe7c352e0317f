"""The laws of running a model, run on every row of the table of backends, and on one that a third party wrote."""

import functools

import pytest
import torch
from torch import nn

import faccel
from faccel.backends import BACKENDS, use
from faccel.errors import ModelError
from faccel.testing import simulate
from tests.laws.averaging import BACKEND
from tests.ranks import run_ranks

PLAN = faccel.Plan(
    units="Layer",
    tensor={"layers.*.up": "colwise", "layers.*.down": "rowwise"},
    pipeline=faccel.Pipeline(chain=("first", "layers.*", "last")),
)
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own advice on layouts


def with_averaging(law, ctx):
    return law(use(ctx, BACKEND))


def averaging(law):
    return functools.partial(with_averaging, law)


WORLDS = {
    "single": ("single", lambda law: simulate(law, 1)),
    "ddp-2": ("ddp", lambda law: simulate(law, 2)),
    "ddp-gloo-2": ("ddp", lambda law: run_ranks(law, 2)),
    "fsdp-2": ("sharded", lambda law: simulate(law, 2, mesh="dp_shard=2")),
    "fsdp-gloo-2": ("sharded", lambda law: run_ranks(law, 2, mesh="dp_shard=2")),
    "hsdp-4": ("sharded", lambda law: simulate(law, 4, mesh="dp_replicate=2,dp_shard=2")),
    "tp-2": ("sharded", lambda law: simulate(law, 2, mesh="tp=2")),
    "tp-gloo-2": ("sharded", lambda law: run_ranks(law, 2, mesh="tp=2")),
    "fsdp-tp-4": ("sharded", lambda law: simulate(law, 4, mesh="dp_shard=2,tp=2")),
    "pp-2": ("pipeline", lambda law: simulate(law, 2, mesh="pp=2")),
    "pp-gloo-2": ("pipeline", lambda law: run_ranks(law, 2, mesh="pp=2")),
    "pp-fsdp-4": ("pipeline", lambda law: simulate(law, 4, mesh="pp=2,dp_shard=2")),
    "third-party-2": (None, lambda law: simulate(averaging(law), 2)),
    "third-party-gloo-2": (None, lambda law: run_ranks(averaging(law), 2)),
}
LAWS = []


def law(fn):
    LAWS.append(fn)
    return fn


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(4, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.last = nn.Linear(6, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)

    def doubled(self, x):
        return 2 * self(x)


def full(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def rows(update=0, count=16):
    return torch.randn(count, 4, generator=faccel.fold_in(1, update), dtype=torch.float64)


def one_process(num_updates, num_micro=4):
    """What plain torch makes of the same batches."""
    net = Net().double()
    opt = torch.optim.AdamW(net.parameters(), lr=0.1)
    for update in range(num_updates):
        net(rows(update)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return net


def train(ctx, wrapped, opt, num_updates, num_micro=4):
    scaler = faccel.init_scaler(ctx)
    for update in range(num_updates):
        loader = torch.utils.data.DataLoader(rows(update), 16 // num_micro // ctx.data_world_size)
        window = next(faccel.windows(faccel.shard(loader, ctx), ctx, size=num_micro))
        losses, scaler = faccel.pipeline_step(lambda f, x: f(x).square().mean(), wrapped, window, scaler, ctx)
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1e9)
        yield losses, info


@law
def training_equals_one_process(ctx):
    wrapped = faccel.wrap(Net(ctx.rank).double() if ctx.rank else Net().double(), ctx, plan=PLAN)
    opt = faccel.wrap_optimizer(torch.optim.AdamW(wrapped.parameters(), lr=0.1), wrapped, ctx)
    norms = [info.grad_norm for _, info in train(ctx, wrapped, opt, 3)]
    expected = dict(one_process(3).named_parameters())
    found = {name: full(p) for name, p in wrapped.named_parameters()}
    assert all((p - expected[name]).abs().max() < 1e-10 for name, p in found.items())
    assert all(norm.isfinite() for norm in norms)
    names = set(expected) if ctx.mesh.spec.pp == 1 else {n for part in faccel.gather_objects(
        list(found), ctx, axis="world") for n in part}  # fmt: skip
    assert names == set(expected)


@law
def the_norm_is_that_of_all_gradients(ctx):
    wrapped = faccel.wrap(Net().double(), ctx, plan=PLAN)
    opt = faccel.wrap_optimizer(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, ctx)
    ((losses, info),) = train(ctx, wrapped, opt, 1)
    net = Net().double()
    loss = net(rows()).square().mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
    assert abs(info.grad_norm - norm) < 1e-10
    assert abs(faccel.reduce(losses, ctx, op="mean").mean() - loss.detach()) < 1e-10


@law
def every_rank_starts_from_rank_0s_values_under_the_users_names(ctx):
    net = Net(ctx.rank)
    wrapped = faccel.wrap(net, ctx, plan=PLAN)
    expected = Net(0).state_dict()
    state = {name: full(value) for name, value in wrapped.state_dict().items()}
    assert faccel.unwrap(wrapped) is net
    assert set(state) <= set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@law
def evaluation_is_that_of_the_whole_model_on_every_rank(ctx):
    wrapped = faccel.wrap(Net(ctx.rank), ctx, plan=PLAN).eval()
    with torch.no_grad():
        out = wrapped(rows().float())
    assert (out - Net(0)(rows().float())).abs().max() < 1e-5


@law
def micro_batches_without_sync_are_not_reduced(ctx):
    wrapped = faccel.wrap(Net().double(), ctx, plan=PLAN)
    if ctx.mesh.spec.pp > 1:
        with pytest.raises(ModelError), faccel.grad_sync(wrapped, on=False):
            pass
        return
    parts = rows().chunk(2 * ctx.data_world_size)
    scaler = faccel.init_scaler(ctx)
    for number in range(2):
        with faccel.grad_sync(wrapped, on=number == 1):
            loss = wrapped(parts[2 * ctx.data_rank + number]).square().mean()
            scaler = faccel.scaled_backward(loss, scaler, ctx, scale=0.5)
    net = Net().double()
    net(rows()).square().mean().backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    assert all((full(p.grad) - expected[name]).abs().max() < 1e-10 for name, p in wrapped.named_parameters())


@law
def other_methods_run_like_forward(ctx):
    wrapped = faccel.wrap(Net(), ctx, plan=PLAN)
    if ctx.mesh.spec.pp > 1:
        with pytest.raises(ModelError):
            wrapped.call("doubled", rows().float())
        return
    with torch.no_grad():
        out = wrapped.call("doubled", rows().float())
    assert (out - 2 * Net()(rows().float())).abs().max() < 1e-5


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("law", LAWS, ids=lambda fn: fn.__name__)
def test_law(law, world):
    name, run = WORLDS[world]
    assert name is None or BACKENDS[name].probe({}) is None
    run(law)


def test_every_row_that_can_run_here_is_tested():
    assert {name for name, _ in WORLDS.values() if name} == {n for n, row in BACKENDS.items() if row.probe({}) is None}
