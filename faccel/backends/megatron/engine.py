"""Runs a model that Megatron-core has built, in its DDP and with its schedules."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from faccel.backends.megatron.groups import check_device, check_started, start
from faccel.backends.megatron.layout import (
    Elements,
    ParamLayout,
    layouts_of,
    names_of_entries,
)
from faccel.backends.megatron.model_checks import check_chunks, check_plan, chunks_of
from faccel.backends.megatron.optimizer import (
    EngineOptimizer,
    create_optimizer,
    main_params_of,
    step_engine,
)
from faccel.backends.megatron.optimizer_checks import check_optimizer
from faccel.backends.megatron.schedule import Pipeline, forward_backward, infer
from faccel.context import DistContext
from faccel.errors import ModelError, OptimizerError, short_text
from faccel.flat_shard import FlatShard
from faccel.grad_reducer import GradReducer, OwnedParams
from faccel.mesh import DATA
from faccel.parallel.forward import to_fp32
from faccel.parallel.sync_states import broadcast_from_rank_0, check_same_structure
from faccel.plan import Plan
from faccel.protocols import Parallelism, RunMethod, StateIO
from faccel.update_options import BackwardOptions


class MegatronEngine(nn.Module):
    """The chunks of a model in Megatron-core's DDP, and the layout of their parameters.

    Args:
        chunks: The chunks of the user's model, in order.
        ctx: The context.

    Attributes:
        wrapped: The chunks inside its DDP.
        pipeline: The stage of this rank, which schedules run.
        layouts: The layout of each parameter.
        main_params: The elements that the optimizer steps, by `id` of the parameter.
        has_gradients: Whether a backward has run since the last step.
        is_reduced: Whether the gradients are the sums over the ranks.
    """

    def __init__(self, chunks: list[Any], ctx: DistContext) -> None:
        super().__init__()
        self.chunks = chunks
        self.ctx = ctx
        self.layouts: list[ParamLayout] = []
        for chunk in chunks:
            self.layouts += layouts_of(chunk, ctx)
        self.layout_by_id = {id(layout.param): layout for layout in self.layouts}
        if ctx.mesh.spec.tp > 1:
            # Seeds may differ between these ranks, and parameters that all of them have must not.
            replicated: dict[str, torch.Tensor] = {}
            for layout in self.layouts:
                if not layout.is_sharded:
                    replicated[layout.name] = layout.param
            broadcast_from_rank_0(replicated, ctx, "tp")
        self._trained_ids = {id(layout.param) for layout in self._trained()}
        # In lists, the modules are not registered as submodules. The layouts come first: they are
        # of the user's modules, and the DDP moves parameters into its buffers.
        self.wrapped: list[Any] = [_in_ddp(chunk, ctx) for chunk in chunks]
        self.pipeline = Pipeline(self.wrapped[0])
        self.optimizer: Any = None
        self.main_params: Mapping[int, Elements] = {}
        self.has_run = False
        self.has_gradients = False
        self.is_reduced = False

    def _trained(self) -> list[ParamLayout]:
        return [layout for layout in self.layouts if layout.param.requires_grad]

    def trained_params(self) -> list[torch.Tensor]:
        """Return the parameters that require gradients, as when they were wrapped.

        Raises:
            ModelError: A parameter was frozen, or made trainable, after that.
        """
        trained = self._trained()
        changed = self._trained_ids ^ {id(layout.param) for layout in trained}
        if changed:
            names = [f"`{layout.name}`" for layout in self.layouts if id(layout.param) in changed]
            raise ModelError(
                "`requires_grad` changed after `wrap`, when Megatron-core's DDP has created the "
                "buffers for gradients already",
                got=f"other values of {short_text(', '.join(names))}",
                fix="set `requires_grad` before `faccel.wrap`",
            )
        return [layout.param for layout in trained]

    def connect(self, optimizer: Any) -> None:
        """Set the optimizer that steps the parameters."""
        self.optimizer = optimizer
        self.main_params = main_params_of(optimizer, self.layouts)

    def view_of(self, param: torch.Tensor, flat: torch.Tensor | None = None) -> FlatShard:
        """Return a parameter as a shard of the full one, or a state of its layout."""
        layout = self.layout_by_id[id(param)]
        elements = self.main_params.get(id(param))
        # A frozen parameter, or there is no optimizer yet.
        if elements is None:
            elements = Elements(param, 0, is_range=False)
        if flat is not None:
            elements = attrs.evolve(elements, flat=flat)
        return layout.view_of(elements, self.ctx)

    def reduce_gradients(self) -> None:
        """Sum the gradients over the ranks that have the same parameters. Collective."""
        distributed: Any = importlib.import_module("megatron.core.distributed")
        # Also over the ranks of `tp` for sequence parallel, and over the two copies of a tied
        # embedding in a pipeline. Once for an update, because the sums are not averages.
        distributed.finalize_model_grads(self.wrapped)
        self.is_reduced = True

    def clear_gradients(self) -> None:
        """Drop all gradients."""
        for chunk in self.wrapped:
            # A frozen chunk has no DDP.
            if hasattr(chunk, "zero_grad_buffer"):
                chunk.zero_grad_buffer()
        self.has_run = self.has_gradients = self.is_reduced = False

    def copy_main_params(self) -> None:
        """Copy the elements that the optimizer steps into the model. Collective."""
        # In fp32, without the distributed optimizer, they are the parameters themselves.
        if hasattr(self.optimizer, "_copy_main_params_to_model_params"):
            self.optimizer._copy_main_params_to_model_params()
        if self.ctx.config.zero == 1 and self.optimizer is not None:
            for chunk in self.wrapped:
                chunk.start_param_sync(force_sync=True)


def _in_ddp(chunk: Any, ctx: DistContext) -> Any:
    """Return a chunk in Megatron-core's DDP, with the parameters of the first data rank."""
    distributed: Any = importlib.import_module("megatron.core.distributed")
    if ctx.compute_dtype is not None:
        # It rounds the parameters; the optimizer then makes fp32 copies of them.
        module: Any = importlib.import_module("megatron.core.transformer.module")
        chunk = module.Float16Module(chunk.config, chunk)
    broadcast_from_rank_0(dict(chunk.named_parameters()), ctx, DATA)
    if not any(param.requires_grad for param in chunk.parameters()):
        return chunk
    config = distributed.DistributedDataParallelConfig(
        # Sums of many small numbers, also where parameters are bf16.
        grad_reduce_in_fp32=True,
        # `optimizer_step` reduces them.
        overlap_grad_reduce=False,
        use_distributed_optimizer=ctx.config.zero == 1,
    )
    return distributed.DistributedDataParallel(chunk.config, config, chunk)


