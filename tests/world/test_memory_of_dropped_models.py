"""What a script drops is freed: the context and the engines keep no reference to it."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel import device_table
from faccel.errors import ConfigError
from faccel.parallel import DdpConfig, PipelineConfig
from faccel.testing import fake_context, simulate

ROWS = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
ZERO1 = faccel.Plan(ddp=DdpConfig(shard_optimizer=True))
TENSOR = faccel.Plan(tensor={"0": "colwise", "2": "rowwise"})
PIPELINE = faccel.Plan(pipeline=PipelineConfig(chain=("0", "1", "2")))
LAYOUTS = {
    "one process": (1, None, None),
    "DDP": (2, "dp_replicate=2", None),
    "ZeRO-1": (2, "dp_replicate=2", ZERO1),
    "FSDP2": (2, "dp_shard=2", None),
    "tensor parallel": (2, "tp=2", TENSOR),
    "pipeline": (2, "pp=2", PIPELINE),
    "compiled": (1, None, faccel.Plan(compile=faccel.parallel.Compile(backend="eager"))),
}
FAST = ("one process", "FSDP2")


def loss_fn(model, batch):
    return (model(batch.data) - batch.data).square().mean()


def train(ctx, plan):
    """Train a step and return weak references to what takes memory."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    model = faccel.wrap(net, ctx, plan=plan)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    opt = faccel.wrap_optimizer(opt, model, ctx)
    scaler = faccel.init_scaler(ctx)
    loader = faccel.shard(DataLoader(ROWS, batch_size=4), ctx)
    for window in faccel.windows(loader, ctx, size=2):
        _, scaler = faccel.forward_backward(loss_fn, model, window, scaler, ctx)
    faccel.optimizer_step(opt, scaler, ctx)
    inner = getattr(opt, "optim", opt)  # ZeRO-1's own has the states
    states = [value for entry in inner.state.values() for value in entry.values()]
    params = list(model.parameters())
    return [weakref.ref(owner) for owner in (model, net, opt, *params, *states)]


def train_and_free(ctx, plan):
    references = train(ctx, plan)
    assert len(references) > 3
    faccel.parallel.free_memory(ctx)
    alive = [type(reference()).__name__ for reference in references if reference() is not None]
    assert not alive, alive
    return ctx.lifetime.models()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize(
    "layout",
    # Each collects the garbage of this process, which takes seconds after other tests.
    [
        layout if layout in FAST else pytest.param(layout, marks=pytest.mark.slow)
        for layout in LAYOUTS
    ],
)
def test_what_a_script_drops_is_freed_in_every_layout(layout):
    num_ranks, mesh, plan = LAYOUTS[layout]
    for models in simulate(train_and_free, num_ranks, plan, mesh=mesh):
        assert models == []


def test_a_call_needs_the_context():
    for call in (faccel.parallel.empty_cache, faccel.parallel.free_memory):
        with pytest.raises(ConfigError, match="DistContext"):
            call(None)


def test_the_host_has_no_cache():
    faccel.parallel.empty_cache(fake_context(0, 1))


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_other_devices_use_the_function_of_their_module(device):
    # Without such a device it is called and does nothing; `torch.accelerator`'s would raise.
    device_table.empty_cache(torch.device(device, 0))
