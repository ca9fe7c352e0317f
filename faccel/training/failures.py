"""What all ranks do when one of them fails in a window: try again, leave it out, or raise."""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

import attrs

from faccel.call_site import call_site, call_site_of_error
from faccel.comm.rank_errors import is_consequence, raise_naming_rank
from faccel.context import DistContext
from faccel.device_table import is_host
from faccel.errors import ConfigError, FaccelError, RankFailedError, causes, short_text, summary
from faccel.mesh import WORLD
from faccel.training.failure_policy import FailurePolicy
from faccel.training.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from faccel.protocols import Recovery

_logger = logging.getLogger(__name__)

RAISE, SKIP, RETRY, FOLLOW = "raise", "skip", "retry", "follow"
# If ranks fail at the same time in different ways, the first of these wins.
_SEVEREST_FIRST = (RAISE, SKIP, RETRY)


@attrs.frozen
class FailureReport:
    """What one rank reports after a failure.

    Args:
        rank: The rank of the world.
        window: The number of its call of `forward_backward`, the same on all ranks.
        action: `"follow"` on a rank that has only noticed the failure of another one.
        got: Its error, and the line of the user's code that raised it.
        max_rows: For `"retry"`: the most rows of a micro-batch in the next attempt.
        has_read: Whether it has read the batches of the window again.
        fix: What the other ranks print, if all ranks raise.
    """

    rank: int
    window: int
    action: str
    got: str = ""
    max_rows: int = 0
    has_read: bool = False
    fix: str = "fix the error of that rank"


@attrs.frozen
class Decision:
    """What all ranks do.

    Args:
        action: `"raise"`, `"skip"` or `"retry"`.
        cause: The report of the rank that failed; None if no rank has reported it.
        max_rows: For `"retry"`: the most rows of a micro-batch.
        has_read: Whether a rank has read its batches again: the weights are counted again.
    """

    action: str
    cause: FailureReport | None
    max_rows: int = 0
    has_read: bool = False


def decide(reports: Sequence[FailureReport | None]) -> Decision:
    """Return what all ranks do, from the reports of all of them.

    Effects: pure.

    Args:
        reports: None for a rank that has ended, or has not come in time.

    Examples:
        >>> decide([FailureReport(0, 3, "follow"), FailureReport(1, 3, "retry", "OOM", 4)]).max_rows
        4
        >>> decide([FailureReport(0, 4, "follow"), FailureReport(1, 3, "skip", "bad")]).action
        'raise'
    """
    known = [report for report in reports if report is not None]
    causes = [report for report in known if report.action != FOLLOW]
    # The severest first; of equal ones that of the lowest rank.
    causes.sort(key=lambda report: _SEVEREST_FIRST.index(report.action))
    if not causes:
        return Decision(RAISE, None)
    # A rank in another window has already used the gradients of this one.
    is_same_window = len({report.window for report in known}) == 1
    if len(known) < len(reports) or not is_same_window:
        return Decision(RAISE, causes[0])
    max_rows = min(report.max_rows for report in causes)
    has_read = any(report.has_read for report in causes)
    return Decision(causes[0].action, causes[0], max_rows, has_read)


def _has_own_groups(ctx: DistContext) -> bool:
    """Whether the engine has process groups that only it can leave, as DeepSpeed does."""
    return ctx.parallelism.optimizer_step is not None


def _recovery(ctx: DistContext) -> Recovery | None:
    """Return how the ranks agree on a failure; None where a rank that fails must end at once."""
    if _has_own_groups(ctx):
        return None
    return ctx.comm.recovery


def check_recovery(name: str, ctx: DistContext) -> None:
    """Raise if the ranks cannot continue after a failure of one of them.

    Args:
        name: The function or the arguments that need it, in backticks.
        ctx: The context.

    Raises:
        ConfigError: They cannot.
    """
    if ctx.world_size == 1 or _recovery(ctx) is not None:
        return
    if _has_own_groups(ctx):
        got = f"strategy {ctx.parallelism.name}"
        fix = "train with DDP or FSDP2, without `strategy`"
    elif ctx.config.debug:
        got = "debug=True"
        fix = "write `faccel.init(debug=False)`, or run without `FACCEL_DEBUG`"
    elif not is_host(ctx.device):
        got = f"{ctx.world_size} processes on {ctx.device.type}"
        fix = f"run one process, or leave {name} out"
    else:
        got = "a process group that `faccel.init` has not created, or a system other than Linux"
        fix = "leave `torch.distributed.init_process_group` out: `faccel.init` calls it"
    raise ConfigError(
        f"{name} needs ranks that can leave their collectives after a failure", got=got, fix=fix
    )


def agreeing(ctx: DistContext) -> AbstractContextManager[None]:
    """Let errors of collectives in the body pass as they are: `agree_on_failure` finds the cause.

    Effects: ambient.
    """
    recovery = _recovery(ctx)
    if recovery is None or recovery.is_active:
        return _NOTHING_TO_AGREE
    return _active(recovery)


# One for all calls: a generator for each takes 2 us, of a window that may take 1 ms.
_NOTHING_TO_AGREE = nullcontext()


@contextmanager
def _active(recovery: Recovery) -> Generator[None]:
    recovery.is_active = True
    try:
        yield
    finally:
        recovery.is_active = False


def is_agreeing(ctx: DistContext) -> bool:
    """Return whether the body of `agreeing` runs: a caller agrees on failures."""
    recovery = _recovery(ctx)
    return recovery is not None and recovery.is_active


