"""PyTorch's pipeline stage and schedules; imported lazily, because they take long to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
)

from faccel.errors import ConfigError, short_repr
from faccel.tree import Tree

Schedule = PipelineScheduleSingle | PipelineScheduleMulti
LossFn = Callable[[Any, Any], torch.Tensor]
"""`loss_fn(output, target)`, as torch's schedules call it."""


class Stage(PipelineStage):
    """A stage with known shapes, so that nothing is run to infer them.

    `PipelineStage` clears gradients of FSDP modules in this method (torch 2.13), also those of
    earlier windows.
    """

    micro_batches: Sequence[tuple[tuple[Tree, ...], Mapping[str, Tree]]] = ()
    """The inputs of the model for each micro-batch."""

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: tuple[Any, ...], *others: Any, **kwargs: Any
    ) -> Any:
        # torch passes them to the first stage only.
        submod: Any = self.submod
        submod.micro_batch = self.micro_batches[fwd_chunk_id]
        return super().forward_one_chunk(fwd_chunk_id, args, *others, **kwargs)

    # Two stages of one rank hand gradients over without a look at whether there are any (torch
    # 2.13): in inference an assertion of these two would fail.
    def get_local_bwd_output(self, mb_index: int) -> Any:
        if not self.has_backward:
            return ()
        return super().get_local_bwd_output(mb_index)

    def set_local_bwd_input(
        self, next_stage_bwd_outputs: tuple[torch.Tensor | None, ...], mb_index: int
    ) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def _post_metadata_inference_cleanup(self) -> None:
        pass

    # PyTorch 2.11 refuses inputs that are not contiguous, such as `tokens[:, :-1]`. Their shapes
    # are those for which the stage was made.
    def _validate_fwd_input(self, args: object, kwargs: object) -> None:
        pass


class MakeSchedule(Protocol):
    """Makes a schedule of PyTorch for the stages of this rank."""

    def __call__(
        self,
        stages: list[Any],
        n_microbatches: int,
        loss_fn: LossFn | None,
        *,
        scale_grads: bool,
    ) -> Schedule:
        """Return the schedule; without `loss_fn` it only runs forward."""
        ...


class MakeSingle(Protocol):
    """Makes a schedule of PyTorch for the only stage of this rank."""

    def __call__(
        self, stage: Any, n_microbatches: int, loss_fn: LossFn | None, *, scale_grads: bool
    ) -> PipelineScheduleSingle: ...


def _single(make: MakeSingle) -> MakeSchedule:
    def make_schedule(
        stages: list[Any], n_microbatches: int, loss_fn: LossFn | None, *, scale_grads: bool
    ) -> Schedule:
        return make(stages[0], n_microbatches, loss_fn, scale_grads=scale_grads)

    return make_schedule


class Supports(Protocol):
    """Whether a schedule runs a number of micro-batches."""

    def __call__(self, num_micro_batches: int, num_ranks: int) -> bool: ...


def _any_number(num_micro_batches: int, num_ranks: int) -> bool:
    return True


def _one_each(num_micro_batches: int, num_ranks: int) -> bool:
    # 1F1B needs a micro-batch for each stage in its warmup.
    return num_micro_batches >= num_ranks


def _full_rounds(num_micro_batches: int, num_ranks: int) -> bool:
    # The rounds of a rank are of equal size, and a round has at least one micro-batch for a rank.
    num_rounds = max(1, num_micro_batches // num_ranks)
    return num_micro_batches % num_rounds == 0


def _two_each(num_micro_batches: int, num_ranks: int) -> bool:
    # One for each of the two stages of a rank.
    return num_micro_batches >= 2 * num_ranks


@attrs.frozen
class ScheduleKind:
    """A schedule, and the numbers of micro-batches that it runs.

    Args:
        make: Makes the schedule of one window.
        supports: Whether it runs a number of micro-batches.
        tail: The schedule that runs other numbers, at the end of an epoch. Its stages are on the
            same ranks.
        needs: What it needs, for the error; `{ranks}` and `{stages}` are numbers.
    """

    make: MakeSchedule
    supports: Supports = _any_number
    tail: str = ""
    needs: str = ""


KINDS: Mapping[str, ScheduleKind] = {
    "1f1b": ScheduleKind(
        _single(Schedule1F1B), _one_each, "gpipe", "at least as many micro-batches as ranks"
    ),
    "gpipe": ScheduleKind(_single(ScheduleGPipe)),
    "looped-bfs": ScheduleKind(ScheduleLoopedBFS),
    "interleaved": ScheduleKind(
        ScheduleInterleaved1F1B, _full_rounds, "looped-bfs", "a multiple of the number of ranks"
    ),
    "interleaved-zero-bubble": ScheduleKind(
        ScheduleInterleavedZeroBubble,
        _full_rounds,
        "looped-bfs",
        "a multiple of the number of ranks",
    ),
    "zbv": ScheduleKind(ScheduleZBVZeroBubble),
    "dualpipev": ScheduleKind(
        ScheduleDualPipeV, _two_each, "zbv", "at least as many micro-batches as stages"
    ),
}
"""The schedules, by their names in `PipelineConfig.schedule`."""


def schedule_for(
    name: str, num_micro_batches: int, num_ranks: int, *, is_tail: bool
) -> ScheduleKind:
    """Return the schedule of a window with `num_micro_batches`.

    Args:
        name: The schedule of the plan.
        num_micro_batches: Of this window.
        num_ranks: Of the pipeline.
        is_tail: Whether an earlier window has run. This one may then end an epoch, and a number
            that the schedule does not support runs with another one.

    Raises:
        ConfigError: The first window has an unsupported number of micro-batches.
    """
    kind = KINDS[name]
    if kind.supports(num_micro_batches, num_ranks):
        return kind
    # A first window with a wrong number is a mistake in the settings, not the end of an epoch.
    if is_tail:
        return KINDS[kind.tail]
    number = num_ranks
    while not kind.supports(number, num_ranks):
        number += num_ranks
    raise ConfigError(
        f"the schedule {short_repr(name)} needs {kind.needs}",
        got=f"{num_micro_batches} micro-batches on {num_ranks} ranks",
        fix=f"use `grad_accum={number}`, or a smaller `pp`",
    )


def make_schedule(
    kind: ScheduleKind, stages: Sequence[Stage], num_micro_batches: int, loss_fn: LossFn
) -> Schedule:
    """Return PyTorch's schedule of a window."""
    # `scale_grads=False`: `MicroBatch.scale` weights the micro-batches, torch must not divide
    # again.
    return kind.make(list(stages), num_micro_batches, loss_fn, scale_grads=False)


def make_forward_schedule(
    stages: Sequence[Stage], num_micro_batches: int, *, is_v: bool
) -> Schedule:
    """Return a schedule that runs forward only, for any number of micro-batches."""
    # Without backward no other schedule with one stage on each rank is faster than GPipe.
    kind = KINDS["gpipe"]
    if len(stages) > 1:
        kind = KINDS["looped-bfs"]
    # The actions of the backward do nothing without a loss.
    if is_v:
        kind = KINDS["zbv"]
    return kind.make(list(stages), num_micro_batches, None, scale_grads=False)
