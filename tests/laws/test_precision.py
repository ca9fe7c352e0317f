"""The precision law: bf16 and fp16 compute what autocast computes on one process, on every mesh."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import faccel
from faccel.errors import ModelError
from faccel.parallel import FsdpConfig
from faccel.testing import simulate
from tests.training import full

TIMES = (998.39, 1.37, 0.013, 250.6)  # 998.39 is 1000 in bf16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 256.0
MESHES = {
    "dp_replicate=2": 2,
    "dp_shard=2": 2,
    "dp_replicate=2,dp_shard=2": 4,
    "tp=2": 2,
    "dp_shard=2,tp=2": 4,
    "pp=2": 2,
    "pp=2,dp_shard=2": 4,
}
pytestmark = pytest.mark.filterwarnings("ignore")  # PyTorch's advice on layouts


class Front(nn.Module):
    """Takes fp32 inputs that bf16 would change, and adds a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.register_buffer("positions", torch.randn(4, 8))
        self.times = []

    def forward(self, x, t):
        self.times.append(t.tolist())
        waves = (t[:, None, None] * torch.arange(8) * 0.01).sin()
        return self.embed(x) + self.positions + waves


class Block(nn.Module):
    """A norm, two layers, a convolution with a constant kernel, and a block in fp32."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.exact = nn.Linear(8, 8)
        self.register_buffer("kernel", torch.ones(4, 1, 3) / 3)

    def forward(self, x):
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        x = x + F.conv1d(x, self.kernel, padding=1, groups=4)
        with torch.autocast("cpu", enabled=False):
            return self.exact(x.float())


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.norm(x.mean(1)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.front = Front()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = Head()

    def forward(self, x, t):
        return self.head(self.blocks(self.front(x, t)))


PLAN = faccel.Plan(
    units="Block",
    tensor={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"},
    pipeline=faccel.parallel.PipelineConfig(chain=("front", "blocks.*", "head")),
)


def data(rows):
    tokens = torch.randint(16, (rows, 4), generator=faccel.random.generator(0, 0))
    times = torch.tensor(TIMES).repeat(rows // len(TIMES))
    return [(tokens[i], times[i]) for i in range(rows)]


def loss_fn(model, batch):
    return model(*batch.data).square().mean()


def in_autocast(rows, dtype):
    """Losses and gradients of one process: plain torch, one micro-batch of 4 rows at a time."""
    net, losses = Net(), []
    for batch in DataLoader(data(rows), 4):
        with torch.autocast("cpu", dtype=dtype):
            out = net(*batch)
        loss = out.float().square().mean()
        (loss * SCALE * 4 / rows).backward()
        losses.append(loss.item())
    return losses, {name: param.grad / SCALE for name, param in net.named_parameters()}


def gradients(ctx, plan, rows):
    model = faccel.wrap(Net(), ctx, plan=plan)
    loader = faccel.shard(DataLoader(data(rows), 4), ctx)
    window = next(faccel.windows(loader, ctx, size=2))
    scaler = faccel.ScalerState(enabled=True, scale=SCALE)
    losses, _ = faccel.forward_backward(loss_fn, model, window, scaler, ctx)
    grads = {name: full(param.grad) / SCALE for name, param in model.named_parameters()}
    times = []
    if hasattr(model.module, "front") and hasattr(model.module.front, "times"):
        times = model.module.front.times
    return losses.tolist(), grads, times


def relative(grads, expected):
    """The largest distance, relative to all gradients: some are 0 in exact arithmetic."""
    norm = torch.stack([grad.norm() for grad in expected.values()]).norm()
    return max((grad - expected[name]).norm() / norm for name, grad in grads.items()).item()


def near_of(mesh, dtype):
    # Tensor parallel adds partial sums that are rounded already. The others compute the same.
    return 8 * torch.finfo(dtype).eps if "tp=" in mesh else 1e-5


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("precision", DTYPES)
def test_every_mesh_computes_what_autocast_computes_on_one_process(mesh, precision):
    num_data_ranks = faccel.MeshSpec.parse(mesh).data_world_size
    dtype = DTYPES[precision]
    losses, grads = in_autocast(8 * num_data_ranks, dtype)
    results = simulate(
        gradients, MESHES[mesh], PLAN, 8 * num_data_ranks, mesh=mesh,
        config={"mixed_precision": precision},
    )  # fmt: skip
    for rank_losses, rank_grads, times in results:
        assert rank_grads
        assert relative(rank_grads, grads) < near_of(mesh, dtype)
        assert set(map(tuple, times)) <= {tuple(torch.tensor(TIMES).tolist())}
        for loss in rank_losses:
            assert min(abs(loss - other) / other for other in losses) < near_of(mesh, dtype)


class Exact(nn.Module):
    """A unit that records the dtypes it computes with, around a unit of another precision."""

    def __init__(self):
        super().__init__()
        self.outer, self.inner, self.dtypes = nn.Linear(4, 4), nn.Linear(4, 4), []

    def forward(self, x):
        x = self.outer(x)
        self.dtypes.append((x.dtype, self.inner(x).dtype))
        if x.isnan().any():
            raise ValueError("not a number")
        return x


def dtypes_of_units(ctx, options):
    net = nn.Sequential(nn.Linear(4, 4), Exact(), nn.Linear(4, 4))
    plan = faccel.Plan(units=("0", "1", "1.inner"), fsdp=options)
    model = faccel.wrap(net, ctx, plan=plan)
    faccel.scaled_backward(model(torch.ones(2, 4)).sum(), faccel.init_scaler(ctx), ctx)
    with pytest.raises(ValueError, match="not a number"):
        model(torch.full((2, 4), torch.nan))
    return net[1].dtypes[0], torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("low_precision_params", [False, True])
@pytest.mark.parametrize(
    ("fp32_units", "expected"),
    [
        ("1", (torch.float32, torch.bfloat16)),
        (("1", "1.inner"), (torch.float32, torch.float32)),
        ("1.inner", (torch.bfloat16, torch.float32)),
        ((), (torch.bfloat16, torch.bfloat16)),
    ],
)
def test_units_in_fp32_compute_without_autocast_and_leave_it_as_it_was(
    fp32_units, expected, low_precision_params
):
    options = FsdpConfig(fp32_units=fp32_units, low_precision_params=low_precision_params)
    results = simulate(
        dtypes_of_units, 2, options, mesh="dp_shard=2", config={"mixed_precision": "bf16"}
    )
    assert list(results) == [(expected, False)] * 2


class LayerNorms(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


class Island(LayerNorms):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class NormAfterBuffer(LayerNorms):
    """A sum with an fp32 buffer is in fp32, and PyTorch's norm takes one dtype."""

    def forward(self, x):
        return self.b(self.norm(self.a(x) + torch.ones(16)))


