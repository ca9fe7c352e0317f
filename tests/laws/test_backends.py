"""The laws of running a model, on every row of the table of backends and on a third-party one."""

import functools
import os

import pytest
import torch
from torch import nn

import faccel
from faccel.backends.table import BACKENDS, use
from faccel.errors import ModelError, OptimizerError
from faccel.testing import simulate
from tests.laws.averaging import BACKEND
from tests.megatron_cpu import install
from tests.ranks import run_ranks

PLAN = faccel.Plan(
    units="Layer",
    tensor={"layers.*.up": "colwise", "layers.*.down": "rowwise"},
    pipeline=faccel.parallel.PipelineConfig(chain=("first", "layers.*", "last")),
)
pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's advice on layouts


def with_averaging(law, ctx):
    return law(use(ctx, BACKEND))


def averaging(law):
    return functools.partial(with_averaging, law)


def zero(stage):
    return lambda law: run_ranks(law, 2, strategy="deepspeed", zero=stage)


def megatron(law):
    return run_ranks(law, 2, strategy="megatron", device="cpu", before=install)


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
    "zero-1-gloo-2": ("deepspeed", zero(1)),
    "zero-2-gloo-2": ("deepspeed", zero(2)),
    "zero-3-gloo-2": ("deepspeed", zero(3)),
    "megatron-gloo-2": ("megatron", megatron),
    "third-party-2": (None, lambda law: simulate(averaging(law), 2)),
    "third-party-gloo-2": (None, lambda law: run_ranks(averaging(law), 2)),
}
# Engines of other libraries, which take seconds to start and compute in fp32.
SLOW_ENGINES = ("deepspeed", "megatron")
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


def net_of(ctx, seed=0):
    """The net, under Megatron-core as a module of its class, which has a configuration."""
    if ctx.parallelism.name != "megatron":
        return Net(seed)
    from megatron.core.enums import ModelType
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    class MegatronNet(Net, MegatronModule):
        def __init__(self):
            options = {"gradient_accumulation_fusion": False, "use_cpu_initialization": True}
            config = TransformerConfig(
                num_layers=2, hidden_size=8, num_attention_heads=1, **options
            )
            MegatronModule.__init__(self, config)
            self.__dict__.update(vars(Net(seed)))
            self.config, self.model_type = config, ModelType.encoder_or_decoder

        def set_input_tensor(self, tensors):
            """Do nothing: there is no stage before this one."""

    return MegatronNet()


def wrapped_net(ctx, net):
    """Megatron-core shards modules where they are built, and takes no plan."""
    return faccel.wrap(net, ctx, plan=None if ctx.parallelism.name == "megatron" else PLAN)


def dtype_of(ctx):
    """fp64, so that equal means equal, where the engine has it."""
    return torch.float64 if ctx.parallelism.name not in SLOW_ENGINES else torch.float32


def near_of(ctx):
    return 1e-10 if dtype_of(ctx) == torch.float64 else 1e-5


def weights(wrapped):
    """The parameters that this rank has a part of, whole."""
    names = {name for name, _ in wrapped.named_parameters()}
    return {name: full(value) for name, value in wrapped.state_dict().items() if name in names}


def full(x):
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()


def rows(update=0, count=16):
    return torch.randn(count, 4, generator=faccel.random.generator(1, update), dtype=torch.float64)


def one_process(num_updates, dtype=torch.float64):
    """What plain torch makes of the same batches."""
    net = Net().to(dtype)
    opt = torch.optim.AdamW(net.parameters(), lr=0.1)
    for update in range(num_updates):
        net(rows(update).to(dtype)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return net


def train(ctx, wrapped, opt, num_updates, num_micro_batches=4):
    scaler = faccel.init_scaler(ctx)
    for update in range(num_updates):
        loader = torch.utils.data.DataLoader(
            rows(update).to(dtype_of(ctx)), 16 // num_micro_batches // ctx.data_world_size
        )
        window = next(faccel.windows(faccel.shard(loader, ctx), ctx, size=num_micro_batches))
        losses, scaler = faccel.forward_backward(
            lambda f, batch: f(batch.data).square().mean(), wrapped, window, scaler, ctx
        )
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=1e9)
        yield losses, info


