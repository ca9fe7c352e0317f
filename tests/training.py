"""A training loop for the small language model on any mesh, and its comparison with one process."""

import attrs
import torch
from torch.utils.data import DataLoader

import faccel
from tests.models import TENSOR, loss_of, model, tokens

CHAIN = ("embed", "blocks.*", "norm", "head")
TIED = {"head.weight": "embed.token.weight"}


class RaisesInBackward(torch.autograd.Function):
    """Returns a copy of a tensor; its backward raises `error`."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


@attrs.frozen(eq=False)
class Trained:
    losses: list
    norms: list
    grads: list
    params: dict


def train(
    ctx,
    plan=None,
    *,
    dtype=torch.float64,
    accum=4,
    rows=16,
    steps=2,
    tied=True,
    foreach=None,
    lr=0.01,
):
    """Train `steps` windows; the batch of a window is the same whatever the mesh."""
    wrapped = faccel.wrap(model(dtype, tied=tied), ctx, plan=plan)
    opt = torch.optim.AdamW(wrapped.parameters(), lr=lr, foreach=foreach)
    opt = faccel.wrap_optimizer(opt, wrapped, ctx)
    scaler = faccel.init_scaler(ctx)
    data = torch.cat([tokens(rows, seed=i) for i in range(steps)])
    loader = faccel.shard(DataLoader(data, rows // accum // ctx.data_world_size), ctx)
    losses, norms, grads = [], [], []
    for window in faccel.windows(loader, ctx, size=accum):
        with faccel.parallel.context_parallel(ctx):
            window_losses, scaler = faccel.forward_backward(
                lambda net, batch: loss_fn(net, batch.data, ctx), wrapped, window, scaler, ctx
            )
        losses += faccel.reduce(window_losses, ctx, op="mean", axis="loss").tolist()
        grads.append(
            {name: full(p.grad) for name, p in wrapped.named_parameters() if p.grad is not None}
        )
        info, scaler = faccel.optimizer_step(opt, scaler, ctx, clip_norm=0.1)
        norms.append(info.grad_norm.item())
    return Trained(losses, norms, grads, {name: full(p) for name, p in wrapped.named_parameters()})


def loss_fn(net, batch, ctx):
    x, y = batch[:, :-1], batch[:, 1:]
    if ctx.mesh.spec.cp == 1:
        return loss_of(net(x), y)
    positions = torch.arange(x.shape[1]).expand_as(x)
    x, y, positions = faccel.parallel.split_sequence((x, y, positions), ctx)
    return loss_of(net(x.contiguous(), positions), y)


def plan_of(mesh, **options):
    cuts = {"tensor": TENSOR} if "tp=" in mesh else {}
    pipeline = {"pipeline": faccel.parallel.PipelineConfig(chain=CHAIN)} if "pp=" in mesh else {}
    return faccel.Plan(**{"units": "Block", **cuts, **pipeline, **options})


def differences(got, reference):
    """Return the largest differences of losses, norms, gradients and parameters."""

    def between(values, expected):
        assert {TIED.get(name, name) for name in values} <= set(expected)
        return max(
            (values[name] - expected.get(name, expected.get(TIED.get(name)))).abs().max().item()
            for name in values
        )

    def far(values, expected):
        return max(abs(a - b) for a, b in zip(values, expected, strict=True))

    grads = max(between(a, b) for a, b in zip(got.grads, reference.grads, strict=True))
    return {
        "losses": far(got.losses, reference.losses),
        "norms": far(got.norms, reference.norms),
        "grads": grads,
        "params": between(got.params, reference.params),
    }