def _wrap(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    check_started(ctx)
    check_device(ctx)
    check_plan(plan)
    chunks = chunks_of(module)
    check_chunks(chunks, ctx)
    check_same_structure(module, ctx, DATA)
    engine = MegatronEngine(chunks, ctx)
    engine.clear_gradients()
    return engine, _run_method(engine, ctx)


def _run_method(engine: MegatronEngine, ctx: DistContext) -> RunMethod:
    def run(method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "forward":
            raise ModelError(
                "Megatron-core runs `forward` only",
                got=f"`{method}`",
                fix=f"call `faccel.unwrap(model).{method}(...)`, without the precision of the "
                "context and without gradients",
            )
        if ctx.mesh.spec.pp == 1:
            engine.has_run = engine.has_run or torch.is_grad_enabled()
            return to_fp32(engine.wrapped[0](*args, **kwargs))
        # With gradients the caller would run backward through the output, which only one rank has.
        if torch.is_grad_enabled():
            raise ModelError(
                "a pipeline runs forward and backward of all micro-batches together",
                got="a call with gradients enabled",
                fix="write `faccel.forward_backward(loss_fn, model, window, scaler, ctx)`, "
                "or `with torch.no_grad():`",
            )
        return infer(engine.pipeline, args, kwargs, ctx)

    return run


def _wrap_optimizer(opt: Optimizer, engine: nn.Module, ctx: DistContext) -> Optimizer:
    assert isinstance(engine, MegatronEngine)
    if engine.optimizer is not None:
        raise OptimizerError(
            "the model already has an optimizer, and Megatron-core has one for a model",
            got=f"a second optimizer, {type(opt).__name__}",
            fix="put all parameters of a model into one optimizer, in several groups",
        )
    check_optimizer(opt, engine.trained_params(), ctx)
    # Copies: Megatron-core makes groups itself, of the parameters or of fp32 copies.
    groups = [{**group, "params": list(group["params"])} for group in opt.param_groups]
    optimizer = create_optimizer(opt, engine.wrapped, ctx)
    engine.connect(optimizer)
    return EngineOptimizer(groups, opt, optimizer, engine, ctx)


@contextmanager
def _grad_sync(engine: nn.Module, *, on: bool) -> Generator[None]:
    assert isinstance(engine, MegatronEngine)
    # Without overlap its DDP reduces in `reduce_gradients` only, and hooks of users may ask it.
    with contextlib.ExitStack() as stack:
        for chunk in engine.wrapped:
            if not on and hasattr(chunk, "no_sync"):
                stack.enter_context(chunk.no_sync())
        yield


@attrs.frozen(eq=False)
class EngineGrads(OwnedParams):
    """The gradients of a model in the buffers of Megatron-core's DDP; a `GradReducer`."""

    engine: MegatronEngine = attrs.field(kw_only=True)

    def before_backward(self, loss: torch.Tensor, options: BackwardOptions) -> None:
        """Raise for an option of backward: hooks of the DDP add and free each gradient."""
        names: list[str] = []
        if options.create_graph:
            names.append("create_graph=True")
        if options.inputs is not None:
            names.append("inputs=...")
        if names:
            raise ModelError(
                f"`{names[-1]}` is unsupported under Megatron-core, which adds gradients in hooks",
                got=f"{', '.join(names)} in `scaled_backward`",
                fix="leave it out, or train the model without `strategy`",
            )

    def after_backward(self, options: BackwardOptions) -> None:
        """Record that there are gradients."""
        # Every backward of the context comes here, also one that does not reach this model.
        self.engine.has_gradients = self.engine.has_gradients or self.engine.has_run


def _grad_reducer(module: nn.Module, engine: nn.Module) -> GradReducer:
    assert isinstance(engine, MegatronEngine)
    ids = frozenset(map(id, module.parameters()))
    return EngineGrads(module, ids, engine.clear_gradients, engine=engine)


def _sync_buffers(engine: nn.Module, ctx: DistContext) -> None:
    assert isinstance(engine, MegatronEngine)
    for chunk in engine.chunks:
        buffers = dict(chunk.named_buffers())
        if buffers:
            broadcast_from_rank_0(buffers, ctx, DATA)


def _named_parameters(engine: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    assert isinstance(engine, MegatronEngine)
    for layout in engine.layouts:
        yield layout.name, layout.param


def _export(engine: nn.Module) -> dict[str, Any]:
    assert isinstance(engine, MegatronEngine)
    state: dict[str, Any] = {}
    for chunk in engine.chunks:
        entries = chunk.state_dict(keep_vars=True)
        for local_name, name in names_of_entries(chunk):
            value = entries[local_name]
            if id(value) in engine.layout_by_id:
                name = engine.layout_by_id[id(value)].name
                value = engine.view_of(value)
            state[name] = value
    return state


def _restore(engine: nn.Module, state: Mapping[str, Any]) -> None:
    assert isinstance(engine, MegatronEngine)
    for layout in engine.layouts:
        # `trained_only` checkpoints omit frozen parameters
        if layout.name in state:
            engine.view_of(layout.param).assign(state[layout.name])
    # Buffers and extra states, under the names that they have on this rank.
    parameter_names = {layout.name for layout in engine.layouts}
    for chunk in engine.chunks:
        entries: dict[str, Any] = {}
        for local_name, name in names_of_entries(chunk):
            if name in state and name not in parameter_names:
                entries[local_name] = state[name]
        chunk.load_state_dict(entries, strict=False)
    engine.copy_main_params()


def _loss_rank(engine: nn.Module) -> int:
    assert isinstance(engine, MegatronEngine)
    return engine.ctx.mesh.spec.pp - 1


def _forward_backward(engine: nn.Module, losses: Any, factors: Any, ctx: DistContext) -> Any:
    assert isinstance(engine, MegatronEngine)
    values = forward_backward(engine.pipeline, losses, factors, ctx)
    engine.has_run = engine.has_gradients = True
    return values


MEGATRON = Parallelism(
    "megatron",
    _wrap,
    _wrap_optimizer,
    _grad_sync,
    _sync_buffers,
    pipeline_forward_backward=_forward_backward,
    loss_rank=_loss_rank,
    state=StateIO(_export, _restore, _named_parameters),
    optimizer_step=step_engine,
    # Ranks have different shards, and gradients are in buffers of the engine.
    is_replicated=False,
    grad_reducer=_grad_reducer,
    start=start,
)
