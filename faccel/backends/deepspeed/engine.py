"""Runs a model through an engine of DeepSpeed.

DeepSpeed takes a model and its optimizer together, so the engine is created in `wrap_optimizer`.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from faccel.backends.deepspeed.availability import (
    import_deepspeed,
    op_names,
    rank_environment_if_missing,
    setup_environment,
)
from faccel.backends.deepspeed.build_lock import check_no_stale_lock
from faccel.backends.deepspeed.optimizer import ZeroOptimizer, check_optimizer, step_engine
from faccel.backends.deepspeed.partition import (
    ParamShard,
    copy_master_weights_to_model,
    param_shards,
    sharded_state,
)
from faccel.backends.deepspeed.settings import (
    allows_untested_optimizer,
    dtype_of,
    settings_for,
    zero_stage,
)
from faccel.backends.deepspeed.zero_init import shard_parameters
from faccel.backends.default_group import ensure_process_group
from faccel.comm.rank_errors import raise_naming_rank
from faccel.context import DistContext
from faccel.errors import BackendError, ConfigError, ModelError, OptimizerError
from faccel.flat_shard import FlatShard
from faccel.grad_reducer import GradReducer, OwnedParams
from faccel.mesh import DATA
from faccel.parallel.activation_checkpoint import checkpoint_and_compile
from faccel.parallel.forward import Methods, call_method, to_fp32, with_precision
from faccel.parallel.layerwise_casting import refuse_stored_layers
from faccel.parallel.materialize import InitialValues
from faccel.parallel.sync_states import broadcast_from_rank_0, check_same_structure
from faccel.plan import Plan
from faccel.protocols import Parallelism, RunMethod, Stateful, StateIO
from faccel.tree import Tree, map_leaves
from faccel.update_options import BackwardOptions


@attrs.frozen(eq=False)
class EngineState:
    """An engine of DeepSpeed, and the shards of its parameters.

    Args:
        engine: The engine.
        shards: This rank's shard of each sharded parameter, by `id` of the parameter.
    """

    engine: Any
    shards: Mapping[int, ParamShard]


class DeepSpeedModule(nn.Module):
    """A module with the engine that runs it, which exists after `create_engine`.

    Args:
        module: The user's module.
        plan: How to run it.
        ctx: The context.
    """

    def __init__(self, module: nn.Module, plan: Plan, ctx: DistContext) -> None:
        super().__init__()
        self.module = module
        self.plan = plan
        self.ctx = ctx
        self.engine_state: EngineState | None = None

    def create_engine(self, opt: Optimizer | None) -> EngineState:
        """Create the engine for the module and `opt`.

        Effects: updates the module and `opt`; collective.
        """
        settings = settings_for(self.module, opt, self.plan, self.ctx)
        # Before `initialize`, which casts the parameters of the module in place.
        fp32_values = _fp32_values(self.module, self.ctx)
        with setup_environment(self.ctx):
            deepspeed = import_deepspeed(self.ctx)
            check_no_stale_lock(op_names(), self.ctx)
            ensure_process_group(self.ctx)
            engine = deepspeed.initialize(
                model=Methods(self.module), optimizer=opt, config=settings
            )[0]
        shards = param_shards(self.module, engine.optimizer, self.ctx)
        for param_id, value in fp32_values.items():
            shard = shards.get(param_id)
            # A frozen parameter has no fp32 master weights: it stays rounded.
            if shard is not None and shard.flat.dtype == value.dtype:
                shard.view_of(shard.flat, self.ctx).assign(value)
        # inside a record, the engine, which is a module, is not registered as a submodule
        self.engine_state = EngineState(engine, shards)
        return self.engine_state


def _fp32_values(module: nn.Module, ctx: DistContext) -> dict[int, torch.Tensor]:
    """Return the fp32 values of the parameters by `id`, if the engine will round them.

    The engine makes its master weights from rounded parameters; these values replace them.
    """
    values: dict[int, torch.Tensor] = {}
    if ctx.compute_dtype is None:
        return values
    for param in module.parameters():
        # a parameter of ZeRO-3's initialization is rounded already
        if param.dtype == torch.float32 and not hasattr(param, "ds_id"):
            values[id(param)] = param.detach()
    return values


def _wrap(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    if ctx.topology.source == "simulated" and ctx.world_size > 1:
        raise BackendError(
            "DeepSpeed does not run in a simulated world: it stores global state in the process, "
            "and simulated ranks are threads",
            fix="run the ranks as processes, with `faccel launch` or `faccel.launch`",
        )
    refuse_stored_layers(plan, ctx)
    with setup_environment(ctx):
        import_deepspeed(ctx)
        # invalid settings raise before anything is moved
        settings = settings_for(module, None, plan, ctx)
    _check_dtypes(module, ctx)
    check_same_structure(module, ctx, DATA)
    # After all checks: from this line on, parameters are overwritten.
    values = InitialValues.of(module, ctx, DATA)
    # ZeRO-1 and ZeRO-2 need all parameters on each rank; only ZeRO-3 can shard while it fills.
    if values.is_meta and zero_stage(ctx) == 3:
        shard_parameters(module, values, settings, ctx)
    else:
        values.fill(module, ctx, DATA)
    checkpoint_and_compile(module, plan)
    holder = DeepSpeedModule(module, plan, ctx)
    is_frozen = not any(param.requires_grad for param in module.parameters())
    if zero_stage(ctx) == 3 and is_frozen:
        # a frozen model gets no optimizer, and its parameters are to be sharded all the same
        holder.create_engine(None)
    return holder, _run_method(holder, ctx)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def _check_dtypes(module: nn.Module, ctx: DistContext) -> None:
    for name, param in module.named_parameters():
        if param.dtype in (torch.float64, torch.complex128):
            raise ModelError(
                f"`{name}` has a dtype that DeepSpeed does not support: master weights are fp32",
                got=f"`{name}`, {param.dtype}",
                fix="call `.float()` on the model",
            )
    if ctx.compute_dtype is None:
        return
    for name, submodule in module.named_modules():
        if isinstance(submodule, _BATCH_NORMS):
            # DeepSpeed casts parameters and leaves buffers in fp32
            raise ModelError(
                f"`{name}` is a batch norm, which does not run with parameters in "
                f"{ctx.config.mixed_precision} and buffers in fp32, as DeepSpeed stores them",
                got=f"`{name}` under mixed_precision={ctx.config.mixed_precision}",
                fix='use `mixed_precision="no"`, a group or layer norm, or '
                '`mesh="dp_shard=-1"` without a strategy',
            )


def _run_method(holder: DeepSpeedModule, ctx: DistContext) -> RunMethod:
    module = holder.module

    def call_module(method: str, *args: Any, **kwargs: Any) -> Any:
        return call_method(module, method, *args, **kwargs)

    call_without_engine = with_precision(call_module, ctx)

    cast = functools.partial(_cast_fp32, dtype=dtype_of(ctx))

    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        if holder.engine_state is None:
            _check_needs_no_engine(module)
            return call_without_engine(method, *args, **kwargs)
        if ctx.compute_dtype is not None:
            # The engine runs without autocast: inputs need the dtype of the parameters.
            args = map_leaves(cast, args)
            kwargs = map_leaves(cast, kwargs)
        try:
            # The engine's module is a `Methods`, whose `forward` takes the name of a method.
            with rank_environment_if_missing(ctx):
                output = holder.engine_state.engine(method, *args, **kwargs)
        except RuntimeError as error:  # ZeRO-3 gathers parameters in forward
            raise_naming_rank(error, "forward", DATA, ctx.comm)
        if ctx.compute_dtype is None:
            return output
        return to_fp32(output)

    return run


def _cast_fp32(leaf: Tree, dtype: torch.dtype) -> Tree:
    if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32:
        return leaf.to(dtype)
    return leaf


def _check_needs_no_engine(module: nn.Module) -> None:
    is_trained = any(param.requires_grad for param in module.parameters())
    # Evaluation and a frozen teacher need no engine; training without one would not reduce.
    if is_trained and torch.is_grad_enabled():
        raise ModelError(
            "the model has no optimizer yet, and DeepSpeed creates its engine from both",
            got="a forward with gradients",
            fix="call `opt = faccel.wrap_optimizer(opt, model, ctx)` first, or freeze the model "
            "before `faccel.wrap`",
        )


def _wrap_optimizer(opt: Optimizer, engine: nn.Module, ctx: DistContext) -> Optimizer:
    assert isinstance(engine, DeepSpeedModule)
    if engine.engine_state is not None:
        raise OptimizerError(
            "the model already has an optimizer, and an engine of DeepSpeed takes one",
            got=f"a second optimizer, {type(opt).__name__}",
            fix="put all parameters of a model into one optimizer, in several groups",
        )
    check_optimizer(opt, is_allowed=allows_untested_optimizer(engine.plan))
    # DeepSpeed replaces the parameters in the groups by flat ones
    groups = [{**group, "params": list(group["params"])} for group in opt.param_groups]
    state = engine.create_engine(opt)
    return ZeroOptimizer(groups, opt, state.engine, state.shards, ctx)


@contextmanager
def _grad_sync(engine: nn.Module, *, on: bool) -> Generator[None]:
    # ZeRO-1 reduces in the step. ZeRO-2 and 3 store no full gradients, so they reduce in each
    # backward and sum the results.
    yield


@attrs.frozen(eq=False)
class EngineGrads(OwnedParams):
    """The gradients of a model that an engine of DeepSpeed reduces in backward; a `GradReducer`."""

    def before_backward(self, loss: torch.Tensor, options: BackwardOptions) -> None:
        """Raise for an option of backward: hooks of the engine reduce and free each gradient once.

        Its `backward` has no `create_graph` and no `inputs`, and takes a second backward through
        the same graph for an interrupted one.
        """
        names: list[str] = []
        if options.keeps_graph:
            names.append("retain_graph=True")
        if options.create_graph:
            names.append("create_graph=True")
        if options.inputs is not None:
            names.append("inputs=...")
        if names:
            raise ModelError(
                f"`{names[-1]}` is unsupported under DeepSpeed, which reduces gradients in hooks",
                got=f"{', '.join(names)} in `scaled_backward`",
                fix="run one backward per forward, as in `loss = loss_1 + loss_2`; or write "
                '`faccel.init(mesh="dp_shard=-1")`, without DeepSpeed',
            )


def _grad_reducer(module: nn.Module, engine: nn.Module) -> GradReducer:
    return EngineGrads(module, frozenset(map(id, module.parameters())))


def _sync_buffers(engine: nn.Module, ctx: DistContext) -> None:
    assert isinstance(engine, DeepSpeedModule)
    # ZeRO shards parameters, gradients and states. Each rank updates its own copy of a buffer.
    buffers = dict(engine.module.named_buffers())
    if buffers:
        broadcast_from_rank_0(buffers, ctx, DATA)


def _export(engine: nn.Module) -> dict[str, Any]:
    assert isinstance(engine, DeepSpeedModule)
    state = engine.module.state_dict()
    if engine.engine_state is not None:
        # Over the module's entries: those are rounded, or empty under ZeRO-3.
        state.update(sharded_state(engine.module, engine.engine_state.shards, engine.ctx))
    return state


def _restore(engine: nn.Module, state: Mapping[str, Any]) -> None:
    assert isinstance(engine, DeepSpeedModule)
    # Sharded parameters are written into the flat master weights, which `load_state_dict` of the
    # module cannot reach. The other entries, such as buffers, are loaded as usual.
    unsharded = dict(state)
    for name, value in _export(engine).items():
        # `trained_only` checkpoints omit frozen parameters
        if isinstance(value, FlatShard) and name in state:
            value.assign(unsharded.pop(name))
    # Not strict, because the sharded parameters are missing.
    engine.module.load_state_dict(unsharded, strict=False)
    if engine.engine_state is not None:
        # The model computes with its own copy, of the dtype of `mixed_precision`.
        copy_master_weights_to_model(engine.engine_state.engine.optimizer)


def _no_join(
    engine: nn.Module, states: Sequence[Stateful], ctx: DistContext
) -> AbstractContextManager[None]:
    raise ConfigError(
        "`join` is unsupported under DeepSpeed: every update needs all ranks",
        got="strategy=deepspeed",
        fix='train on a loader with `tail="pad"` or `tail="drop"`',
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
    # Gradients are reduced in the engine: no rank has full ones in `.grad`.
    is_replicated=False,
    grad_reducer=_grad_reducer,
)
