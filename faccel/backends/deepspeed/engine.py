"""Running a model through an engine of DeepSpeed, which is made when the optimizer is known: it takes both at once."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from faccel.backends.deepspeed.availability import (
    import_deepspeed,
    rank_environment_if_missing,
    setup_environment,
)
from faccel.backends.deepspeed.optimizer import ZeroOptimizer, check_optimizer, step_engine
from faccel.backends.deepspeed.partition import Place, places_of, shards_of, write_back
from faccel.backends.deepspeed.settings import dtype_of, is_untested_allowed, settings_of, stage_of
from faccel.backends.deepspeed.zero_init import join_world, spread
from faccel.comm.rank_errors import raise_naming_rank
from faccel.context import DistContext
from faccel.errors import BackendError, ConfigError, ModelError, OptimizerError
from faccel.flat_shard import FlatShard
from faccel.parallel.activation_checkpoint import checkpoint_and_compile
from faccel.parallel.forward import Methods, call_method, to_fp32, with_precision
from faccel.parallel.materialize import InitialValues
from faccel.parallel.sync_states import broadcast_from_rank_0, check_same_structure
from faccel.plan import Plan
from faccel.protocols import DATA, Parallelism, RunMethod, StateIO
from faccel.tree import Tree, map_leaves


@attrs.frozen(eq=False)
class Tied:
    """What DeepSpeed made of a model and its optimizer.

    Args:
        engine: Its engine.
        places: Where parameters lie that are not whole on every rank, by identity.
    """

    engine: Any
    places: Mapping[int, Place]


class Holder(nn.Module):
    """A model that an engine of DeepSpeed runs, once it is tied to an optimizer.

    Args:
        module: The user's.
        plan: How it is run.
        ctx: The world.
    """

    def __init__(self, module: nn.Module, plan: Plan, ctx: DistContext) -> None:
        super().__init__()
        self.module, self.plan, self.ctx = module, plan, ctx
        self.tied: Tied | None = None

    def tie(self, opt: Optimizer | None) -> Any:
        """Make the engine. Updates the model and `opt`; collective."""
        ctx, module = self.ctx, self.module
        settings = settings_of(module, opt, self.plan, ctx)
        exact = _exact(module, ctx)
        with setup_environment(ctx):
            deepspeed = import_deepspeed(ctx)
            join_world(ctx)
            engine = deepspeed.initialize(model=Methods(module), optimizer=opt, config=settings)[0]
        places = places_of(module, engine.optimizer, ctx)
        for key, value in exact.items():
            if key in places and places[key].flat.dtype == value.dtype:
                places[key].shard(places[key].flat, ctx).assign(value)
        object.__setattr__(self, "tied", Tied(engine, places))
        return engine


def _exact(module: nn.Module, ctx: DistContext) -> dict[int, torch.Tensor]:
    """Return the values of the parameters from before the engine rounds them, where it does."""
    if ctx.compute_dtype is None:
        return {}
    return {
        id(p): p.detach()
        for p in module.parameters()
        if p.dtype == torch.float32 and not hasattr(p, "ds_id")
    }


def _wrap(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    if ctx.topology.source == "simulated" and ctx.world_size > 1:
        fix = "run the ranks as processes, with `faccel launch` or `faccel.launch`"
        raise BackendError(
            "DeepSpeed keeps its state in the process, so ranks cannot be threads", fix=fix
        )
    with setup_environment(ctx):
        import_deepspeed(ctx)
        # what is wrong with the settings is told before anything is moved
        settings = settings_of(module, None, plan, ctx)
    _check_dtypes(module, ctx)
    check_same_structure(module, ctx, DATA)
    values = InitialValues.of(module, ctx, DATA)
    if values.is_meta and stage_of(ctx) == 3:
        spread(module, values, settings, ctx)
    else:
        values.fill(module, ctx, DATA)
    checkpoint_and_compile(module, plan)
    holder = Holder(module, plan, ctx)
    if stage_of(ctx) == 3 and not any(p.requires_grad for p in module.parameters()):
        holder.tie(None)
    return holder, _runner(holder, ctx)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _check_dtypes(module: nn.Module, ctx: DistContext) -> None:
    wide = next(
        (
            name
            for name, p in module.named_parameters()
            if p.dtype in (torch.float64, torch.complex128)
        ),
        None,
    )
    if wide is not None:
        got = f"`{wide}`, {module.get_parameter(wide).dtype}"
        raise ModelError(
            "DeepSpeed keeps master weights in fp32", got=got, fix="call `.float()` on the model"
        )
    norms = (name for name, each in module.named_modules() if isinstance(each, _BATCH_NORMS))
    name = None if ctx.compute_dtype is None else next(norms, None)
    if name is not None:
        raise ModelError(
            "DeepSpeed casts parameters and leaves buffers in fp32, and torch's batch norm takes no such mixture",
            got=f"`{name}` under mixed_precision={ctx.config.mixed_precision}",
            fix='use `mixed_precision="no"`, a group or layer norm, or `mesh="dp_shard=-1"` without a strategy',
        )


def _runner(holder: Holder, ctx: DistContext) -> RunMethod:
    module, dtype = holder.module, dtype_of(ctx)
    plain = with_precision(
        lambda method, *args, **kwargs: call_method(module, method, *args, **kwargs), ctx
    )

    def cast(x: Tree) -> Tree:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        if holder.tied is None:
            _check_untied(module)
            return plain(method, *args, **kwargs)
        if ctx.compute_dtype is not None:
            args, kwargs = map_leaves(cast, args), map_leaves(cast, kwargs)
        try:
            with rank_environment_if_missing(ctx):
                out = holder.tied.engine(method, *args, **kwargs)
        except RuntimeError as error:  # parameters are gathered here
            raise_naming_rank(error, "forward", DATA, ctx.comm)
        return out if ctx.compute_dtype is None else to_fp32(out)

    return run


def _check_untied(module: nn.Module) -> None:
    if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        raise ModelError(
            "DeepSpeed takes a model and its optimizer together, and this model has none yet",
            got="a forward with gradients",
            fix="call `opt = faccel.wrap_optimizer(opt, model, ctx)` first, or freeze the model before `faccel.wrap`",
        )


def _wrap_optimizer(opt: Optimizer, engine: Any, ctx: DistContext) -> Optimizer:
    holder: Holder = engine
    if holder.tied is not None:
        fix = "put all parameters of a model into one optimizer, in several groups"
        raise OptimizerError(
            "an engine of DeepSpeed has one optimizer",
            got=f"a second, {type(opt).__name__}",
            fix=fix,
        )
    check_optimizer(opt, is_allowed=is_untested_allowed(holder.plan))
    groups = [{**group, "params": list(group["params"])} for group in opt.param_groups]
    made = holder.tie(opt)
    assert holder.tied is not None
    return ZeroOptimizer(groups, opt, made, holder.tied.places, ctx)


@contextmanager
def _grad_sync(engine: nn.Module, *, on: bool) -> Generator[None]:
    yield  # ZeRO-1 reduces in the step, ZeRO-2 and 3 keep no whole gradients: they add up what each backward reduced


def _sync_buffers(engine: Any, ctx: DistContext) -> None:
    buffers = dict(engine.module.named_buffers())
    if buffers:
        broadcast_from_rank_0(buffers, ctx, DATA)


def _export(engine: Any) -> dict[str, Any]:
    state = engine.module.state_dict()
    if engine.tied is not None:
        state.update(shards_of(engine.module, engine.tied.places, engine.ctx))
    return state


def _restore(engine: Any, state: Mapping[str, Any]) -> None:
    own = {name: x for name, x in _export(engine).items() if isinstance(x, FlatShard)}
    for name, shard in own.items():
        if name in state:  # frozen ones may be left out
            shard.assign(state[name])
    rest = {name: value for name, value in state.items() if name not in own}
    engine.module.load_state_dict(rest, strict=False)
    if engine.tied is not None:
        write_back(engine.tied.engine.optimizer)


def _no_join(engine: nn.Module, states: Sequence[Any], ctx: DistContext) -> Any:
    fix = 'train on a loader with `tail="pad"` or `tail="drop"`'
    raise ConfigError(
        "under ZeRO no rank can go on without the others", got="strategy=deepspeed", fix=fix
    )


DEEPSPEED = Parallelism(
    "deepspeed",
    _wrap,
    _wrap_optimizer,
    _grad_sync,
    _sync_buffers,
    _no_join,
    state=StateIO(_export, _restore),
    optimizer_step=step_engine,
    is_replicated=False,
)
