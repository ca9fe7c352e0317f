"""bf16 and fp16 compute what autocast computes on one process, whatever the mesh."""

import torch
import torch.nn.functional as F
from torch import nn

import faccel
from tests.cases.worlds import WORLDS, full

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 256.0


class Times(nn.Module):
    """A head in fp32, and times or positions of which bf16 would lose digits."""

    def __init__(self, *, has_block):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.has_block, self.times = has_block, []

    def forward(self, t):
        self.times.append(t.tolist())
        x = self.linear((t[:, None] * torch.arange(4) * 0.01).sin())
        if not self.has_block:
            return self.head(x)
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


class Positions(nn.Module):
    """A table of positions, as a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(8, 4), nn.Linear(4, 1)
        self.register_buffer("table", torch.randn(8, 4))

    def forward(self, tokens):
        return self.out(self.embed(tokens) + self.table)


class Blur(nn.Module):
    """A constant kernel, as a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(1, 1, 3)
        self.register_buffer("kernel", torch.ones(1, 1, 3) / 3)

    def forward(self, x):
        return F.conv1d(self.conv(x), self.kernel)


def batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


TIMES = torch.tensor([998.39, 1.37])  # 998.39 is 1000 in bf16
NETS = {
    "float inputs": (lambda: Times(has_block=False), TIMES),
    "a block in fp32": (lambda: Times(has_block=True), TIMES),
    "positions": (Positions, torch.arange(8)[None]),
    "kernel": (Blur, torch.linspace(-1, 1, 9).reshape(1, 1, 9)),
    "batch norm": (batch_norm, torch.linspace(-1, 1, 16).reshape(4, 4)),
}
FSDP = faccel.parallel.FsdpConfig(fp32_units=("1",))
PLANS = {
    "default": faccel.Plan(),
    "fp32_units": faccel.Plan(units=("BatchNorm1d",), fsdp=FSDP),
    "fp32_units of all": faccel.Plan(units=("BatchNorm1d", "Linear"), fsdp=FSDP),
}


def compute(ctx, name, plan):
    make, x = NETS[name]
    net = make()
    model = faccel.wrap(net, ctx, plan=PLANS[plan])
    scaler = faccel.ScalerState(enabled=True, scale=SCALE)
    out = model(x)
    faccel.scaled_backward(out.square().mean(), scaler, ctx)
    grads = {name: full(param.grad) / SCALE for name, param in model.named_parameters()}
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    return out.detach(), grads, buffers, getattr(net, "times", None)


def low_precision(folder, world, name, precision, plan):
    """Outputs and gradients are autocast's; inputs and buffers keep their dtype."""
    make, x = NETS[name]
    net = make()
    dtypes = {name: buffer.dtype for name, buffer in net.named_buffers()}
    with torch.autocast("cpu", dtype=DTYPES[precision]):
        out = net(x).float()
    (out.square().mean() * SCALE).backward()
    expected = {name: param.grad / SCALE for name, param in net.named_parameters()}
    for rank_out, grads, buffers, times in WORLDS[world].run(
        compute, name, plan, mixed_precision=precision
    ):
        torch.testing.assert_close(rank_out, out.detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-5)
        assert buffers == dtypes
        assert times is None or times == [TIMES.tolist()]
