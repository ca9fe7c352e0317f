"""Forward and backward of all micro-batches of an update, on any mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Literal, overload

import attrs
import torch

from faccel.checks import instance_of, shown
from faccel.comm.objects import broadcast_objects
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import DataError, ModelError
from faccel.training.backward import is_loss, loss_error, scaled_backward
from faccel.training.failure_policy import (
    FailurePolicy,
    Retry,
    check_exception_types,
    is_caused_by,
)
from faccel.training.failures import (
    RAISE,
    RETRY,
    SKIP,
    Decision,
    FailureReport,
    agree_on_failure,
    agreeing,
    check_recovery,
    described,
    fix_of,
    is_agreeing,
    log_decision,
)
from faccel.training.model import WrappedModel, check_context, check_wrapped, grad_sync
from faccel.training.precision import ScalerState, check_scaler
from faccel.training.window_attempt import (
    WindowStart,
    drop_gradients,
    micro_batches,
    num_rows_of,
)
from faccel.training.windows import MicroBatch, Window
from faccel.tree import Tree, full_tensor, map_leaves

if TYPE_CHECKING:
    from faccel.protocols import MicroBatchLoss

Model = Callable[..., Tree]
LossFn = Callable[[Model, MicroBatch], torch.Tensor]
"""`loss_fn(model, batch)` calls the model once and returns a scalar."""
LossAndAuxFn = Callable[[Model, MicroBatch], tuple[torch.Tensor, Tree]]
"""`loss_fn(model, batch)` calls the model once and returns a scalar and any other value."""


@overload
def forward_backward(
    loss_fn: LossFn,
    model: WrappedModel,
    window: Window,
    scaler: ScalerState,
    ctx: DistContext,
    *,
    retry: Retry | None = None,
    skip: tuple[type[Exception], ...] = (),
    has_aux: Literal[False] = False,
) -> tuple[torch.Tensor, ScalerState]: ...


@overload
def forward_backward(
    loss_fn: LossAndAuxFn,
    model: WrappedModel,
    window: Window,
    scaler: ScalerState,
    ctx: DistContext,
    *,
    retry: Retry | None = None,
    skip: tuple[type[Exception], ...] = (),
    has_aux: Literal[True],
) -> tuple[tuple[torch.Tensor, list[Tree]], ScalerState]: ...


@effectful(updates(".grad"), COLLECTIVE)
def forward_backward(
    loss_fn: LossFn | LossAndAuxFn,
    model: WrappedModel,
    window: Window,
    scaler: ScalerState,
    ctx: DistContext,
    *,
    retry: Retry | None = None,
    skip: tuple[type[Exception], ...] = (),
    has_aux: bool = False,
) -> tuple[torch.Tensor | tuple[torch.Tensor, list[Tree]], ScalerState]:
    """Run forward and backward of all micro-batches of a window, on any mesh.

    Effects: updates .grad, collective. As `scaled_backward` for each micro-batch, with its `scale`;
    gradients are reduced once.

    Where the mesh has pipeline stages, micro-batches run through the pipeline. On other meshes
    they run one by one.

    If a rank raises, in the loader, `loss_fn` or backward, all ranks stop and agree on what to do:

    - `retry`: all ranks run the window again with smaller micro-batches. Random numbers and buffers
      are those of before the window, and the gradients those of a run that had this size from the
      start. A rank that could not read its batches reads them once more. The size is in the
      returned scaler, for later windows and checkpoints.
    - `skip`: all ranks leave the window out. The next `optimizer_step` does nothing and returns
      `skipped=True`.
    - Otherwise the rank raises its exception, and the others `RankFailedError`.

    In each case the gradients of the model are dropped. If there was another backward since the
    last update, the exception is raised, because its gradients would be lost. Without a
    failure there is no further collective. Only on a mesh with `tp`, whose ranks would not meet,
    `retry` and `skip` add a barrier.

    Args:
        loss_fn: `loss_fn(model, batch)` gets a `MicroBatch`, calls `model` once and returns a
            scalar: the mean over the rows, or the sum over the valid ones if the window has a
            `weight`. On a pipeline, the arguments of that call are the input of the first stage,
            and its result is the output of the last stage. The first rank runs the function up to
            the call, and the rank of the last stage runs all of it.
        model: From `wrap`.
        window: From `windows`; iterated once. A pipeline needs as many micro-batches as ranks, of
            equal shapes.
        scaler: From `init_scaler`, or from the last function that returned it.
        ctx: The context.
        retry: When to run the window again; None is never.
        skip: Classes of exceptions after which the window is left out.
        has_aux: Whether `loss_fn` returns `(loss, aux)`.

    Returns:
        The loss of each micro-batch as `T[n]`, without its `scale`, equal on all ranks of a
        pipeline; and the new scaler. `n` is `len(window)`, more where micro-batches were cut into
        smaller ones, and 0 where the window was left out. With `has_aux`, `(losses, auxs)`
        instead of the losses: a list of what each micro-batch returned, with its tensors detached.

    Raises:
        ModelError: A loss is not a scalar, `loss_fn` does not call its model once, or `model` is
            not wrapped with `ctx`.
        ConfigError: The window has too few micro-batches for the schedule.
        DataError: `window` is not from `windows`, or its micro-batches have different shapes on
            a pipeline.
        RankFailedError: Another rank failed, and neither `retry` nor `skip` applies. Or a rank did
            not answer within a tenth of `timeout_s`, or had used the gradients already.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> from faccel.data.loader import shard
        >>> from faccel.testing import fake_context
        >>> from faccel.training.model import wrap
        >>> from faccel.training.precision import init_scaler
        >>> from faccel.training.windows import windows
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(1, 1), ctx)
        >>> loader = shard(DataLoader(torch.ones(4, 1), batch_size=1), ctx)
        >>> window = next(windows(loader, ctx, size=4))
        >>> loss_fn = lambda model, batch: model(batch.data).mean()
        >>> losses, scaler = forward_backward(loss_fn, model, window, init_scaler(ctx), ctx)
        >>> losses.shape
        torch.Size([4])
    """
    call = "faccel.forward_backward(loss_fn, model, window, scaler, ctx)"
    require_context(ctx, call)
    check_wrapped(model)
    check_context(model, ctx)
    fix = f"write `for window in faccel.windows(loader, ctx)` and `{call}`"
    instance_of("window", window, Window, fix=fix, error=DataError)
    check_scaler(scaler)
    check_exception_types("skip", skip)
    policy = FailurePolicy(retry, skip)
    number = ctx.lifetime.begin_window()
    start = None
    if policy.is_given:
        check_recovery("`retry` or `skip`", ctx)
        # Only a policy needs the state before the window.
        start = WindowStart.of(model, ctx)
    while True:
        attempt = _Attempt(loss_fn, window, scaler.max_rows, has_aux=has_aux)
        try:
            with agreeing(ctx):
                result = attempt.run(model, scaler, ctx)
                if start is not None and ctx.mesh.spec.tp > 1:
                    # Data ranks meet in the reduction of gradients, and stages in that of losses.
                    ctx.comm.barrier("tp")
                return result
        except Exception as error:
            drop_gradients([model] if start is None else start.models, ctx)
            outcome = _Rules(policy, start).outcome_of(error, attempt)
            window = outcome.window
            decision = _decide(error, outcome.report(ctx.rank, number), policy, ctx)
            if decision.action == RAISE:
                raise
        assert start is not None
        start.restore()
        log_decision(decision, ctx)
        if decision.action == SKIP:
            return attempt.skipped(scaler, ctx)
        if decision.has_read:
            window = window.weighed_again()
        scaler = attrs.evolve(scaler, max_rows=decision.max_rows)


def _decide(
    error: Exception, report: FailureReport, policy: FailurePolicy, ctx: DistContext
) -> Decision:
    """Return what all ranks do after the failure of this rank. Collective."""
    if not policy.is_given and is_agreeing(ctx):
        return Decision(RAISE, None)  # inside of `find_batch_size`, which agrees on it
    return agree_on_failure(error, report, "forward_backward", ctx)


@attrs.frozen(eq=False)
class _Outcome:
    """What a rank reports after its exception.

    Args:
        error: The exception; that of the second read, if its batches could not be read twice.
        action: What it asks for.
        max_rows: For a retry: the most rows of a micro-batch in the next attempt.
        has_read: Whether its batches could not be read, so that they were read again.
        fix: What the other ranks print, if all ranks raise.
        window: The window for the next attempt.
    """

    error: Exception
    action: str
    max_rows: int
    has_read: bool
    fix: str
    window: Window

    def report(self, rank: int, number: int) -> FailureReport:
        """Return what the other ranks get about the window of this number."""
        got = described(self.error)
        return FailureReport(
            rank, number, self.action, got, self.max_rows, has_read=self.has_read, fix=self.fix
        )


@attrs.frozen(eq=False)
class _Rules:
    """What this rank asks for after a failure in a window.

    Args:
        policy: The arguments of `forward_backward`.
        start: The state before the window; None without a policy.
    """

    policy: FailurePolicy
    start: WindowStart | None

    def outcome_of(self, error: Exception, attempt: _Attempt) -> _Outcome:
        """Return what to report after `error` in an attempt."""
        action, max_rows, window = RAISE, 0, attempt.window
        is_reading = window.failure is error
        # Gradients of an earlier backward are lost with those of this window.
        has_gradients = self.start is not None and self.start.has_gradients
        if self.start is not None and not has_gradients:
            if is_reading and self.policy.retries(error):
                # The other ranks wait for the report of this one, so it reads its batches once.
                window = window.read_again()
                error = window.failure or error
            if window.failure is None:
                max_rows = self.policy.rows_after(error, attempt.max_rows(window))
            # Retry first: an exception may be of both kinds, and no rows are lost by it.
            if max_rows:
                action = RETRY
            elif is_caused_by(error, self.policy.skip):
                action = SKIP
        fix = fix_of(error, self.policy, action, has_gradients=has_gradients)
        return _Outcome(error, action, max_rows, is_reading, fix, window)


class _Attempt:
    """One run of a window.

    Args:
        loss_fn: See `forward_backward`.
        window: See `forward_backward`.
        max_rows: The most rows of a micro-batch; None is no limit.
        has_aux: See `forward_backward`.
    """

    def __init__(
        self,
        loss_fn: LossFn | LossAndAuxFn,
        window: Window,
        max_rows: int | None,
        *,
        has_aux: bool,
    ) -> None:
        self._loss_fn = loss_fn
        self.window = window
        self._max_rows = max_rows
        self._has_aux = has_aux
        self._auxs: dict[int, Tree] = {}

    def max_rows(self, window: Window) -> int:
        """Return the most rows of a micro-batch of `window`."""
        largest = max((num_rows_of(batch) for batch in window.batches), default=0)
        if self._max_rows is None:
            return largest
        return min(largest, self._max_rows)

    def run(
        self, model: WrappedModel, scaler: ScalerState, ctx: DistContext
    ) -> tuple[torch.Tensor | tuple[torch.Tensor, list[Tree]], ScalerState]:
        """Run forward and backward of all micro-batches."""
        batches = micro_batches(self.window, self._max_rows)
        if model.parallelism.pipeline_forward_backward is None:
            losses, scaler = _one_by_one(self._loss_of, model, batches, scaler, ctx)
        else:
            losses, scaler = _pipelined(self._loss_of, model, batches, scaler, ctx)
        if not self._has_aux:
            return losses, scaler
        # A schedule may run micro-batches in another order.
        auxs = [self._auxs[index] for index in sorted(self._auxs)]
        if model.parallelism.pipeline_forward_backward is not None and ctx.mesh.spec.pp > 1:
            # The rank of the last stage has them, because it alone computes losses.
            src = model.parallelism.loss_rank(model.engine)
            auxs = broadcast_objects(auxs, ctx, src=src, axis="pp")
        return (losses, auxs), scaler

    def skipped(
        self, scaler: ScalerState, ctx: DistContext
    ) -> tuple[torch.Tensor | tuple[torch.Tensor, list[Tree]], ScalerState]:
        """Return the result of a window that is left out: no losses."""
        losses = torch.zeros(0, device=ctx.device)
        scaler = scaler.after_skipped_window()
        if self._has_aux:
            return (losses, []), scaler
        return losses, scaler

    def _loss_of(self, index: int, batch: MicroBatch, called: Model) -> torch.Tensor:
        """Return the loss of micro-batch `index`, computed with the model `called`."""
        result = self._loss_fn(called, batch)
        # First the usual case: a window may take 1 ms.
        if not self._has_aux and is_loss(result):
            return result
        loss, aux = _loss_and_aux(result, has_aux=self._has_aux)
        self._auxs[index] = map_leaves(_detached, aux)
        return loss


def _loss_and_aux(result: object, *, has_aux: bool) -> tuple[torch.Tensor, Tree]:
    """Return what a loss function returned, checked."""
    loss: object = result
    aux: Tree = None
    if has_aux:
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ModelError(
                "`loss_fn` must return `(loss, aux)`, because of `has_aux=True`",
                got=shown(result),
                fix="write `return loss, aux`, or leave `has_aux` out",
            )
        loss, aux = result
    elif isinstance(result, tuple):
        raise ModelError(
            "`loss_fn` must return a scalar tensor",
            got=shown(result),
            fix="write `return loss`, or pass `has_aux=True` to return `(loss, aux)`",
        )
    if not is_loss(loss):
        raise loss_error(loss)
    return loss, aux


def _detached(leaf: Tree) -> Tree:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach()
    return leaf


def _one_by_one(
    loss_of: Callable[[int, MicroBatch, Model], torch.Tensor],
    model: WrappedModel,
    batches: Iterable[MicroBatch],
    scaler: ScalerState,
    ctx: DistContext,
) -> tuple[torch.Tensor, ScalerState]:
    losses: list[torch.Tensor] = []
    for index, batch in enumerate(batches):
        with grad_sync(model, on=batch.sync):
            loss = loss_of(index, batch, model)
            scaler = scaled_backward(loss, scaler, ctx, scale=batch.scale)
        # Under `loss_parallel` a loss is a DTensor.
        losses.append(full_tensor(loss.detach()))
    return torch.stack(losses), scaler


def _pipelined(
    loss_of: Callable[[int, MicroBatch, Model], torch.Tensor],
    model: WrappedModel,
    batches: Iterable[MicroBatch],
    scaler: ScalerState,
    ctx: DistContext,
) -> tuple[torch.Tensor, ScalerState]:
    run = model.parallelism.pipeline_forward_backward
    assert run is not None
    scaler.check_before_backward()
    # A pipeline interleaves forward and backward of all micro-batches: it needs them at once.
    losses: list[MicroBatchLoss] = []
    factors: list[float | torch.Tensor] = []
    for index, batch in enumerate(batches):
        losses.append(partial(loss_of, index, batch))
        factors.append(batch.scale * scaler.scale)
    values = run(model.engine, losses, factors, ctx)
    return values, scaler.after_backward()
