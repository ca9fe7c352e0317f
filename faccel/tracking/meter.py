"""The meter: throughput, utilization of the hardware, and waits, over the last steps of all ranks.

Counting costs a microsecond per step: `tick` returns a new record, and nothing is communicated or
read from a device. `rates` gathers one row of integers per rank, so sums over ranks are exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import NamedTuple

import attrs
import torch

from faccel import device_table
from faccel.checks import instance_of, integer, positive
from faccel.context import DistContext, require_context
from faccel.device_table import is_host
from faccel.effects import AMBIENT, COLLECTIVE, effectful
from faccel.errors import ConfigError, short_repr
from faccel.lifetime import WaitTimes
from faccel.mesh import WORLD
from faccel.tracking.flops import peak_of_context
from faccel.tracking.journal import Journal, open_journal
from faccel.tracking.memory_categories import WeakState, peak_memory
from faccel.tracking.rank_counts import (
    UNKNOWN,
    RankCounts,
    Rates,
    combined,
    nanoseconds,
    or_unknown,
)
from faccel.tree import Tree


class _Counts(NamedTuple):
    """What was counted up to the end of a step; the time is without that of phases."""

    time_s: float
    num_steps: int
    num_samples: int
    num_tokens: int
    data_s: float
    num_batches: int
    comm_s: float


# The counts of `_Counts` as a plain tuple, which takes less time, and the end of the step before:
# after a step of the model each object that `tick` reads is a miss of the processor's cache. None
# at the first step of a window.
_End = tuple[float, int, int, int, float, int, float, "_End | None"]


@attrs.frozen(eq=False)
class _Options:
    """What `init_meter` was called with."""

    flops_per_sample: float | None
    peak_flops: float | None
    window: int
    warmup: int
    waits: WaitTimes
    journal: Journal | None
    state: WeakState | None
    first_of_replicas: tuple[int, ...]


# A tuple, and not a record of attrs: that takes as long as all the rest of `tick`.
class Meter(tuple[_Options, _End, "_End | None"]):
    """The counts of this rank: `init_meter` returns the first one, `tick` the next ones."""

    # The options, the end of the last step, and that of the last full window, from which the ends
    # of its steps are found: the number of ends that are kept is constant, whatever the number of
    # steps.
    __slots__ = ()

    # A meter is compared as an object: equality and hash of a tuple would visit the ends of all
    # steps of a window, each inside of the next one.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)

    # Nothing in it changes but the waits, which the context counts: those of a copy would stand
    # still.
    def __deepcopy__(self, memo: object) -> Meter:
        return self

    @property
    def num_steps(self) -> int:
        """Number of `tick` calls."""
        return self[1][1]

    @property
    def num_samples(self) -> int:
        """Samples of this rank."""
        return self[1][2]

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank."""
        return self[1][3]

    def __repr__(self) -> str:
        counts = f"num_samples={self.num_samples}, num_tokens={self.num_tokens}"
        return f"Meter(num_steps={self.num_steps}, {counts})"


@effectful(AMBIENT)
def init_meter(
    ctx: DistContext,
    *,
    flops_per_sample: float | None = None,
    peak_flops: float | None = None,
    window: int = 50,
    warmup: int = 1,
    run: str | None = None,
    state: Tree = None,
    clock: Callable[[], float] = time.monotonic,
) -> Meter:
    """Return a meter at step 0.

    Effects: ambient. Reads the clock, asks PyTorch for the name of the device, opens a file.
    From now on, the context counts how long its loaders and collectives wait. A loader that is
    being iterated already is not counted.

    Args:
        ctx: The context.
        flops_per_sample: Operations of forward and backward of one sample, from `flops_of`. Of the
            full model, on every rank.
        peak_flops: Operations per second of this rank's device at its peak. None takes the
            published dense peak in the precision of the configuration; fp8 is compared with bf16.
        window: How many steps `rates` looks back.
        warmup: How many first steps are left out, such as those that compile.
        run: The name of the run, for `goodput`. Then each rank writes a journal into the folder
            `ctx.config.run_dir / run`, until the context is closed or has a meter with another
            `run`. A run that exists continues.
        state: Models and optimizers, as for `peak_memory`, so that `rates` returns what the memory
            of their device is used for. The meter does not keep them alive.
        clock: Returns seconds. All meters of a context must have the same one.

    Raises:
        ConfigError: A number is not positive, or operations are not below 2**63, `state` has
            neither a model nor an optimizer, the context has a meter with another clock, or the
            folder of the run cannot be created.

    Examples:
        >>> from faccel.testing import fake_context
        >>> init_meter(fake_context(0, 1))
        Meter(num_steps=0, num_samples=0, num_tokens=0)
    """
    require_context(ctx, "faccel.tracking.init_meter(ctx)")
    # Checked here, and not in `tick`: a meter is created once.
    if flops_per_sample is not None:
        _check_flops("flops_per_sample", flops_per_sample)
    if peak_flops is None:
        peak_flops = peak_of_context(ctx)
    else:
        _check_flops("peak_flops", peak_flops)
    integer("window", window, at_least=1)
    integer("warmup", warmup, at_least=0)
    weak_state = None
    if state is not None:
        peak_memory(state, ctx)  # raises here, and not in `rates`
        weak_state = WeakState(state)
    waits = _waits_of(ctx, clock)
    journal = None
    if run is not None:
        journal = open_journal(run, ctx, waits)
    options = _Options(
        flops_per_sample,
        peak_flops,
        window,
        warmup,
        waits,
        journal,
        weak_state,
        ctx.mesh.spec.peers(0, "data"),
    )
    start_s = clock() - waits.in_phases_s
    start = (start_s, 0, 0, 0, waits.data_s, waits.num_batches, waits.comm_s, None)
    return Meter((options, start, None))


