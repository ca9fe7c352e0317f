"""Pipeline parallel: PyTorch's schedules, over stages that are sharded like any other model."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn

from faccel.backends.fsdp import same_optimizer, shard_module, sync_buffers
from faccel.backends.fsdp_layout import Layout, contains
from faccel.backends.fsdp_param_hooks import gather_before_inference_mode
from faccel.backends.fsdp_reset import reset_iteration
from faccel.backends.pipeline_engine import PipelineEngine, StageInputs, TiedParam
from faccel.backends.pipeline_inference import infer
from faccel.comm.all_or_error import raise_on_all_ranks
from faccel.comm.tensors import broadcast
from faccel.context import DistContext
from faccel.errors import ConfigError, DataError, ModelError
from faccel.grad_reducer import GradReducer, OwnedParams
from faccel.mesh import WORLD
from faccel.parallel.forward import to_fp32
from faccel.parallel.pipeline_stages import StageModule, remove_other_stages, stages_of, tied_params
from faccel.parallel.sync_states import check_same_structure
from faccel.plan import PipelineConfig, Plan
from faccel.protocols import MicroBatchLoss, Parallelism, RunMethod
from faccel.random.generators import call_seeded
from faccel.random.hashing import mix
from faccel.training.gradient_guard import gradient_guard
from faccel.tree import Tree, full_tensor, local_tensor


def _wrap(module: nn.Module, plan: Plan, ctx: DistContext) -> tuple[nn.Module, RunMethod]:
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
    stages = stages_of(module, config, pp_size * config.stages_per_rank)
    layout = Layout.from_plan(module, plan, ctx)
    tied = tied_params(module, stages)
    _check_tied(tied, layout, pp_size)
    _check_units(stages, layout)
    # Nothing below is an error of the user's: from here on the module is updated.
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            # Every rank gets rank 0's values of all stages, while it still has all modules.
            tensor.copy_(broadcast(tensor.detach(), ctx, axis=WORLD))
    # Rank `r` of `R` has the stages `r`, `r + R`, ...: the layout of the interleaved schedule.
    own_stages = stages[pp_rank::pp_size]
    stage_modules: list[StageModule] = []
    own_names: list[str] = []
    for names in own_stages:
        is_first = names is stages[0]
        stage_modules.append(StageModule(module, names, plan, ctx, is_first=is_first))
        own_names.extend(names)
    # Before sharding, so that the parameters of the other stages are freed.
    remove_other_stages(module, stages, own_names)
    for stage_module, names in zip(stage_modules, own_stages, strict=True):
        shard_module(stage_module, plan, layout.below(names), ctx)
    engine = PipelineEngine(stage_modules, config, _make_tied(tied, ctx), ctx)
    return engine, _make_run(engine, ctx)


def _config(plan: Plan, ctx: DistContext) -> PipelineConfig:
    if plan.pipeline is None:
        raise ConfigError(
            "a mesh with `pp` needs `Plan(pipeline=...)`, which lists the modules in order",
            got=str(ctx.mesh.spec),
            fix="write `plan=faccel.Plan(pipeline=faccel.parallel.PipelineConfig("
            'chain=("embed", "blocks.*", "head")))`',
        )
    return plan.pipeline


def _check_tied(tied: Sequence[Mapping[int, str]], layout: Layout, pp_size: int) -> None:
    """Refuse tied parameters whose gradients could not be added.

    Args:
        tied: For each tied parameter its name in each stage.
        layout: Of the model.
        pp_size: Number of ranks of the pipeline.
    """
    for names in tied:
        got = ", ".join(f"`{name}`" for name in names.values())
        styles: set[str | None] = set()
        ranks: set[int] = set()
        for stage, name in names.items():
            module_name = name.rpartition(".")[0]
            styles.add(layout.tp_styles.get(module_name))
            ranks.add(stage % pp_size)
        # The all-reduce of the gradients needs shards of the same elements on both ranks.
        if len(styles) > 1:
            raise ModelError(
                "a parameter that is tied between two stages is sharded over `tp` in one only",
                got=got,
                fix="leave both out of `tensor`, or untie them",
            )
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


def _make_tied(tied: Sequence[Mapping[int, str]], ctx: DistContext) -> list[TiedParam]:
    """Make the process groups of the tied parameters of this rank. Collective."""
    pp_rank, pp_size = ctx.comm.rank("pp"), ctx.comm.size("pp")
    peers = ctx.mesh.spec.peers(ctx.rank, "pp")
    records: list[TiedParam] = []
    for names in tied:
        name_of_rank = {stage % pp_size: name for stage, name in names.items()}
        if pp_rank not in name_of_rank:
            continue
        ranks = [peers[rank] for rank in sorted(name_of_rank)]
        # Only the ranks of this parameter call `new_group`, so it must not wait for the world.
        group = dist.new_group(ranks, use_local_synchronization=True, group_desc="tied")
        assert isinstance(group, dist.ProcessGroup)
        # One rank counts the parameter in the norm and saves it; the others refer to its name.
        # The rank of the lowest stage, which need not be the lowest rank: stages are interleaved.
        copy_of = None
        first_stage = min(names)
        if pp_rank != first_stage % pp_size:
            copy_of = names[first_stage]
        records.append(TiedParam(name_of_rank[pp_rank], group, copy_of))
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
        gather_before_inference_mode(engine)
        return infer(engine, StageInputs(args, kwargs), ctx)

    return run


class _Intercepted(BaseException):
    """Carries the arguments with which a loss function called its model.

    No `Exception`, which the loss function might catch.
    """

    def __init__(self, inputs: StageInputs) -> None:
        super().__init__()
        self.inputs = inputs


def _intercept_inputs(loss: MicroBatchLoss) -> StageInputs:
    """Run a loss function up to the call of its model; return the arguments of the call."""

    def intercept(*args: Tree, **kwargs: Tree) -> NoReturn:
        raise _Intercepted(StageInputs(args, kwargs))

    try:
        # The loss function prepares the inputs itself, for example renames them. The exception
        # ends it there: the rest is for the last rank, which has the output of the model.
        loss(intercept)
    except _Intercepted as intercepted:
        return intercepted.inputs
    raise _calls_error("no call")


def _calls_error(got: str) -> ModelError:
    return ModelError(
        "`loss_fn` must call its model once",
        got=got,
        fix="write `loss_fn(model, batch)` with one `model(...)`, as a pipeline runs it",
    )


def _first_inputs(
    engine: PipelineEngine, losses: Sequence[MicroBatchLoss], seed: int
) -> list[StageInputs]:
    """Return the inputs of the first stage, of equal shapes; no inputs on other ranks."""
    if engine.pp_rank != 0:
        return [StageInputs((), {}) for _ in losses]
    inputs = [call_seeded(_intercept_inputs, loss, mix(seed, i)) for i, loss in enumerate(losses)]
    # The shapes that torch's stages send are fixed.
    first_key = inputs[0].key()
    for index, micro_batch in enumerate(inputs):
        key = micro_batch.key()
        if key != first_key:
            raise DataError(
                f"`window` has micro-batches of different shapes, of which number {index} is the "
                "first that differs, but a pipeline needs equal ones",
                got=f"{first_key} and {key}",
                fix='write `faccel.shard(loader, ctx, tail="full")` or `tail="drop"`, so that the '
                "last batch of an epoch is as large as the others",
            )
    return inputs


def _begin_window(
    engine: PipelineEngine, losses: Sequence[MicroBatchLoss], ctx: DistContext
) -> tuple[list[StageInputs], int, int]:
    """Return the inputs of the first stage, the number of their shapes, and a common seed."""
    # Every rank draws, so that their generators advance by the same number of draws.
    seed = int(torch.randint(2**62, (), dtype=torch.int64).item())
    own_error: Exception | None = None
    inputs: list[StageInputs] = []
    shapes = _NO_SHAPES
    try:
        inputs = _first_inputs(engine, losses, seed)
        if engine.pp_rank == 0:
            shapes = engine.number_of_shapes(inputs[0])
    except Exception as error:  # of the user's function: the other ranks wait below
        if ctx.comm.recovery is not None:
            raise  # `forward_backward` lets the other ranks know
        own_error = error
    row = torch.tensor([seed, shapes], device=ctx.device)
    seed, shapes = ctx.comm.broadcast(row, 0, "pp").tolist()
    if shapes == _NO_SHAPES:
        raise_on_all_ranks(own_error, ctx, "compute the inputs of the pipeline", axis="pp")
    return inputs, shapes, seed


# In place of the number of the shapes, if the first rank has failed.
_NO_SHAPES = -1


def _forward_backward(
    engine: nn.Module,
    losses: Sequence[MicroBatchLoss],
    factors: Sequence[float | torch.Tensor],
    ctx: DistContext,
) -> torch.Tensor:
    with gradient_guard(ctx):
        return _run_schedule(engine, losses, factors, ctx)


def _run_schedule(
    engine: nn.Module,
    losses: Sequence[MicroBatchLoss],
    factors: Sequence[float | torch.Tensor],
    ctx: DistContext,
) -> torch.Tensor:
    from faccel.parallel.pipeline_schedules import SCHEDULES  # torch's are slow to import

    assert isinstance(engine, PipelineEngine)
    num_micro_batches = len(losses)
    make_schedule = SCHEDULES[_schedule_of(engine, num_micro_batches)]
    # The first rank runs a loss function for the inputs of the first stage, the last rank for the
    # loss of the last one. Under the same seed both draw the same random numbers.
    inputs, shapes, seed = _begin_window(engine, losses, ctx)
    values: dict[int, torch.Tensor] = {}

    def loss_of(output: Tree, index: int) -> torch.Tensor:
        calls: list[Tree] = []

        def model(*args: Tree, **kwargs: Tree) -> Tree:
            calls.append(args)
            if ctx.compute_dtype is None:
                return output
            return to_fp32(output)

        loss = call_seeded(losses[index], model, mix(seed, index))
        if len(calls) != 1:
            raise _calls_error(f"{len(calls)} calls")
        # Detached, so that each graph is freed after its backward. Under `loss_parallel` a loss is
        # a DTensor.
        values[index] = full_tensor(loss.detach())
        # The gradient is sum_i factors[i] * d loss_i: torch's schedules do not divide it again.
        return loss * factors[index]

    stages = engine.make_training_stages(shapes, inputs[0])
    engine.shard_hooks.before_backward()
    schedule = make_schedule(stages, num_micro_batches, loss_of)
    # Taken out first: their sum over the ranks was computed in earlier windows, and the
    # all-reduce must not add it once for each rank.
    grads = _take_tied_grads(engine)
    # `step` would split one batch into chunks, and a window has separate micro-batches. The target
    # of a micro-batch is its index, by which `loss_of` finds the loss function.
    schedule._step_microbatches(  # pyright: ignore[reportPrivateUsage]
        [micro_batch.args for micro_batch in inputs],
        [dict(micro_batch.kwargs) for micro_batch in inputs],
        list(range(num_micro_batches)),
        [],
    )
    _add_tied_grads(engine, grads)
    engine.has_run = True
    return _losses_on_all_ranks(values, num_micro_batches, engine, ctx)


def _losses_on_all_ranks(
    values: Mapping[int, torch.Tensor],
    num_micro_batches: int,
    engine: PipelineEngine,
    ctx: DistContext,
) -> torch.Tensor:
    """Return the losses, which the last rank has, on every rank of the pipeline.

    The ranks add them up: no rank has them before every rank has ended its backward. After a
    broadcast the last rank would step while another one may still fail, and could not run the
    window again.
    """
    # Every rank must pass the dtype to receive, and only the last rank has a loss to read it from.
    dtype = torch.float32
    if next(engine.parameters()).dtype == torch.float64:
        dtype = torch.float64
    losses = torch.zeros(num_micro_batches, dtype=dtype, device=ctx.device)
    for index, value in values.items():
        losses[index] = value
    # The last stage is on the last rank under each schedule: stage `i` is on rank `i % pp_size`.
    return ctx.comm.all_reduce(losses, "sum", "pp")


def _schedule_of(engine: PipelineEngine, num_micro_batches: int) -> str:
    """Return the schedule of a window. A shorter one at the end of an epoch runs with GPipe.

    Raises:
        ConfigError: The first window has fewer micro-batches than there are ranks.
    """
    kind = engine.plan.schedule
    # 1F1B needs a micro-batch for each stage in its warmup. GPipe runs with any number. The
    # interleaved schedule raises its own error.
    if num_micro_batches >= engine.pp_size or kind == "interleaved":
        return kind
    # A first window that is too short is a mistake in the settings, not the end of an epoch.
    if not engine.has_run:
        raise ConfigError(
            "a pipeline needs at least as many micro-batches as ranks",
            got=f"{num_micro_batches} micro-batches on {engine.pp_size} ranks",
            fix=f"use `grad_accum={engine.pp_size}` or more, or a smaller `pp`",
        )
    return "gpipe"


def _take_tied_grads(engine: PipelineEngine) -> list[torch.Tensor | None]:
    """Remove and return the gradients of tied parameters that earlier windows have added up."""
    grads: list[torch.Tensor | None] = []
    for tied in engine.tied:
        param = engine.parameter(tied.name)
        grads.append(param.grad)
        param.grad = None
    return grads


def _add_tied_grads(engine: PipelineEngine, grads: Sequence[torch.Tensor | None]) -> None:
    """Add the gradients of the other ranks, then those of earlier windows."""
    for tied, earlier_grad in zip(engine.tied, grads, strict=True):
        param = engine.parameter(tied.name)
        if param.grad is not None:
            # FSDP2 has averaged each over the data ranks, and shards have the same coordinates. A
            # sum over stages, not a mean: d loss / d w is the sum over all uses of `w`.
            dist.all_reduce(local_tensor(param.grad), group=tied.group)
        if earlier_grad is None:
            continue
        if param.grad is None:
            param.grad = earlier_grad
        else:
            param.grad = param.grad + earlier_grad


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


def _grad_reducer(module: nn.Module, engine: nn.Module) -> GradReducer:
    params = frozenset(map(id, module.parameters()))
    return OwnedParams(module, params, functools.partial(reset_iteration, engine))


PIPELINE = Parallelism(
    "pipeline",
    _wrap,
    same_optimizer,
    _grad_sync,
    sync_buffers,
    pipeline_forward_backward=_forward_backward,
    tied_copies=_tied_copies,
    grad_reducer=_grad_reducer,
)
