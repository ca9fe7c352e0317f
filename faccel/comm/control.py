"""Process control: barriers, functions for one rank, and decisions of all ranks together."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import attrs
import torch

from faccel.call_site import call_site, override_call_site
from faccel.checks import flag_value
from faccel.comm.all_or_error import Failure, gather_failures
from faccel.comm.pack import check_rank
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import ConfigError, DesyncError, RankFailedError, nearest, short_repr
from faccel.mesh import WORLD

P = ParamSpec("P")
T = TypeVar("T")


@effectful(COLLECTIVE)
def barrier(ctx: DistContext, *, axis: str = WORLD) -> None:
    """Return when every rank of the axis has called it.

    Effects: collective.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: barrier(ctx), 2).trace[0].op
        'barrier'
    """
    require_context(ctx, "faccel.barrier(ctx)")
    if axis == WORLD:
        ctx.comm.begin_call("barrier")
    ctx.comm.barrier(axis)


@attrs.frozen
class Agreement:
    """The flags that any rank raised: the same on all ranks.

    `verdict.nan` and `verdict["nan"]` return the same boolean.

    Args:
        raised_by: For each flag the lowest rank of the axis that raised it, None if no rank did.

    Examples:
        >>> verdict = Agreement({"nan": 2, "stop": None})
        >>> verdict.nan, verdict["stop"], verdict.any
        (True, False, True)
    """

    raised_by: dict[str, int | None]

    def __getitem__(self, flag: str) -> bool:
        if flag not in self.raised_by:
            raise ConfigError(
                "`flag` must be one of the flags that `agree` was called with",
                got=short_repr(flag),
                fix=nearest(flag, self.raised_by),
            )
        return self.raised_by[flag] is not None

    def __getattr__(self, flag: str) -> bool:
        # While `pickle` or `copy` builds an instance, it has no `raised_by` yet. Reading it would
        # call this method again, without end.
        if flag == "raised_by" or flag not in self.raised_by:
            raise AttributeError(flag)
        return self[flag]

    @property
    def any(self) -> bool:
        """Whether any rank raised any flag."""
        return any(rank is not None for rank in self.raised_by.values())


@effectful(COLLECTIVE)
def agree(ctx: DistContext, *, axis: str = WORLD, **flags: bool | torch.Tensor) -> Agreement:
    """Combine flags over ranks: a flag is True on every rank if any rank passes True.

    Effects: collective. One all-reduce of `int64[number of flags + 2]`; the host waits for it.

    Args:
        ctx: The world.
        axis: `"world"`, `"data"` or an axis of the mesh.
        **flags: The same names on every rank; booleans or 0-d tensors.

    Raises:
        ConfigError: A flag is not a bool, a number or a 0-d tensor.
        DesyncError: Ranks pass different flags.

    Returns:
        The flags, and the lowest rank that raised each.

    Examples:
        >>> from faccel.testing import simulate
        >>> verdict = simulate(lambda ctx: agree(ctx, nan=ctx.rank > 1, stop=False), 4)[0]
        >>> verdict.nan, verdict.raised_by
        (True, {'nan': 2, 'stop': None})
    """
    require_context(ctx, "faccel.agree(ctx, stop=stop)")
    # Keyword arguments may come in another order on another rank.
    names = sorted(flags)
    if not names:
        return Agreement({})
    size = ctx.comm.size(axis)
    # A raised flag is sent as `size - rank`, so that the lowest rank has the maximum. The value is
    # at least 1; 0 means that no rank raised the flag.
    own_value = size - ctx.comm.rank(axis)
    # Tensors stay on the device until the one `tolist` below: a single wait of the host.
    bools: list[torch.Tensor] = []
    for name in names:
        flag_value(name, flags[name])
        flag = torch.as_tensor(flags[name], device=ctx.device)
        bools.append(flag.bool())
    raised = torch.stack(bools)
    # `max(hash) == -max(-hash)` only if all ranks have the same hash
    names_hash = zlib.crc32(",".join(names).encode())
    hashes = torch.tensor([names_hash, -names_hash], device=ctx.device)
    row = torch.cat([raised.long() * own_value, hashes])
    *values, largest, negated_smallest = ctx.comm.all_reduce(row, "max", axis).tolist()
    if largest != -negated_smallest:
        raise DesyncError(
            "ranks called `agree` with different flags",
            got=f"rank {ctx.comm.rank(axis)}: {', '.join(names)}",
            fix="pass the same flags on every rank",
        )
    raised_by: dict[str, int | None] = dict.fromkeys(names)
    for name, value in zip(names, values, strict=True):
        if value:
            raised_by[name] = size - value
    return Agreement(raised_by)


@effectful(COLLECTIVE)
@contextmanager
def main_first(ctx: DistContext, *, local: bool = False) -> Generator[None]:
    """Run the body on rank 0 first, then on the others; for downloads and caches.

    Effects: collective.

    Args:
        ctx: The world.
        local: Whether the first process of every node goes first, instead of rank 0 of the world.

    Raises:
        RankFailedError: On the waiting ranks, if the body raised on the rank that went first, or
            the process of that rank ended. They wait as long as it is alive, also longer than
            `timeout_s`.

    Examples:
        >>> from faccel.testing import simulate
        >>> order = []
        >>> def fn(ctx):
        ...     with main_first(ctx):
        ...         order.append(ctx.rank)
        >>> _ = simulate(fn, 3)
        >>> order[0]
        0
    """
    require_context(ctx, "faccel.main_first(ctx)")
    # The first rank communicates where the block ends, the others where it begins. Debug mode
    # compares lines, so all of them use the line where it begins.
    site = call_site()
    goes_first = ctx.is_local_main if local else ctx.is_main
    turn = ctx.comm.new_turn(local=local, timeout_s=ctx.config.timeout_s)
    if goes_first:
        # a `return`, a `break` or a SystemExit leaves the body without an Exception
        failure: Failure | None = Failure(ctx.rank, "a body that was left early")
        try:
            with turn.working():
                yield
            failure = None
        except Exception as error:
            failure = Failure.of(error, ctx)
            raise
        finally:
            # However the body ends, the other ranks wait in the gather below.
            with override_call_site(site):
                turn.wait(went_first=True)
                gather_failures(failure, ctx)
        return
    with override_call_site(site):
        # Before the gather, whose timeout does not depend on whether the first rank is alive.
        turn.wait(went_first=False)
        failures = gather_failures(None, ctx)
    # Not `raise_on_all_ranks`: the first rank raises its own error instead, which an `all_or_error`
    # around this block exchanges. So it must exchange this one, too, and not let it pass.
    for first_failure in failures:
        if first_failure is not None:
            raise RankFailedError(
                f"rank {first_failure.rank} could not finish the body of `main_first`",
                got=first_failure.got,
                fix=first_failure.fix,
            )
    # Outside of the override: a collective in the body has its own line.
    yield


def on_rank(rank: int, ctx: DistContext) -> Callable[[Callable[P, T]], Callable[P, T | None]]:
    """Return a decorator: the function runs on one rank; on the other ranks it returns None.

    Effects: pure. The decorated function must not call a collective.

    Args:
        rank: The rank of the world that runs it.
        ctx: The world.

    Examples:
        >>> from faccel.testing import fake_context
        >>> on_rank(1, fake_context(0, 2))(lambda: "ran")() is None
        True
    """
    require_context(ctx, "faccel.on_rank(rank, ctx)")
    # When the decorator is made, not when the function runs: otherwise a rank that does not exist
    # would mean that the function never runs, without an error.
    check_rank("rank", rank, ctx, WORLD)

    return _runs_if(is_here=ctx.rank == rank)


def _runs_if(*, is_here: bool) -> Callable[[Callable[P, T]], Callable[P, T | None]]:
    def decorate(fn: Callable[P, T]) -> Callable[P, T | None]:
        @functools.wraps(fn)
        def run(*args: P.args, **kwargs: P.kwargs) -> T | None:
            if not is_here:
                return None
            return fn(*args, **kwargs)

        return run

    return decorate


def on_main(ctx: DistContext) -> Callable[[Callable[P, T]], Callable[P, T | None]]:
    """Return a decorator: the function runs on rank 0; on the other ranks it returns None.

    Effects: pure. The decorated function must not call a collective.

    Examples:
        >>> from faccel.testing import fake_context
        >>> on_main(fake_context(0, 2))(lambda: "ran")()
        'ran'
    """
    require_context(ctx, "faccel.on_main(ctx)")
    return on_rank(0, ctx)


def on_local_main(ctx: DistContext) -> Callable[[Callable[P, T]], Callable[P, T | None]]:
    """Return a decorator: the function runs on one rank of each node, local rank 0.

    Effects: pure. On the other ranks it returns None. The decorated function must not call a
    collective.

    Examples:
        >>> from faccel.testing import fake_context
        >>> on_local_main(fake_context(0, 2))(lambda: "ran")()
        'ran'
    """
    require_context(ctx, "faccel.comm.on_local_main(ctx)")
    return _runs_if(is_here=ctx.is_local_main)
