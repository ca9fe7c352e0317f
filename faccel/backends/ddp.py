"""Replicas with averaged gradients: torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from faccel.backends.forward import Methods, call_method, with_precision
from faccel.comm.tensors import broadcast
from faccel.context import DistContext
from faccel.protocols import DATA, Parallelism, Run


def _wrap(module: nn.Module, ctx: DistContext) -> tuple[nn.Module, Run]:
    if not any(p.requires_grad for p in module.parameters()):
        return _wrap_frozen(module, ctx)
    engine = DistributedDataParallel(Methods(module), process_group=ctx.comm.group(DATA), gradient_as_bucket_view=True)

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        # Without gradients nothing is to be reduced, and torch would still broadcast buffers: ranks may evaluate
        # different numbers of batches.
        if torch.is_grad_enabled():
            return engine(method, *args, **kwargs)
        return call_method(module, method, *args, **kwargs)

    return engine, with_precision(run, ctx)


def _wrap_frozen(module: nn.Module, ctx: DistContext) -> tuple[nn.Module, Run]:
    """Share rank 0's values of a model that DDP refuses because nothing in it is trained."""
    mine = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in broadcast(mine, ctx, axis=DATA).items():
            mine[name].copy_(value)

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        return call_method(module, method, *args, **kwargs)

    return module, with_precision(run, ctx)


def _wrap_optimizer(opt: Optimizer, engine: nn.Module, ctx: DistContext) -> Optimizer:
    return opt


@contextmanager
def _sync(engine: nn.Module, on: bool) -> Generator[None]:  # noqa: FBT001 (Parallelism.sync)
    before = getattr(engine, "require_backward_grad_sync", on)
    engine.require_backward_grad_sync = on  # type: ignore[assignment]
    try:
        yield
    finally:
        engine.require_backward_grad_sync = before  # type: ignore[assignment]


DDP = Parallelism("ddp", _wrap, _wrap_optimizer, _sync)
