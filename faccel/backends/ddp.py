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
from faccel.errors import ModelError
from faccel.protocols import DATA, Parallelism, Run


def _wrap(module: nn.Module, ctx: DistContext) -> tuple[nn.Module, Run]:
    if not any(p.requires_grad for p in module.parameters()):
        return _wrap_frozen(module, ctx)
    engine = DistributedDataParallel(Methods(module), process_group=ctx.comm.group(DATA), gradient_as_bucket_view=True)

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        # Without gradients nothing is to be reduced, and torch would still broadcast buffers: ranks may evaluate
        # different numbers of batches.
        if torch.is_grad_enabled():
            try:
                return engine(method, *args, **kwargs)
            except RuntimeError as error:  # buffers are broadcast here
                failure = ctx.comm.failure(error, "forward", DATA)
                if failure is None:
                    raise
                raise failure from error
        return call_method(module, method, *args, **kwargs)

    return engine, with_precision(run, ctx)


def _wrap_frozen(module: nn.Module, ctx: DistContext) -> tuple[nn.Module, Run]:
    """Share rank 0's values of a model that DDP refuses because nothing in it is trained."""
    _take_rank_0s({**dict(module.named_parameters()), **dict(module.named_buffers())}, ctx)

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            raise ModelError(
                "this model was frozen when it was wrapped, so its gradients would not be reduced",
                saw="a parameter that requires gradients now",
                fix="call `requires_grad_(True)` before `faccel.wrap`",
            )
        return call_method(module, method, *args, **kwargs)

    return module, with_precision(run, ctx)


def _wrap_optimizer(opt: Optimizer, engine: nn.Module, ctx: DistContext) -> Optimizer:
    return opt


@contextmanager
def _sync(engine: nn.Module, on: bool) -> Generator[None]:  # noqa: FBT001 (Parallelism.sync)
    if not isinstance(engine, DistributedDataParallel):  # frozen: there is nothing to reduce
        yield
        return
    before = engine.require_backward_grad_sync
    engine.require_backward_grad_sync = on  # type: ignore[assignment]
    try:
        yield
    finally:
        engine.require_backward_grad_sync = before  # type: ignore[assignment]


def _take_rank_0s(values: dict[str, torch.Tensor], ctx: DistContext) -> None:
    with torch.no_grad():
        for name, value in broadcast(values, ctx, axis=DATA).items():
            values[name].copy_(value)


def _settle(engine: nn.Module, ctx: DistContext) -> None:
    buffers = dict(engine.named_buffers())
    if buffers and isinstance(engine, DistributedDataParallel):
        _take_rank_0s(buffers, ctx)


DDP = Parallelism("ddp", _wrap, _wrap_optimizer, _sync, _settle)
