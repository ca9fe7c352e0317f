"""Replicas with averaged gradients: torch's DistributedDataParallel."""

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

from faccel.comm.rank_errors import raise_naming_rank
from faccel.context import DistContext
from faccel.errors import ConfigError, ModelError
from faccel.parallel.activation_checkpoint import prepare
from faccel.parallel.forward import Methods, call_method, with_precision
from faccel.parallel.sync_states import check_same, take_rank_0s
from faccel.plan import DdpConfig, Plan
from faccel.protocols import DATA, Parallelism, RunMethod


def _wrap(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    check_same(module, ctx, DATA)
    if not any(p.requires_grad for p in module.parameters()):
        return _wrap_frozen(module, ctx)
    prepare(module, plan)
    engine = _engine(module, plan.ddp, ctx)

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        # Without gradients nothing is to be reduced, and torch would still broadcast buffers: ranks may evaluate
        # different numbers of batches.
        if torch.is_grad_enabled():
            try:
                return engine(method, *args, **kwargs)
            except (
                RuntimeError
            ) as error:  # buffers are broadcast here, and the last backward is looked at
                unused = _unused(error)
                if unused is not None:
                    raise unused from error
                raise_naming_rank(error, "forward", DATA, ctx.comm)
        return call_method(module, method, *args, **kwargs)

    return engine, with_precision(run, ctx)


def _unused(error: RuntimeError) -> ModelError | None:
    if "Expected to have finished reduction" not in str(error):
        return None
    return ModelError(
        "some parameters took no part in the last loss, so DDP waits for their gradients",
        got=next(
            (line for line in str(error).split("\n") if "Parameter indices" in line),
            "torch names none",
        ).strip(),
        fix="use their outputs in the loss, or write "
        "`faccel.wrap(model, ctx, plan=faccel.Plan(ddp=faccel.parallel.DdpConfig(find_unused_parameters=True)))`",
    )


def _engine(module: nn.Module, options: DdpConfig, ctx: DistContext) -> DistributedDataParallel:
    group = ctx.comm.group(DATA)
    assert group is not None
    given = {
        name: value
        for name, value in attrs.asdict(options, recurse=False).items()
        if name not in _OURS
    }
    given = {
        name: value for name, value in given.items() if value != getattr(_DEFAULTS, name)
    }  # torch 2.9 lacks some
    if not options.forward_sync_buffers:
        given |= _without_buffers(module, ctx)
    engine = DistributedDataParallel(Methods(module), process_group=group, **_NOT_TORCHS | given)
    setattr(engine, _SHARDS_OPTIMIZER, options.shard_optimizer)  # for `_wrap_optimizer`
    if options.comm_hook is not None:
        from faccel.backends.ddp_comm_hooks import register  # torch's hooks take long to import

        register(engine, options, group)
    return engine


_OURS = ("comm_hook", "powersgd", "forward_sync_buffers", "shard_optimizer")
_SHARDS_OPTIMIZER = "_faccel_shard_optimizer"
_DEFAULTS = DdpConfig()
_NOT_TORCHS: dict[str, Any] = {
    "gradient_as_bucket_view": True
}  # where our default is another than torch's


def _without_buffers(module: nn.Module, ctx: DistContext) -> dict[str, Any]:
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:
        return {"forward_sync_buffers": False}
    take_rank_0s(
        dict(module.named_buffers()), ctx, DATA
    )  # torch before 2.13 leaves them out of its first one, too
    return {"broadcast_buffers": False}


def _wrap_frozen(module: nn.Module, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    """Share rank 0's values of a model that DDP refuses because nothing in it is trained."""
    take_rank_0s({**dict(module.named_parameters()), **dict(module.named_buffers())}, ctx, DATA)

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            raise ModelError(
                "this model was frozen when it was wrapped, so its gradients would not be reduced",
                got="a parameter that requires gradients now",
                fix="call `requires_grad_(True)` before `faccel.wrap`",
            )
        return call_method(module, method, *args, **kwargs)

    return module, with_precision(run, ctx)


def _wrap_optimizer(opt: Optimizer, engine: nn.Module, ctx: DistContext) -> Optimizer:
    if not getattr(engine, _SHARDS_OPTIMIZER, False):
        return opt
    from faccel.backends.zero1 import shard_optimizer  # torch's takes long to import

    return shard_optimizer(opt, ctx)


@contextmanager
def _grad_sync(engine: nn.Module, *, on: bool) -> Generator[None]:
    if not isinstance(engine, DistributedDataParallel):  # frozen: there is nothing to reduce
        yield
        return
    before = engine.require_backward_grad_sync
    # the first backward of a static graph records it, and torch asserts that it also reduces
    on = on or (engine.static_graph and not engine._static_graph_delay_allreduce_enqueued)  # type: ignore[assignment]
    engine.require_backward_grad_sync = on  # type: ignore[assignment]
    try:
        yield
    finally:
        engine.require_backward_grad_sync = before  # type: ignore[assignment]


def _sync_buffers(engine: nn.Module, ctx: DistContext) -> None:
    buffers = dict(engine.named_buffers())
    if buffers and isinstance(engine, DistributedDataParallel):
        take_rank_0s(buffers, ctx, DATA)


def _join(
    engine: nn.Module, states: Sequence[Any], ctx: DistContext
) -> AbstractContextManager[None]:
    if not isinstance(engine, DistributedDataParallel):  # frozen: nobody waits for anybody
        return nullcontext()
    if getattr(engine, _SHARDS_OPTIMIZER, False):
        raise ConfigError(
            "a rank that has ended has no gradients to step its share of the parameters with",
            got="shard_optimizer=True",
            fix='leave `shard_optimizer` out, or write `tail="pad"`',
        )
    from faccel.backends.ddp_join import joining

    return joining(engine, states, ctx)


DDP = Parallelism("ddp", _wrap, _wrap_optimizer, _grad_sync, _sync_buffers, _join)
