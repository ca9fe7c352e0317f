"""Replicas with averaged gradients: PyTorch's DistributedDataParallel."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import attrs
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from faccel.backends.ddp_engine import DdpEngine
from faccel.comm.objects import gather_json
from faccel.context import DistContext
from faccel.errors import ConfigError, ModelError
from faccel.grad_reducer import GradReducer, OwnedParams
from faccel.mesh import DATA
from faccel.parallel.activation_checkpoint import checkpoint_and_compile
from faccel.parallel.forward import call_method, with_precision
from faccel.parallel.fp8 import fp8_layers
from faccel.parallel.layerwise_casting import store_layers
from faccel.parallel.materialize import has_meta, materialize
from faccel.parallel.sync_states import (
    broadcast_from_rank_0,
    check_same_structure,
    plain_tensors,
)
from faccel.parallel.transformer_engine import with_history
from faccel.plan import DdpConfig, Plan
from faccel.protocols import Parallelism, RunMethod, Stateful
from faccel.tree import Tree, has_inner_tensors


def _wrap(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    # First: its error names the parameter that differs, where DDP's check gives an index.
    check_same_structure(module, ctx, DATA)
    # Some ranks may have values, which are then rank 0's.
    if any(gather_json(has_meta(module), ctx, axis=DATA)):
        materialize(module, ctx, DATA)
    fp8_layers(module, plan, ctx).convert()
    if not any(param.requires_grad for param in module.parameters()):
        # DDP raises for a module of which no parameter requires a gradient.
        return _wrap_frozen(module, plan, ctx)
    # Units are changed in place, under their names: DDP sees the same parameters as without.
    checkpoint_and_compile(module, plan)
    engine = _make_engine(module, plan.ddp, ctx)
    # Last: DDP has sent rank 0's values in full, and not every library sends fp8.
    store_layers(module, plan, ctx)
    return engine, with_precision(with_history(engine.run, module, plan, ctx), ctx)


def _rewrap(
    module: nn.Module, engine: nn.Module, plan: Plan, ctx: DistContext
) -> tuple[nn.Module, RunMethod]:
    check_same_structure(module, ctx, DATA)
    fp8_layers(module, plan, ctx).convert()  # of the layers that are new
    if isinstance(engine, DdpEngine):
        # A second reducer would reduce the same gradients again.
        engine.reducer._remove_autograd_hooks()
        engine.grads.is_replaced = True
    if not any(param.requires_grad for param in module.parameters()):
        return _wrap_frozen(module, plan, ctx)
    # Without `checkpoint_and_compile`, which has changed the units of the first `wrap`.
    new_engine = _make_engine(module, plan.ddp, ctx)
    store_layers(module, plan, ctx)
    return new_engine, with_precision(with_history(new_engine.run, module, plan, ctx), ctx)


def _grad_reducer(module: nn.Module, engine: nn.Module) -> GradReducer:
    if isinstance(engine, DdpEngine):
        return engine
    # A frozen model has no gradients to reduce: an optimizer must not step its parameters.
    return OwnedParams(module, frozenset())


# Options of `DdpConfig` that are no arguments of DistributedDataParallel.
_NOT_ARGUMENTS = ("comm_hook", "powersgd", "forward_sync_buffers", "shard_optimizer")
_DEFAULTS = DdpConfig()


def _make_engine(module: nn.Module, options: DdpConfig, ctx: DistContext) -> DdpEngine:
    # DDP divides the sum of gradients by the size of this group: grad = 1/R * sum_r grad_r.
    group = ctx.comm.group(DATA)
    assert group is not None
    # torch's default is False. True avoids a copy of all gradients: `.grad` aliases the buckets.
    arguments: dict[str, Any] = {"gradient_as_bucket_view": True}
    for name, value in attrs.asdict(options, recurse=False).items():
        # Defaults are left to torch: torch 2.11 lacks some of these arguments.
        if name not in _NOT_ARGUMENTS and value != getattr(_DEFAULTS, name):
            arguments[name] = value  # noqa: PERF403
    # The engine copies buffers at the end of backward instead, so that replicas are equal between
    # updates.
    arguments |= _without_buffer_sync(module, ctx)
    arguments |= _quantized_sync(module, ctx)
    engine = DdpEngine(module, options, ctx, process_group=group, **arguments)
    if options.comm_hook is not None:
        from faccel.backends.ddp_comm_hooks import register  # torch's hooks are slow to import

        register(engine, options, group)
    return engine


def _without_buffer_sync(module: nn.Module, ctx: DistContext) -> dict[str, bool]:
    """Return the arguments that turn off the broadcast of buffers in forward."""
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
        return {"forward_sync_buffers": False}
    # Before torch 2.13, `broadcast_buffers=False` also skips the first broadcast, at construction.
    broadcast_from_rank_0(dict(module.named_buffers()), ctx, DATA)
    return {"broadcast_buffers": False}


def _quantized_sync(module: nn.Module, ctx: DistContext) -> dict[str, bool]:
    """Return the argument for a model with quantized parameters, which DDP cannot broadcast."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if not any(map(has_inner_tensors, tensors.values())):
        return {}
    with torch.no_grad():
        # One at a time: such models are large.
        for tensor in plain_tensors(tensors).values():
            tensor.copy_(ctx.comm.broadcast(tensor, 0, DATA))
    return {"init_sync": False}


