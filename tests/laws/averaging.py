"""A backend as a third party would write it: averages each gradient as soon as it is complete."""

from contextlib import contextmanager

import torch

import faccel
from faccel.backends.table import Backend
from faccel.protocols import Parallelism


class Averaging(torch.nn.Module):
    """The user's module, whose gradients are averaged over the data ranks while `syncs` is True."""

    def __init__(self, module, ctx):
        super().__init__()
        self.module, self.syncs = module, True
        for p in module.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: self.average(p, ctx))

    def average(self, p, ctx):
        if self.syncs:
            p.grad = faccel.reduce(p.grad, ctx, op="mean")


def wrap(module, plan, ctx):
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(faccel.broadcast(tensor.detach(), ctx, axis="data"))

    def run(method, *args, **kwargs):
        return (
            module(*args, **kwargs)
            if method == "forward"
            else getattr(module, method)(*args, **kwargs)
        )

    return Averaging(module, ctx), run


@contextmanager
def grad_sync(engine, *, on):
    before, engine.syncs = engine.syncs, on
    try:
        yield
    finally:
        engine.syncs = before


def sync_buffers(engine, ctx):
    for buffer in engine.buffers():
        buffer.copy_(faccel.broadcast(buffer, ctx, axis="data"))


BACKEND = Backend(
    parallelism=Parallelism(
        "averaging", wrap, lambda opt, engine, ctx: opt, grad_sync, sync_buffers
    ),
    serves=lambda spec: spec.size == spec.dp_replicate,
    probe=lambda env: None,
    tested_on="CPU",
)