@law
def training_equals_one_process(ctx):
    wrapped = wrapped_net(ctx, net_of(ctx, ctx.rank).to(dtype_of(ctx)))
    opt = faccel.wrap_optimizer(torch.optim.AdamW(wrapped.parameters(), lr=0.1), wrapped, ctx)
    norms = [info.grad_norm for _, info in train(ctx, wrapped, opt, 3)]
    trained = one_process(3, dtype_of(ctx))
    expected = dict(trained.named_parameters())
    trained_weights = weights(wrapped)
    assert all(
        (p - expected[name]).abs().max() < near_of(ctx) for name, p in trained_weights.items()
    )
    with torch.no_grad():
        out = wrapped.eval()(rows().to(dtype_of(ctx)))
    assert (out - trained(rows().to(dtype_of(ctx)))).abs().max() < near_of(ctx)
    assert all(norm.isfinite() for norm in norms)
    names = set(expected)
    if ctx.mesh.spec.pp > 1:
        names = set().union(*faccel.gather_objects(list(trained_weights), ctx, axis="world"))
    assert names == set(expected)


@law
def a_group_that_is_added_after_wrap_optimizer_trains_or_raises(ctx):
    wrapped = wrapped_net(ctx, net_of(ctx).to(dtype_of(ctx)))
    net = Net().to(dtype_of(ctx))
    matrices, vectors = by_dims(wrapped.parameters())
    if ctx.parallelism.name in SLOW_ENGINES:
        opt = torch.optim.AdamW(wrapped.parameters(), lr=0.1)
        opt = faccel.wrap_optimizer(opt, wrapped, ctx)
        with pytest.raises(OptimizerError, match="`add_param_group` is unsupported under"):
            opt.add_param_group({"params": vectors, "lr": 0.05})
        list(train(ctx, wrapped, opt, 1))
        # A group that the method has not seen is found by the step, before it moves anything.
        opt.param_groups.append(dict(opt.param_groups[0]))
        with pytest.raises(OptimizerError, match="`add_param_group` is unsupported under"):
            list(train(ctx, wrapped, opt, 1))
        trained = one_process(1, dtype_of(ctx))
    else:
        opt = faccel.wrap_optimizer(torch.optim.AdamW(matrices, lr=0.1), wrapped, ctx)
        list(train(ctx, wrapped, opt, 1))
        # As on one process, `opt` has left the gradients of the others.
        for param in vectors:
            param.grad = None
        opt.add_param_group({"params": vectors, "lr": 0.05})
        list(train(ctx, wrapped, opt, 2))
        trained = one_process_with_a_new_group(net)
    expected = dict(trained.named_parameters())
    assert all(
        (p - expected[name]).abs().max() < near_of(ctx) for name, p in weights(wrapped).items()
    )


def by_dims(params):
    params = list(params)
    return [p for p in params if p.ndim == 2], [p for p in params if p.ndim == 1]


def one_process_with_a_new_group(net):
    """What plain torch makes of one update of the matrices, and two of all parameters."""
    matrices, vectors = by_dims(net.parameters())
    opt = torch.optim.AdamW(matrices, lr=0.1)
    for update in (0, 0, 1):
        net(rows(update).to(matrices[0].dtype)).square().mean().backward()
        opt.step()
        net.zero_grad()
        if len(opt.param_groups) == 1:
            opt.add_param_group({"params": vectors, "lr": 0.05})
    return net


@law
def the_norm_is_of_all_gradients(ctx):
    wrapped = wrapped_net(ctx, net_of(ctx).to(dtype_of(ctx)))
    opt = faccel.wrap_optimizer(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, ctx)
    ((losses, info),) = train(ctx, wrapped, opt, 1)
    net = Net().double()
    loss = net(rows()).square().mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters()])
    assert abs(info.grad_norm - norm) < near_of(ctx)
    assert abs(faccel.reduce(losses, ctx, op="mean").mean() - loss.detach()) < near_of(ctx)


@law
def every_rank_starts_from_rank_0s_values_under_the_users_names(ctx):
    net = net_of(ctx, ctx.rank)
    wrapped = wrapped_net(ctx, net)
    expected = Net(0).state_dict()
    state = {name: full(value) for name, value in wrapped.state_dict().items()}
    assert faccel.unwrap(wrapped) is net
    assert set(state) <= set(expected)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@law
