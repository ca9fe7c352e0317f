"""Forward and backward of all micro-batches of a window, by a schedule of Megatron-core."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch

from faccel.backends.megatron.groups import parallel_state
from faccel.backends.model_calls import StoppedCall, arguments_of_call, calls_error
from faccel.comm.objects import broadcast_objects
from faccel.context import DistContext
from faccel.errors import DataError, ModelError
from faccel.parallel.forward import to_fp32
from faccel.protocols import MicroBatchLoss
from faccel.random.generators import call_seeded
from faccel.tree import Tree, flatten


@attrs.define(eq=False)
class Pipeline:
    """The stage of a rank, and whether an earlier schedule has failed.

    Args:
        chunk: The stage, in Megatron-core's DDP.
        has_failed: Whether this rank has left a schedule before its end. Messages between the
            stages may then be out of order.
    """

    chunk: Any
    has_failed: bool = False


def forward_backward(
    pipeline: Pipeline,
    losses: Sequence[MicroBatchLoss],
    factors: Sequence[float | torch.Tensor],
    ctx: DistContext,
) -> torch.Tensor:
    """Run all micro-batches; return their losses, equal on all ranks of the pipeline."""
    shape = None
    if ctx.mesh.spec.pp > 1:
        # The draws of this call must not change those of the window, which runs it again.
        shape = _batch_shape(*call_seeded(arguments_of_call, losses[0], 0))
    steps = list(zip(losses, factors, strict=True))

    def step(data: Iterator[tuple[MicroBatchLoss, float | torch.Tensor]], model: Any) -> Any:
        loss, factor = next(data)
        return _run_stage(loss, factor * len(losses), model, shape)

    # The schedule divides each loss by their number, and `factor` is the weight already.
    records = _run_schedule(step, iter(steps), pipeline, len(losses), shape, forward_only=False)
    values = torch.zeros(len(losses), dtype=torch.float32, device=ctx.device)
    if _is_last_stage():
        values = torch.stack([record.float() for record in records])
    if ctx.mesh.spec.pp == 1:
        return values
    return ctx.comm.broadcast(values, ctx.mesh.spec.pp - 1, "pp")


def infer(
    pipeline: Pipeline, args: tuple[Tree, ...], kwargs: Mapping[str, Tree], ctx: DistContext
) -> torch.Tensor:
    """Run one forward through the pipeline; return its output on every rank of it."""

    def step(data: object, model: Any) -> Any:
        output = model(*args, **kwargs)
        return output, lambda output, non_loss_data: output

    shape = _batch_shape(args, kwargs)
    # One micro-batch, of which only the last rank has the output.
    records = _run_schedule(step, None, pipeline, 1, shape, forward_only=True)
    last = ctx.mesh.spec.pp - 1
    metas: list[tuple[tuple[int, ...], torch.dtype]] = []
    # The other ranks need its shape before they can receive it.
    output = torch.empty(0)
    if _is_last_stage():
        output = to_fp32(records[0]).contiguous()
        metas.append((tuple(output.shape), output.dtype))
    ((size, dtype),) = broadcast_objects(metas, ctx, src=last, axis="pp")
    if not _is_last_stage():
        output = torch.empty(size, dtype=dtype, device=ctx.device)
    return ctx.comm.broadcast(output, last, "pp")


def _run_schedule(
    step: Callable[[Any, Any], Any],
    data: Iterator[Any] | None,
    pipeline: Pipeline,
    num_micro_batches: int,
    shape: tuple[int, int] | None,
    *,
    forward_only: bool,
) -> list[torch.Tensor]:
    schedules: Any = importlib.import_module("megatron.core.pipeline_parallel")
    # Without a pipeline no shape is used.
    micro_batch_size, seq_length = shape or (1, 1)
    if shape is not None and pipeline.has_failed:
        raise ModelError(
            "a pipeline of Megatron-core cannot continue after an error inside of a window",
            got="an earlier error, after which other stages have sent messages that none received",
            fix="let the error end the run, and resume from a checkpoint",
        )
    # Until the end: an error of any kind leaves it set.
    pipeline.has_failed = True
    records = schedules.get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=data,
        model=[pipeline.chunk],
        num_microbatches=num_micro_batches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        # As outputs are not losses, they are not divided by the number of micro-batches.
        collect_non_loss_data=forward_only,
    )
    pipeline.has_failed = False
    return records


def _is_last_stage() -> bool:
    return parallel_state().is_pipeline_last_stage()


def _run_stage(
    loss: MicroBatchLoss, factor: float | torch.Tensor, model: Any, shape: tuple[int, int] | None
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    """Run a loss function with the stage of this rank, on the last one to its end.

    Returns:
        The loss or the output of the stage, and what the schedule calls with the loss.
    """
    outputs: list[torch.Tensor] = []

    def call(*args: Tree, **kwargs: Tree) -> torch.Tensor:
        if outputs:
            raise calls_error("a second call")
        if shape is not None and not model.config.variable_seq_lengths:
            _check_shape(_batch_shape(args, kwargs), shape)
        output = model(*args, **kwargs)
        outputs.append(output)
        # The other stages have no output of the model to compute a loss from.
        if not _is_last_stage():
            raise StoppedCall(output)
        return to_fp32(output)

    def with_record(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return value * factor, value.detach()

    try:
        value = loss(call)
    except StoppedCall as stopped:
        return stopped.value, with_record
    if not outputs:
        raise calls_error("no call")
    return value, with_record


def _batch_shape(args: tuple[Tree, ...], kwargs: Mapping[str, Tree]) -> tuple[int, int]:
    """Return the number of rows and the length of the sequences of a micro-batch.

    Stages receive tensors of `[sequence, batch, hidden]`, whose shape each of them must know.
    """
    # The tokens come first in all of its language models.
    for leaf in flatten([list(args), dict(kwargs)])[0]:
        if isinstance(leaf, torch.Tensor):
            if leaf.ndim != 2:
                break
            num_rows, length = leaf.shape
            return num_rows, length
    raise ModelError(
        "the first tensor that a pipeline of Megatron-core gets must be the tokens",
        got="no tensor of shape [batch, sequence]",
        fix="write `model(tokens, position_ids, attention_mask, labels=labels)` in `loss_fn`",
    )


def _check_shape(shape: tuple[int, int], first: tuple[int, int]) -> None:
    if shape != first:
        raise DataError(
            "`window` has micro-batches of different shapes, but a pipeline needs equal ones",
            got=f"{first} and {shape}",
            fix='write `faccel.shard(loader, ctx, tail="full")`, or '
            "`TransformerConfig(variable_seq_lengths=True)`",
        )
