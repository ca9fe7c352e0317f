"""One process: the user's module is its own engine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.optim import Optimizer

from faccel.context import DistContext
from faccel.mesh import DATA
from faccel.parallel.activation_checkpoint import checkpoint_and_compile
from faccel.parallel.forward import call_method, with_precision
from faccel.parallel.fp8 import fp8_layers
from faccel.parallel.layerwise_casting import store_layers
from faccel.parallel.materialize import has_meta, materialize
from faccel.parallel.transformer_engine import with_history
from faccel.plan import Plan
from faccel.protocols import Parallelism, RunMethod, Stateful


def _wrap(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    if has_meta(module):
        materialize(module, ctx, DATA)
    fp8_layers(module, plan, ctx).convert()
    checkpoint_and_compile(module, plan)
    store_layers(module, plan, ctx)
    return module, _run_of(module, plan, ctx)


def _run_of(module: nn.Module, plan: Plan, ctx: DistContext) -> RunMethod:
    run = functools.partial(call_method, module)
    return with_precision(with_history(run, module, plan, ctx), ctx)


def _wrap_optimizer(opt: Optimizer, engine: nn.Module, ctx: DistContext) -> Optimizer:
    return opt


def _grad_sync(engine: nn.Module, *, on: bool) -> AbstractContextManager[None]:
    # Backward of one process communicates nothing, so there is nothing to turn off.
    return nullcontext()


def _sync_buffers(engine: nn.Module, ctx: DistContext) -> None:
    pass  # one process has no other buffers


def _join(
    engine: nn.Module, states: Sequence[Stateful], ctx: DistContext
) -> AbstractContextManager[None]:
    # No other rank can end earlier.
    return nullcontext()


def _rewrap(
    module: nn.Module, engine: nn.Module, plan: Plan, ctx: DistContext
) -> tuple[nn.Module, RunMethod]:
    fp8_layers(module, plan, ctx).convert()  # of the layers that are new
    store_layers(module, plan, ctx)
    # Without `checkpoint_and_compile`, which has changed the units of the first `wrap`.
    return module, _run_of(module, plan, ctx)


SINGLE = Parallelism(
    "single", _wrap, _wrap_optimizer, _grad_sync, _sync_buffers, _join, rewrap=_rewrap
)