def evaluation_runs_the_full_model_on_every_rank(ctx):
    wrapped = wrapped_net(ctx, net_of(ctx, ctx.rank)).eval()
    with torch.no_grad():
        out = wrapped(rows().float())
    assert (out - Net(0)(rows().float())).abs().max() < 1e-5


@law
def micro_batches_without_sync_add_up_to_one_update(ctx):
    wrapped = wrapped_net(ctx, net_of(ctx).to(dtype_of(ctx)))
    if ctx.mesh.spec.pp > 1:
        with pytest.raises(ModelError), faccel.grad_sync(wrapped, on=False):
            pass
        return
    opt = faccel.wrap_optimizer(torch.optim.SGD(wrapped.parameters(), lr=1.0), wrapped, ctx)
    micro_batches = rows().to(dtype_of(ctx)).chunk(2 * ctx.data_world_size)
    scaler = faccel.init_scaler(ctx)
    for number in range(2):
        with faccel.grad_sync(wrapped, on=number == 1):
            loss = wrapped(micro_batches[2 * ctx.data_rank + number]).square().mean()
            scaler = faccel.scaled_backward(loss, scaler, ctx, scale=0.5)
    faccel.optimizer_step(opt, scaler, ctx)
    net = Net().double()
    net(rows()).square().mean().backward()
    expected = {name: p - p.grad for name, p in net.named_parameters()}
    assert all(
        (p - expected[name]).abs().max() < near_of(ctx) for name, p in weights(wrapped).items()
    )


@law
def gradients_that_are_cleared_take_no_part_in_the_next_update(ctx):
    wrapped = wrapped_net(ctx, net_of(ctx).to(dtype_of(ctx)))
    opt = faccel.wrap_optimizer(torch.optim.SGD(wrapped.parameters(), lr=1.0), wrapped, ctx)
    if ctx.mesh.spec.pp > 1:
        return
    scaler = faccel.init_scaler(ctx)
    for update in (1, 0):  # as a discriminator that the generator's loss went through
        opt.zero_grad()
        own_rows = rows(update).to(dtype_of(ctx)).chunk(ctx.data_world_size)[ctx.data_rank]
        scaler = faccel.scaled_backward(wrapped(own_rows).square().mean(), scaler, ctx)
    faccel.optimizer_step(opt, scaler, ctx)
    net = Net().double()
    net(rows(0)).square().mean().backward()
    expected = {name: p - p.grad for name, p in net.named_parameters()}
    assert all(
        (p - expected[name]).abs().max() < near_of(ctx) for name, p in weights(wrapped).items()
    )


@law
def other_methods_run_like_forward(ctx):
    wrapped = wrapped_net(ctx, net_of(ctx))
    if ctx.mesh.spec.pp > 1 or ctx.parallelism.name == "megatron":
        with pytest.raises(ModelError):
            wrapped.call("doubled", rows().float())
        return
    with torch.no_grad():
        out = wrapped.call("doubled", rows().float())
    assert (out - 2 * Net()(rows().float())).abs().max() < 1e-5


def all_laws(ctx):
    """One engine after the other in one process."""
    for law in LAWS:
        law(ctx)


SLOW_TO_START = {world for world, (name, _) in WORLDS.items() if name in SLOW_ENGINES}


@pytest.mark.parametrize("world", sorted(WORLDS.keys() - SLOW_TO_START))
@pytest.mark.parametrize("law", LAWS, ids=lambda fn: fn.__name__)
def test_law(law, world):
    check(world, law)


@pytest.mark.slow
@pytest.mark.parametrize("world", sorted(SLOW_TO_START))
def test_all_laws_of_a_world_that_is_slow_to_start(world):
    check(world, all_laws)


def check(world, law):
    name, run = WORLDS[world]
    reason = name and BACKENDS[name].probe(os.environ)
    if reason:
        pytest.skip(f"{name}: {reason}")
    run(law)


def test_every_row_of_the_table_is_tested():
    assert {name for name, _ in WORLDS.values() if name} == set(BACKENDS)
