"""Pipeline parallel: PyTorch's schedules, over stages that are sharded like any other model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import attrs
import torch
import torch.distributed as dist
from torch import nn

from faccel.backends.fsdp import shard_module, sync_buffers
from faccel.backends.fsdp_layout import Layout, contains
from faccel.backends.fsdp_param_hooks import gather_before_inference_mode
from faccel.backends.pipeline_engine import PipelineEngine, StageInputs, TiedParam
from faccel.backends.pipeline_inference import infer
from faccel.backends.pipeline_optimizer import wrap_optimizer
from faccel.backends.pipeline_window import forward_backward
from faccel.comm.tensors import broadcast
from faccel.context import DistContext
from faccel.errors import ConfigError, ModelError
from faccel.grad_reducer import GradReducer, OwnedParams
from faccel.mesh import WORLD
from faccel.parallel.layerwise_casting import refuse_stored_layers
from faccel.parallel.pipeline_forward import StageForward
from faccel.parallel.pipeline_stages import (
    StageModule,
    StageRanks,
    remove_other_stages,
    stages_of,
    tied_params,
)
from faccel.parallel.sync_states import check_same_structure
from faccel.plan import SPLIT_BACKWARD_SCHEDULES, PipelineConfig, Plan
from faccel.protocols import Parallelism, RunMethod
from faccel.tree import Tree


def _wrap(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
    refuse_stored_layers(plan, ctx)
    config = _config(plan, ctx)
    check_same_structure(module, ctx, WORLD)
    # A later stage is on another rank than rank 0, which alone may have values.
    if any(param.is_meta for param in module.parameters()):
        raise ModelError(
            "a pipeline cannot be built from a model on the meta device",
            got="parameters on meta",
            fix="build the model on the CPU",
        )
    pp_rank, pp_size = ctx.comm.rank("pp"), ctx.comm.size("pp")
    stage_ranks = StageRanks.of(config, pp_size)
    stages = stages_of(module, config, stage_ranks.num_stages)
    # While each rank has all parameters.
    loss_dtype = torch.float32
    if any(param.dtype == torch.float64 for param in module.parameters()):
        loss_dtype = torch.float64
    layout = Layout.from_plan(module, plan, ctx).with_fp8(module, plan, ctx)
    tied = tied_params(module, stages)
    _check_tied(tied, stage_ranks)
    _check_units(stages, layout)
    # Nothing below is an error of the user's: from here on the module is updated.
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            # Every rank gets rank 0's values of all stages, while it still has all modules.
            tensor.copy_(broadcast(tensor.detach(), ctx, axis=WORLD))
    own_numbers = stage_ranks.stages_of(pp_rank)
    own_stages = [stages[number] for number in own_numbers]
    stage_modules: list[StageModule] = []
    own_names: list[str] = []
    for number, names in zip(own_numbers, own_stages, strict=True):
        stage_forward = None
        if config.forward == "model":
            stage_forward = StageForward(module, stages, number)
        stage_modules.append(
            StageModule(module, names, plan, ctx, is_first=number == 0, stage_forward=stage_forward)
        )
        own_names.extend(names)
    plan = _stage_plan(plan, config)
    # Before sharding, so that the parameters of the other stages are freed.
    remove_other_stages(module, stages, own_names)
    for stage_module, names in zip(stage_modules, own_stages, strict=True):
        shard_module(stage_module, plan, layout.below(names), ctx)
        _bind(stage_module, ctx)
    engine = PipelineEngine(
        stage_modules,
        config,
        stage_ranks,
        _make_tied(tied, stage_ranks, ctx),
        ctx,
        has_tied=bool(tied),
        loss_dtype=loss_dtype,
    )
    return engine, _make_run(engine, ctx)


def _bind(stage_module: StageModule, ctx: DistContext) -> None:
    if stage_module.stage_forward is None:
        return
    stage_module.stage_forward.bind(stage_module)
    # Sharding has moved the others.
    for side_module in stage_module.stage_forward.side_modules:
        side_module.to(ctx.device)


def _stage_plan(plan: Plan, config: PipelineConfig) -> Plan:
    """Return how the stages are sharded."""
    if config.schedule not in SPLIT_BACKWARD_SCHEDULES:
        return plan
    # Between the gradients of its inputs and those of its parameters a stage may run the forward of
    # another micro-batch. A unit that frees its parameters after that forward would have no
    # gradients, without an error (torch 2.13). The schedule frees all of a stage itself.
    fsdp = attrs.evolve(plan.fsdp, reshard_after_forward=False)
    return attrs.evolve(plan, fsdp=fsdp)


def _config(plan: Plan, ctx: DistContext) -> PipelineConfig:
    if plan.pipeline is None:
        raise ConfigError(
            "a mesh with `pp` needs `Plan(pipeline=...)`, which lists the modules in order",
            got=str(ctx.mesh.spec),
            fix="write `plan=faccel.Plan(pipeline=faccel.parallel.PipelineConfig("
            'chain=("embed", "blocks.*", "head")))`',
        )
    return plan.pipeline


def _check_tied(tied: Sequence[Mapping[int, Sequence[str]]], stage_ranks: StageRanks) -> None:
    """Refuse tied parameters whose gradients could not be added.

    That each rank of `tp` has the same elements in both stages was checked with the styles.

    Args:
        tied: For each tied parameter its names in each stage.
        stage_ranks: Which rank has which stages.
    """
    for names in tied:
        got = ", ".join(f"`{first_name}`" for first_name, *_ in names.values())
        ranks = {stage_ranks.rank_of(stage) for stage in names}
        # `fully_shard` of one stage replaces the parameter there and leaves that of the other
        # stage: on this rank the two would no longer be tied.
        if len(ranks) < len(names):
            raise ModelError(
                "two stages of one rank have the same parameter",
                got=got,
                fix="use a number of ranks or a split that puts them on two ranks, or into one "
                "stage",
            )


def _check_units(stages: Sequence[Sequence[str]], layout: Layout) -> None:
    """Refuse a unit that is not inside one module of the chain."""
    # A unit is gathered by the forward of one module, and stages call modules of the chain only.
    chain: list[str] = []
    for stage in stages:
        chain.extend(stage)
    for unit in layout.units:
        if not any(contains(name, unit) for name in chain):
            raise ConfigError(
                "a unit contains several modules of the pipeline's chain",
                got=f"`{unit}`",
                fix="name units that are modules of the chain, or inside one",
            )


def _make_tied(
    tied: Sequence[Mapping[int, Sequence[str]]], stage_ranks: StageRanks, ctx: DistContext
) -> list[TiedParam]:
    """Make the process groups of the tied parameters of this rank. Collective."""
    pp_rank = ctx.comm.rank("pp")
    peers = ctx.mesh.spec.peers(ctx.rank, "pp")
    records: list[TiedParam] = []
    for names in tied:
        names_of_rank = {stage_ranks.rank_of(stage): names[stage] for stage in names}
        if pp_rank not in names_of_rank:
            continue
        ranks = [peers[rank] for rank in sorted(names_of_rank)]
        # Only the ranks of this parameter call `new_group`, so it must not wait for the world.
        group = dist.new_group(ranks, use_local_synchronization=True, group_desc="tied")
        assert isinstance(group, dist.ProcessGroup)
        # One rank counts the parameter in the norm and saves it; the others refer to its name.
        # The rank of the lowest stage, which need not be the lowest rank: stages are interleaved.
        copy_of = None
        first_stage = min(names)
        if pp_rank != stage_ranks.rank_of(first_stage):
            copy_of = names[first_stage][0]
        all_names = [name for stage in sorted(names) for name in names[stage]]
        records.append(TiedParam(names_of_rank[pp_rank][0], all_names, group, copy_of))
    return records


def _make_run(engine: PipelineEngine, ctx: DistContext) -> RunMethod:
    def run(method: str, *args: Tree, **kwargs: Tree) -> Tree:
        if method != "forward":
            raise ModelError(
                "a pipeline runs `forward` only",
                got=f"`{method}`",
                fix="call the method on a model of one process",
            )
        # With gradients the caller would run backward through the output, which only one rank has.
        if torch.is_grad_enabled():
            raise ModelError(
                "a pipeline runs forward and backward of all micro-batches together",
                got="a call with gradients enabled",
                fix="write `faccel.forward_backward(loss_fn, model, window, scaler, ctx)`, "
                "or `with torch.no_grad():`",
            )
        engine.fp8_scales.refresh()
        gather_before_inference_mode(engine)
        return infer(engine, StageInputs(args, kwargs), ctx)

    return run


def _grad_sync(engine: nn.Module, *, on: bool) -> AbstractContextManager[None]:
    raise ModelError(
        "a pipeline reduces gradients once per window, so `grad_sync` has no effect",
        got=f"`grad_sync(model, on={on})`",
        fix="write `faccel.forward_backward`, which reduces once for a window",
    )


def _tied_copies(engine: nn.Module) -> Mapping[int, str]:
    assert isinstance(engine, PipelineEngine)
    copies: dict[int, str] = {}
    for tied in engine.tied:
        if tied.copy_of is not None:
            copies[id(engine.parameter(tied.name))] = tied.copy_of
    return copies


def _tied_names(engine: nn.Module) -> Mapping[int, Sequence[str]]:
    assert isinstance(engine, PipelineEngine)
    return {id(engine.parameter(tied.name)): tied.names for tied in engine.tied}


def _grad_reducer(module: nn.Module, engine: nn.Module) -> GradReducer:
    assert isinstance(engine, PipelineEngine)
    return OwnedParams(module, frozenset(map(id, module.parameters())), engine.reset)


def _loss_rank(engine: nn.Module) -> int:
    assert isinstance(engine, PipelineEngine)
    return engine.stage_ranks.last_rank


PIPELINE = Parallelism(
    "pipeline",
    _wrap,
    wrap_optimizer,
    _grad_sync,
    sync_buffers,
    pipeline_forward_backward=forward_backward,
    loss_rank=_loss_rank,
    tied_copies=_tied_copies,
    tied_names=_tied_names,
    grad_reducer=_grad_reducer,
)
