"""Worlds of the cases, and the small model that most of them train.

A world is simulated, or its ranks are processes that communicate over gloo (`"gloo"` in its name).
"""

import attrs
import torch
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.testing import simulate
from tests.ranks import run_ranks

RATE = 0.1


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).tanh()


class Net(nn.Module):
    """Parameters of the root (`first`, `last`) and of units, which FSDP2 treats differently."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(4, 1)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


PLAN = faccel.Plan(
    units="Block",
    tensor={"blocks.0.linear": "colwise", "blocks.1.linear": "rowwise"},
    pipeline=faccel.parallel.PipelineConfig(chain=("first", "blocks.*", "last")),
)
ZERO_1 = faccel.Plan(ddp=faccel.parallel.DdpConfig(shard_optimizer=True))


@attrs.frozen
class World:
    """Ranks on a mesh, in one process or in a process each."""

    mesh: str
    plan: faccel.Plan = PLAN
    is_real: bool = False

    @property
    def size(self):
        return faccel.MeshSpec.of(self.mesh).size

    def run(self, fn, *args, **config):
        """Run `fn(ctx, *args)` on every rank; return the results by rank."""
        if self.is_real:
            return run_ranks(fn, self.size, *args, mesh=self.mesh, **config)
        return list(simulate(fn, self.size, *args, mesh=self.mesh, config=config))


WORLDS = {
    "single": World("dp_replicate=1"),
    "ddp": World("dp_replicate=2"),
    "ddp-3": World("dp_replicate=3"),
    "ddp-4": World("dp_replicate=4"),
    "zero-1": World("dp_replicate=2", ZERO_1),
    "fsdp": World("dp_shard=2"),
    "fsdp-root": World("dp_shard=2", faccel.Plan()),
    "hsdp": World("dp_replicate=2,dp_shard=2"),
    "tp": World("tp=2"),
    "fsdp-tp": World("dp_shard=2,tp=2"),
    "cp": World("cp=2"),
    "pp": World("pp=2"),
    "pp-fsdp": World("pp=2,dp_shard=2"),
    "ddp-gloo": World("dp_replicate=2", is_real=True),
    "fsdp-gloo": World("dp_shard=2", is_real=True),
}
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=RATE),
    "momentum": lambda params: torch.optim.SGD(params, lr=RATE, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=RATE),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=RATE),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=RATE),
}


def rows(update=0):
    """Return the global batch of an update."""
    generator = faccel.random.generator(5, update)
    return torch.randn(16, 4, generator=generator, dtype=torch.float64)


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def values(model):
    """Return the parameters that this rank has a part of, unsharded."""
    names = {name for name, _ in model.named_parameters()}
    state = model.state_dict()
    return {name: full(value) for name, value in state.items() if name in names}


def square(model, x):
    return model(x).square().mean()


def square_of_batch(model, batch):
    return square(model, batch.data)


def build(ctx, plan, optimizer):
    model = faccel.wrap(Net().double(), ctx, plan=plan)
    opt = OPTIMIZERS[optimizer](model.parameters())
    return model, faccel.wrap_optimizer(opt, model, ctx)


def backward(ctx, model, scaler, update):
    """Compute the gradients of a global batch in two micro-batches; pipelines do it as well."""
    loader = faccel.shard(DataLoader(rows(update), 8 // ctx.data_world_size), ctx)
    window = next(faccel.windows(loader, ctx, size=2))
    _, scaler = faccel.forward_backward(square_of_batch, model, window, scaler, ctx)
    return scaler


def plain_net(optimizer, num_updates, *, prepare=None):
    """Train in plain torch on one process; return the module and the norms of its gradients."""
    net = Net().double()
    if prepare is not None:
        prepare(net)
    opt = OPTIMIZERS[optimizer](net.parameters())
    norms = []
    for update in range(num_updates):
        opt.zero_grad()
        square(net, rows(update)).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in net.parameters()]).item())
        opt.step()
    return net, norms


def check_values(ranks, net, atol=1e-9):
    """Compare the parameters of all ranks with those of a plain module."""
    expected = {name: param.detach() for name, param in net.named_parameters()}
    assert set().union(*ranks) == set(expected)
    for params in ranks:
        for name, value in params.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)