def agree_on_failure(
    error: Exception, report: FailureReport, doing: str, ctx: DistContext
) -> Decision:
    """Find out with all other ranks what to do after `error`. Collective, for ranks that fail.

    A rank that has not failed takes part because its collectives raise. Afterwards the ranks can
    communicate again, unless one of them is missing.

    Args:
        error: The exception of this rank.
        report: What this rank reports, unless its exception follows from that of another rank.
        doing: The name of the function that fails.
        ctx: The context.

    Returns:
        What all ranks do. For `"raise"` the caller raises `error`, with a `raise` in its `except`,
        which adds no frame to the traceback.

    Raises:
        RankFailedError: Another rank failed, and it is raised there.
    """
    recovery = _recovery(ctx)
    if recovery is None:
        if ctx.world_size > 1:
            return Decision(RAISE, None)
        return decide([report])
    follows = is_consequence(error)
    if follows:
        report = attrs.evolve(report, action=FOLLOW, got="", max_rows=0)
    else:
        _logger.warning("rank %d failed in `%s`: %s", ctx.rank, doing, report.got)
    reports = _exchange(report, recovery)
    # A rank may have begun its next window already: all of them count from there.
    ctx.lifetime.continue_from_window(max(item.window for item in reports if item is not None))
    decision = decide(reports)
    if decision.action != RAISE or not follows:
        return decision
    if decision.cause is not None:
        raise _failed_elsewhere(decision.cause) from None
    if isinstance(error, RuntimeError):
        raise_naming_rank(error, doing, WORLD, ctx.comm)
    return decision  # the user has raised another exception from that of a collective


def stop_all_ranks(error: Exception, doing: str, ctx: DistContext) -> None:
    """Let the other ranks raise a `RankFailedError`; the caller raises `error`.

    Args:
        error: The exception of this rank.
        doing: The name of the function that fails.
        ctx: The context.

    Raises:
        RankFailedError: `error` follows from the failure of another rank.
    """
    if _recovery(ctx) is None or is_agreeing(ctx):
        return
    report = FailureReport(
        ctx.rank,
        ctx.lifetime.num_windows,
        RAISE,
        described(error),
        fix="fix the error of that rank, and load a checkpoint: ranks may have different "
        "parameters",
    )
    agree_on_failure(error, report, doing, ctx)


def _exchange(report: FailureReport, recovery: Recovery) -> list[FailureReport | None]:
    """Return the reports of all ranks, and let them communicate again if all have reported."""
    recovery.interrupt()
    texts = recovery.exchange(json.dumps(attrs.asdict(report)))
    reports = [FailureReport(**json.loads(text)) if text else None for text in texts]
    if all(text is not None for text in texts) and not recovery.renew():
        # Every rank has as many renewals left: all of them raise.
        return [None, *reports]
    return reports


def _root_cause(error: BaseException) -> BaseException:
    *_, root = causes(error)
    return root


def described(error: BaseException) -> str:
    """Return the class and the message of the cause of an exception, and the user's line.

    Effects: pure.
    """
    cause = _root_cause(error)
    site = call_site_of_error(cause.__traceback__)
    if site == "unknown":
        # faccel has raised it: the line is the user's call.
        site = call_site()
    return f"{short_text(summary(cause))} at {site}"


def fix_of(error: BaseException, policy: FailurePolicy, action: str, *, has_gradients: bool) -> str:
    """Return how to fix a failure in `forward_backward`, if all ranks raise.

    Effects: pure.

    Args:
        error: The exception of the rank that failed.
        policy: The arguments of `forward_backward`.
        action: What that rank reports.
        has_gradients: Whether `policy` does not apply, because of an earlier backward.
    """
    if action != RAISE or has_gradients:
        # A rank alone cannot find out which of these it is.
        return (
            "fix the error of that rank; `retry` and `skip` do not apply after another backward "
            "of the same update, after a rank has ended the window, or if a rank does not answer "
            "within a tenth of `timeout_s`"
        )
    if policy.retry is not None and policy.retry.handles(error):
        return (
            "fix the error of that rank; its micro-batches cannot get smaller, or its batches "
            "could not be read twice"
        )
    if is_out_of_memory(error):
        return "pass `retry=faccel.Retry()` to `faccel.forward_backward`, or use less memory"
    cause = _root_cause(error)
    name = type(cause).__name__
    if isinstance(cause, FaccelError):
        # faccel raises its errors with a fix; a user's `DataError` may have none.
        if cause.fix:
            return f"on that rank, {cause.fix}"
        name = f"faccel.errors.{name}"
    return (
        f"fix the error of that rank, or pass `skip=({name},)` to `faccel.forward_backward` to "
        "leave out its window"
    )


def _failed_elsewhere(cause: FailureReport) -> RankFailedError:
    return RankFailedError(
        f"rank {cause.rank} failed, so all ranks stop", got=cause.got, fix=cause.fix
    )


def log_decision(decision: Decision, ctx: DistContext) -> None:
    """Log on rank 0 what all ranks do after a failure, which the rank that failed has logged."""
    assert decision.cause is not None
    if ctx.rank != 0:
        return
    rank, got = decision.cause.rank, decision.cause.got
    if decision.action == SKIP:
        _logger.warning("left out a window, because rank %d failed: %s", rank, got)
        return
    _logger.warning(
        "run a window again with at most %d rows per micro-batch, because rank %d failed: %s",
        decision.max_rows,
        rank,
        got,
    )