def _wrap_frozen(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    """Wrap a model without trainable parameters, which DDP refuses."""
    # DDP's constructor would do this for a model with gradients.
    broadcast_from_rank_0(
        {**dict(module.named_parameters()), **dict(module.named_buffers())}, ctx, DATA
    )
    store_layers(module, plan, ctx)

    def run(method: str, *args: Tree, **kwargs: Tree) -> Tree:
        # A parameter that is unfrozen later would be trained by each replica for itself.
        if torch.is_grad_enabled() and any(param.requires_grad for param in module.parameters()):
            raise ModelError(
                "this model was frozen when it was wrapped, so its gradients would not be reduced",
                got="a parameter that requires gradients now",
                fix="call `requires_grad_(True)` before `faccel.wrap`, or write "
                "`model = faccel.rewrap(model, ctx)` after it",
            )
        return call_method(module, method, *args, **kwargs)

    return module, with_precision(with_history(run, module, plan, ctx), ctx)


def _wrap_optimizer(opt: Optimizer, engine: nn.Module, ctx: DistContext) -> Optimizer:
    if not isinstance(engine, DdpEngine) or not engine.shards_optimizer:
        return opt
    from faccel.backends.zero1 import shard_optimizer  # ZeroRedundancyOptimizer is slow to import

    return shard_optimizer(opt, ctx)


@contextmanager
def _grad_sync(engine: nn.Module, *, on: bool) -> Generator[None]:
    if not isinstance(engine, DdpEngine):  # a frozen model has no gradients to reduce
        yield
        return
    # Not `engine.no_sync()`, which can only turn the reduction off, and not on again inside of it.
    # DDP reads this attribute in forward, too: the context must contain both.
    before = engine.require_backward_grad_sync
    if engine.static_graph:
        # The first backward of a static graph records it, and torch asserts that it also reduces.
        on = on or not engine._static_graph_delay_allreduce_enqueued  # pyright: ignore
    engine.require_backward_grad_sync = on  # type: ignore[assignment]
    try:
        yield
    finally:
        engine.require_backward_grad_sync = before  # type: ignore[assignment]


def _sync_buffers(engine: nn.Module, ctx: DistContext) -> None:
    # Otherwise the engine has copied them at the end of the last backward.
    if not isinstance(engine, DdpEngine) or engine.syncs_buffers:
        return
    buffers = dict(engine.named_buffers())
    if buffers:
        broadcast_from_rank_0(buffers, ctx, DATA)


def _join(
    engine: nn.Module, states: Sequence[Stateful], ctx: DistContext
) -> AbstractContextManager[None]:
    if not isinstance(engine, DdpEngine):  # a frozen model communicates nothing
        return nullcontext()
    if engine.shards_optimizer:
        # A step of ZeRO-1 broadcasts updated shards. `join_uneven` joins DDP's collectives only.
        raise ConfigError(
            "`join` is unsupported under `shard_optimizer`: every update needs all ranks",
            got="shard_optimizer=True",
            fix='leave `shard_optimizer` out, or write `tail="pad"`',
        )
    from faccel.backends.ddp_join import join_uneven

    return join_uneven(engine, states, ctx)


DDP = Parallelism(
    "ddp",
    _wrap,
    _wrap_optimizer,
    _grad_sync,
    _sync_buffers,
    _join,
    grad_reducer=_grad_reducer,
    rewrap=_rewrap,
)
