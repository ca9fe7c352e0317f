"""torch's pipeline stage and schedules; imported where a pipeline runs, because they take long to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)

from faccel.errors import ConfigError


class Stage(PipelineStage):
    """A stage whose shapes are given: nothing is run to find them, so there is nothing to clean up after.

    torch's own clears the gradients of FSDP modules here (torch 2.13), those of earlier windows among them.
    """

    def _post_metadata_inference_cleanup(self) -> None:
        pass


def _interleaved(stages: list[Any], count: int, loss: Any) -> Any:
    try:
        return ScheduleInterleaved1F1B(stages, count, loss, scale_grads=False)
    except ValueError as error:
        what, fix = (
            "the interleaved schedule cannot run so many micro-batches",
            f"use a multiple of {stages[0].group_size}",
        )
        raise ConfigError(what, got=str(error), fix=fix) from None


SCHEDULES: Mapping[str, Callable[[list[Any], int, Any], Any]] = {
    "1f1b": lambda stages, count, loss: Schedule1F1B(stages[0], count, loss, scale_grads=False),
    "gpipe": lambda stages, count, loss: ScheduleGPipe(stages[0], count, loss, scale_grads=False),
    "interleaved": _interleaved,
}
"""`SCHEDULES[name](stages, count, loss_of)`: a schedule for `count` micro-batches."""