def _check_flops(name: str, value: float) -> None:
    positive(name, value)
    # `rates` sends them as integers of 64 bits.
    if not 1 <= value < 2**63:
        raise ConfigError(
            f"`{name}` must be at least 1 and below 2**63",
            got=f"{name}={short_repr(value)}",
            fix=f"count operations and not teraflops, as in `{name}=1e12`; of a sample with more, "
            "those of a token, with `tick(meter, samples=num_tokens)`",
        )


def _waits_of(ctx: DistContext, clock: Callable[[], float]) -> WaitTimes:
    """Return the counters of the context, which the first meter creates."""
    waits = ctx.lifetime.waits
    # A notebook creates meters again and again: all count in the same place.
    if waits is None:
        instance_of("clock()", clock(), (int, float), fix="write `clock=time.monotonic`")
        waits = WaitTimes(clock)
        ctx.lifetime.count_waits(waits)
        ctx.comm.count_waits(waits)
    if waits.clock != clock:
        raise ConfigError(
            "`clock` must be that of the first meter of the context",
            got="another function",
            fix="pass the same function, or create another context for the second clock",
        )
    return waits


@effectful(AMBIENT)
def tick(meter: Meter, *, samples: int = 0, tokens: int = 0) -> Meter:
    """Return the meter after a step.

    Effects: ambient. Reads the clock of the meter and what the context has waited; the result
    depends on nothing else, and `meter` is unchanged. With `run`, a line of the journal is
    overwritten. The host does not wait for the device: a step
    ends when the loop reaches `tick`. A loop cannot be faster than its device for long.

    Args:
        meter: From `init_meter` or `tick`.
        samples: How many samples this rank has processed in the step, as in `batch.num_valid`.
        tokens: How many tokens.

    Raises:
        ConfigError: A count is not an int of at least 0; a tensor would let the host wait.

    Examples:
        >>> from faccel.testing import fake_context
        >>> tick(init_meter(fake_context(0, 1)), samples=8, tokens=4096)
        Meter(num_steps=1, num_samples=8, num_tokens=4096)
    """
    # One test for each in an ordinary step; the messages are made elsewhere.
    if type(meter) is not Meter:
        _check_meter(meter)
    if type(samples) is not int or samples < 0:
        _check_count("samples", samples)
    if type(tokens) is not int or tokens < 0:
        _check_count("tokens", tokens)
    options, before, older = meter
    _, num_steps, num_samples, num_tokens, _, _, _, _ = previous = before
    waits = options.waits
    now_s = waits.clock()
    if options.journal is not None:
        options.journal.step(now_s)
    # The chain of ends begins again, and the window before it is the last one that is needed.
    if num_steps % options.window == 0:
        older, previous = before, None
    last = (
        now_s - waits.in_phases_s,
        num_steps + 1,
        num_samples + samples,
        num_tokens + tokens,
        waits.data_s,
        waits.num_batches,
        waits.comm_s,
        previous,
    )
    return Meter((options, last, older))


