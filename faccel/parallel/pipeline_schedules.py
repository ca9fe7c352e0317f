"""PyTorch's pipeline stage and schedules; imported lazily, because they take long to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

from faccel.errors import ConfigError

Schedule = PipelineScheduleSingle | PipelineScheduleMulti
LossFn = Callable[[Any, Any], torch.Tensor]
"""`loss_fn(output, target)`, as torch's schedules call it."""


class Stage(PipelineStage):
    """A stage with known shapes, so that nothing is run to infer them.

    `PipelineStage` clears gradients of FSDP modules in this method (torch 2.13), also those of
    earlier windows.
    """

    def _post_metadata_inference_cleanup(self) -> None:
        pass

    # PyTorch 2.11 refuses inputs that are not contiguous, such as `tokens[:, :-1]`. Their shapes
    # are those for which the stage was made.
    def _validate_fwd_input(self, args: object, kwargs: object) -> None:
        pass


class MakeSchedule(Protocol):
    """Makes a schedule of PyTorch for the stages of this rank."""

    def __call__(
        self, stages: Sequence[Stage], num_micro_batches: int, loss_fn: LossFn | None
    ) -> Schedule:
        """Return the schedule for `num_micro_batches`; without `loss_fn` it only runs forward."""
        ...


# `scale_grads=False`: `MicroBatch.scale` weights the micro-batches, torch must not divide again.


def _one_f_one_b(
    stages: Sequence[Stage], num_micro_batches: int, loss_fn: LossFn | None
) -> Schedule:
    return Schedule1F1B(stages[0], num_micro_batches, loss_fn, scale_grads=False)


def _gpipe(stages: Sequence[Stage], num_micro_batches: int, loss_fn: LossFn | None) -> Schedule:
    return ScheduleGPipe(stages[0], num_micro_batches, loss_fn, scale_grads=False)


def _interleaved(
    stages: Sequence[Stage], num_micro_batches: int, loss_fn: LossFn | None
) -> Schedule:
    # the parameter is a list of a private base class, and lists are invariant
    stage_list = cast("list[Any]", list(stages))
    try:
        return ScheduleInterleaved1F1B(stage_list, num_micro_batches, loss_fn, scale_grads=False)
    except ValueError as error:
        raise ConfigError(
            f"the interleaved schedule does not support {num_micro_batches} micro-batches",
            got=str(error),
            fix=f"use a multiple of {stages[0].group_size}",
        ) from None


SCHEDULES: Mapping[str, MakeSchedule] = {
    "1f1b": _one_f_one_b,
    "gpipe": _gpipe,
    "interleaved": _interleaved,
}
"""The schedules, by their names in `PipelineConfig.schedule`."""
