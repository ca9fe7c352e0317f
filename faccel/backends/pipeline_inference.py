"""Forward of a batch of any size through a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from faccel.backends.fsdp_registration import free_gathered
from faccel.backends.pipeline_engine import PipelineEngine, StageInputs, TensorMeta
from faccel.comm.objects import broadcast_objects
from faccel.comm.tensors import broadcast
from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.parallel.forward import to_fp32
from faccel.parallel.pipeline_forward import OutputStructure
from faccel.tree import Tree, flatten, full_tensor, map_leaves

# The private base of torch's classes: users' own inherit from it, too.
_BATCH_NORM = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]


def infer(engine: PipelineEngine, inputs: StageInputs, ctx: DistContext) -> Tree:
    """Run forward on a batch, split into micro-batches of equal size; every rank gets the output.

    Collective. Tensors with as many rows as the first one are split; others go to every micro-batch
    unchanged. The last micro-batch is filled with repeats of the last row, whose outputs are
    dropped.
    """
    from faccel.parallel.pipeline_schedules import make_forward_schedule  # slow to import

    _check_batch_norm(engine)
    num_rows = _num_rows(inputs)
    # One micro-batch per rank keeps all ranks busy; every micro-batch needs a row.
    num_micro_batches = min(engine.pp_size, num_rows)
    size = -(-num_rows // num_micro_batches)
    # Rounding the size up may need fewer micro-batches: 5 rows on 4 ranks are 2 + 2 + 1.
    num_micro_batches = -(-num_rows // size)
    micro_batches = [
        _micro_batch(inputs, i * size, size, num_rows) for i in range(num_micro_batches)
    ]
    stages = engine.make_inference_stages(micro_batches)
    schedule = make_forward_schedule(stages, num_micro_batches, is_v=engine.stage_ranks.is_v)
    args, kwargs = engine.arguments(micro_batches)
    schedule._step_microbatches(  # pyright: ignore[reportPrivateUsage]
        args, kwargs, None, None
    )
    free_gathered(engine)
    outputs: Sequence[Tree] | None = None
    for stage in stages:
        # The last stage has the outputs of the model, in the order of the micro-batches.
        if stage.is_last:
            outputs = stage.output_chunks
    return _broadcast_output(outputs, num_rows, engine, ctx)


def _check_batch_norm(engine: nn.Module) -> None:
    for module in engine.modules():
        if isinstance(module, _BATCH_NORM) and module.training:
            raise ModelError(
                "a pipeline cannot run batch norm in training mode: its statistics would depend on "
                "the micro-batches",
                got=f"a {type(module).__name__}",
                fix="call `model.eval()` first",
            )


def _num_rows(inputs: StageInputs) -> int:
    """Return the number of rows of the first tensor that has a dimension."""
    num_rows = 0
    # Backwards, so that the first tensor is assigned last.
    for leaf in reversed(flatten([list(inputs.args), dict(inputs.kwargs)])[0]):
        if isinstance(leaf, torch.Tensor) and leaf.ndim > 0:
            num_rows = leaf.shape[0]
    if num_rows == 0:
        raise ModelError(
            "a pipeline expects a batch of at least one row",
            got="no tensor with rows",
            fix="pass a tensor with the batch as its first dimension",
        )
    return num_rows


def _micro_batch(inputs: StageInputs, start: int, size: int, num_rows: int) -> StageInputs:
    """Return `size` rows of the inputs from `start` on, with repeats of the last row at the end."""

    def take_rows(leaf: Tree) -> Tree:
        is_batch = isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == num_rows
        if not is_batch:
            return leaf
        # All micro-batches need one shape, because the shapes that torch's stages send are fixed.
        # Repeats of a real row are valid inputs, as zeros may not be.
        indices = torch.arange(start, start + size, device=leaf.device)
        return leaf.index_select(0, indices.clamp(max=num_rows - 1))

    args, kwargs = map_leaves(take_rows, [list(inputs.args), dict(inputs.kwargs)])
    return StageInputs(tuple(args), kwargs)


def _broadcast_output(
    outputs: Sequence[Tree] | None, num_rows: int, engine: PipelineEngine, ctx: DistContext
) -> Tree:
    """Return the output of the last stage, whose rank alone has `outputs`, on every rank."""
    last = engine.stage_ranks.last_rank
    columns: list[torch.Tensor] = []
    structure: OutputStructure | None = None
    if outputs is not None:
        structure = engine.structure
        if structure is None:  # a stage that calls its modules
            structure, _ = OutputStructure.split(outputs[0])
        columns = _concatenate(outputs, num_rows, ctx)
    # A receiver allocates memory, so the shapes are sent first.
    metas: list[TensorMeta] = [(tuple(column.shape), column.dtype) for column in columns]
    message: list[Tree] = broadcast_objects([metas, structure], ctx, src=last, axis="pp")
    metas, structure = message
    if outputs is None:
        columns = [torch.zeros(shape, dtype=dtype, device=ctx.device) for shape, dtype in metas]
    received = cast("list[torch.Tensor]", broadcast(columns, ctx, src=last, axis="pp"))
    assert structure is not None
    return structure.join(received)


def _concatenate(outputs: Sequence[Tree], num_rows: int, ctx: DistContext) -> list[torch.Tensor]:
    """Concatenate the outputs of the micro-batches, without the repeated rows."""
    rows: list[tuple[torch.Tensor, ...]] = []
    for output in outputs:
        if ctx.compute_dtype is not None or ctx.param_dtype is not None:
            output = to_fp32(output)
        if not isinstance(output, tuple):
            output = (output,)
        # A tensor-parallel head returns DTensors.
        rows.append(tuple(_full_rows(tensor) for tensor in output))
    # From one tuple for each micro-batch to one tensor for each output.
    concatenated: list[torch.Tensor] = []
    for column in zip(*rows, strict=True):
        full_batch = torch.cat(column)
        concatenated.append(full_batch[:num_rows])
    return concatenated


def _full_rows(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 0:
        raise ModelError(
            "a pipeline computes rows of outputs, and a model has returned a scalar",
            got=f"{tensor.dtype} without dimensions",
            fix="leave `labels` out, and compute the loss from the logits",
        )
    return full_tensor(tensor)