def _check_meter(meter: Meter) -> None:
    fix = "write `meter = init_meter(ctx)`, then `meter = tick(meter, samples=len(x))`"
    instance_of("meter", meter, Meter, fix=fix)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, torch.Tensor):
        raise ConfigError(
            f"`{name}` must be an int, because reading a tensor waits for its device",
            got=f"a tensor on `{value.device}`",
            fix=f"count on the host, as in `{name}=x.numel()` or `{name}=batch.num_valid`",
        )
    # Sums of NumPy's integers overflow.
    if isinstance(value, Integral) and not isinstance(value, int):
        raise ConfigError(
            f"`{name}` must be an int, and not an integer of another library",
            got=f"{name}={short_repr(value)}",
            fix=f"write `{name}=int(n)`",
        )
    integer(name, value, at_least=0)


@effectful(AMBIENT, COLLECTIVE)
def rates(meter: Meter, ctx: DistContext) -> Rates:
    """Return throughput, utilization and waits over the last steps of all ranks.

    Effects: ambient, collective. One all-gather of `int64[16]` over all ranks, for which the host
    waits: call it every tens of steps. Also reads the allocator's counters. With `run`, rank 0
    appends the result to a file for `faccel report`.

    Ranks of one model replica process the same samples: the first one of each replica counts.

    Args:
        meter: From `tick`.
        ctx: The context of `init_meter`.

    Examples:
        >>> import itertools
        >>> from faccel.testing import simulate
        >>> def fn(ctx):
        ...     meter = init_meter(ctx, window=4, warmup=0, clock=itertools.count().__next__)
        ...     for _ in range(6):
        ...         meter = tick(meter, samples=10 + ctx.rank)
        ...     return rates(meter, ctx)
        >>> result = simulate(fn, 2)[0]
        >>> result.samples_s, result.steps_s, result.num_samples
        (21.0, 1.0, 126)
    """
    require_context(ctx, "faccel.tracking.rates(meter, ctx)")
    _check_meter(meter)
    options = meter[0]
    result = combined(_gathered(_counts(meter, ctx), ctx), options.first_of_replicas)
    if options.journal is not None and ctx.is_main:
        options.journal.add_rates(result.known())
    return result


def _gathered(counts: RankCounts[int], ctx: DistContext) -> Sequence[Sequence[int]]:
    """Return the counts of each rank. Collective."""
    # One process often has steps of a millisecond, and a tensor takes longer than all the rest.
    if ctx.world_size == 1:
        return [counts]
    row = torch.tensor(counts, dtype=torch.int64, device=ctx.device)
    ctx.comm.set_call_label("rates", row)
    # The one point where the host waits for the device.
    return ctx.comm.all_gather(row, WORLD).tolist()


def _window(meter: Meter) -> tuple[_Counts, _Counts]:
    """Return the counts before the first step of the window, and those after its last one.

    They are equal before the first step after the warm-up.
    """
    options, newest, older = meter
    first_step = max(newest[1] - options.window, options.warmup)
    end = newest
    if older is not None and older[1] >= first_step:
        end = older
    while end[1] > first_step:
        # The first end of a chain has the same one before it as the chain before has last.
        before = end[7] or older
        assert before is not None
        end = before
    return _Counts(*end[:7]), _Counts(*newest[:7])


def _counts(meter: Meter, ctx: DistContext) -> RankCounts[int]:
    options = meter[0]
    first, last = _window(meter)
    # 0 would be a measurement: a loop without a loader of `shard` has none.
    data_ns = comm_ns = UNKNOWN
    if last.num_batches:
        data_ns = nanoseconds(last.data_s - first.data_s)
    if is_host(ctx.device):
        comm_ns = nanoseconds(last.comm_s - first.comm_s)
    return RankCounts(
        # The user's clock may have been set back, as the time of day: then no rate is known.
        max(nanoseconds(last.time_s - first.time_s), 0),
        last.num_steps - first.num_steps,
        last.num_samples - first.num_samples,
        last.num_tokens - first.num_tokens,
        data_ns,
        comm_ns,
        or_unknown(device_table.peak_bytes(ctx.device)),
        or_unknown(options.peak_flops),
        or_unknown(options.flops_per_sample),
        last.num_steps,
        last.num_samples,
        last.num_tokens,
        *_memory_counts(options.state, ctx),
    )


def _memory_counts(state: WeakState | None, ctx: DistContext) -> tuple[int, ...]:
    """Return the bytes of each category; unknown without models."""
    memory = None
    if state is not None:
        memory = state.peak_memory(ctx)
    if memory is None:
        return (UNKNOWN,) * 4
    sizes = (memory.parameters, memory.gradients, memory.optimizer, memory.activations)
    return tuple(map(or_unknown, sizes))