ROWS = torch.randn(8, 8, generator=faccel.random.generator(0, 1))


def low_precision(ctx, make):
    plan = faccel.Plan(fsdp=FsdpConfig(low_precision_params=True))
    model = faccel.wrap(make(), ctx, plan=plan)
    out = model(ROWS)
    faccel.scaled_backward(out.square().mean(), faccel.init_scaler(ctx), ctx)
    return out.detach(), {name: full(param.grad) for name, param in model.named_parameters()}


def test_parameters_gathered_in_low_precision_compute_nearly_the_same():
    net = LayerNorms()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = net(ROWS).float()
    expected.square().mean().backward()
    grads = {name: param.grad for name, param in net.named_parameters()}
    for out, rank_grads in simulate(
        low_precision, 2, LayerNorms, mesh="dp_shard=2", config={"mixed_precision": "bf16"}
    ):
        assert torch.allclose(out, expected, atol=0.02)
        assert relative(rank_grads, grads) < 0.03


@pytest.mark.parametrize("make", [Island, NormAfterBuffer])
def test_two_dtypes_in_one_operation_raise_an_error_with_a_fix(make):
    with pytest.raises(ModelError, match="low_precision_params"):
        simulate(low_precision, 2, make, mesh="dp_shard=2", config={"mixed_precision": "bf16"})


def reduced_in(ctx, reduce_dtype):
    torch.manual_seed(0)
    plan = faccel.Plan(fsdp=FsdpConfig(reduce_dtype=reduce_dtype))
    model = faccel.wrap(torch.nn.Linear(64, 64, bias=False), ctx, plan=plan)
    rows = torch.linspace(-1, 1, 4 * 64).reshape(4, 64) * (ctx.rank + 1)
    faccel.scaled_backward(model(rows).square().mean(), faccel.init_scaler(ctx), ctx)
    return full(model.weight.grad)


def num_bytes(results):
    events = [event for event in results.trace if event.rank == 0]
    return sum(event.num_bytes for event in events if event.op == "reduce_scatter")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("reduce_dtype", ["bf16", "fp16"])
def test_gradients_are_reduced_in_the_dtype_of_the_plan(reduce_dtype, precision):
    config = {"mixed_precision": precision}
    exact = simulate(reduced_in, 2, "fp32", mesh="dp_shard=2", config=config)
    rounded = simulate(reduced_in, 2, reduce_dtype, mesh="dp_shard=2", config=config)
    assert num_bytes(exact) == 64 * 64 * 4
    assert num_bytes(rounded) == 64 * 64 * 2
    difference = (rounded[0] - exact[0]).abs().max() / exact[0].abs().max()
    assert 0 < difference < 2**-7  # the rounding of bf16
    default = simulate(reduced_in, 2, None, mesh="dp_shard=2", config=config)
    assert torch.equal(default[0], exact[0])
