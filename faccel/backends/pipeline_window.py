"""Forward and backward of all micro-batches of a window through a pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from faccel.backends.model_calls import arguments_of_call, calls_error
from faccel.backends.pipeline_engine import PipelineEngine, StageInputs
from faccel.comm.all_or_error import raise_on_all_ranks
from faccel.context import DistContext
from faccel.errors import DataError
from faccel.parallel.forward import to_fp32
from faccel.protocols import MicroBatchLoss
from faccel.random.generators import call_seeded
from faccel.random.hashing import mix
from faccel.training.gradient_guard import gradient_guard
from faccel.tree import Tree, full_tensor, local_tensor


def _first_inputs(
    engine: PipelineEngine, losses: Sequence[MicroBatchLoss], seed: int
) -> list[StageInputs]:
    """Return the inputs of the first stage, of equal shapes; no inputs on other ranks."""
    if engine.pp_rank != 0:
        return [StageInputs((), {}) for _ in losses]
    inputs = _inputs_of(losses, seed)
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


def _inputs_of(losses: Sequence[MicroBatchLoss], seed: int) -> list[StageInputs]:
    inputs: list[StageInputs] = []
    for index, loss in enumerate(losses):
        inputs.append(StageInputs(*call_seeded(arguments_of_call, loss, mix(seed, index))))
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
    if engine.runs_model and engine.pp_rank != 0:
        # All ranks of a pipeline have the same batches. Under the seed of the first rank they draw
        # the same random numbers.
        inputs = _inputs_of(losses, seed)
    return inputs, shapes, seed


# In place of the number of the shapes, if the first rank has failed.
_NO_SHAPES = -1


def forward_backward(
    engine: nn.Module,
    losses: Sequence[MicroBatchLoss],
    factors: Sequence[float | torch.Tensor],
    ctx: DistContext,
) -> torch.Tensor:
    """Run all micro-batches of a window through the pipeline; see `PipelineForwardBackward`.

    Effects: updates engine, collective.
    """
    with gradient_guard(ctx):
        return _run_schedule(engine, losses, factors, ctx)


def _run_schedule(
    engine: nn.Module,
    losses: Sequence[MicroBatchLoss],
    factors: Sequence[float | torch.Tensor],
    ctx: DistContext,
) -> torch.Tensor:
    # torch's are slow to import
    from faccel.parallel.pipeline_schedules import make_schedule, schedule_for

    assert isinstance(engine, PipelineEngine)
    engine.fp8_scales.refresh()
    num_micro_batches = len(losses)
    kind = schedule_for(
        engine.plan.schedule, num_micro_batches, engine.pp_size, is_tail=engine.has_run
    )
    # The first rank runs a loss function for the inputs of the first stage, the rank of the last
    # stage for its loss. Under the same seed both draw the same random numbers.
    inputs, shapes, seed = _begin_window(engine, losses, ctx)
    values: dict[int, torch.Tensor] = {}

    def loss_of(output: Tree, index: int) -> torch.Tensor:
        calls: list[Tree] = []

        def model(*args: Tree, **kwargs: Tree) -> Tree:
            calls.append(args)
            model_output = engine.join_output(output)
            if ctx.compute_dtype is None and ctx.param_dtype is None:
                return model_output
            return to_fp32(model_output)

        loss = call_seeded(losses[index], model, mix(seed, index))
        if len(calls) != 1:
            raise calls_error(f"{len(calls)} calls")
        # Detached, so that each graph is freed after its backward. Under `loss_parallel` a loss is
        # a DTensor.
        values[index] = full_tensor(loss.detach())
        # The gradient is sum_i factors[i] * d loss_i: torch's schedules do not divide it again.
        return loss * factors[index]

    stages = engine.make_training_stages(shapes, inputs)
    engine.shard_hooks.before_backward()
    schedule = make_schedule(kind, stages, num_micro_batches, loss_of)
    # Taken out first: their sum over the ranks was computed in earlier windows, and the
    # all-reduce must not add it once for each rank.
    grads = _take_tied_grads(engine)
    # `step` would split one batch into chunks, and a window has separate micro-batches. The target
    # of a micro-batch is its index, by which `loss_of` finds the loss function.
    args, kwargs = engine.arguments(inputs)
    schedule._step_microbatches(  # pyright: ignore[reportPrivateUsage]
        args,
        kwargs,
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
    """Return the losses, which the rank of the last stage has, on every rank of the pipeline.

    The ranks add them up: no rank has them before every rank has ended its backward. After a
    broadcast that rank would step while another one may still fail, and could not run the
    window again.
    """
    losses = torch.zeros(num_micro_batches, dtype=engine.loss_dtype, device=ctx.device)
    for index, value in values.items():
        losses[index] = value
    return ctx.comm.all_reduce(losses, "sum", "pp")


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
