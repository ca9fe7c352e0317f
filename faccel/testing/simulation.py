"""`simulate` runs a world of any size in one process; `fake_context` is one rank without peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from faccel.backends.table import choose
from faccel.checks import positive
from faccel.comm.single import SingleCollectives
from faccel.config import Config
from faccel.config_sources import resolve
from faccel.context import DistContext, Mesh, Topology
from faccel.errors import WorldError
from faccel.mesh import MeshSpec
from faccel.protocols import Collectives
from faccel.random.hashing import mix
from faccel.runtime.process_groups import (
    create_axis_groups,
    create_collectives,
    create_device_mesh,
)
from faccel.testing.assertions import (
    assert_all_finite,
    assert_pure,
    assert_replicated,
    equal_to_single_process,
)
from faccel.testing.group import BACKEND, Endpoint
from faccel.testing.limits import LIMITS
from faccel.testing.recovery import SimulatedRecovery
from faccel.testing.scheduler import Scheduler
from faccel.testing.store import SimulatedStore
from faccel.testing.world import Fault, InjectedError, TraceEvent, World

__all__ = [
    "Fault",
    "InjectedError",
    "Results",
    "TraceEvent",
    "assert_all_finite",
    "assert_pure",
    "assert_replicated",
    "equal_to_single_process",
    "fake_context",
    "simulate",
]

T = TypeVar("T")
_ConfigLike = Config | Mapping[str, Any] | None
_MeshLike = MeshSpec | Mapping[str, int] | str | None


class Results(tuple[T, ...], Generic[T]):
    """The return value of each rank, in rank order.

    Attributes:
        trace: Every call of a collective, in the order of the calls.
    """

    trace: tuple[TraceEvent, ...]


def simulate(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    config: _ConfigLike = None,
    mesh: _MeshLike = None,
    seed: int = 0,
    faults: Sequence[Fault] | None = None,
    timeout_s: float | None = None,
) -> Results[T]:
    """Run `fn(ctx, *args)` on every rank of a world inside this process.

    Ranks are threads, of which exactly one runs at a time, in a fixed order. So runs are
    deterministic, and a hang raises `DesyncError` at once. Each rank has its own process-wide
    generators of torch, numpy and Python, and its own c10d process groups. So `torch.manual_seed`,
    dropout and `torch.distributed` work as in separate processes, and so do DDP and FSDP2.

    Effects: pure, as far as `fn` is. The generators of this process are restored.

    Args:
        fn: The function of a rank; takes its context first.
        world_size: Number of ranks.
        *args: Further arguments of `fn`, shared between the ranks.
        config: As for `faccel.init`. The environment is not read.
        mesh: As in `Config`.
        seed: Seed of the process-wide generators, which differ between ranks.
        faults: Faults to inject, each into one call of a collective.
        timeout_s: Seconds without progress, that is without a switch to another rank, before the
            simulation raises. The limit ends endless loops; hangs are detected without it. It does
            not limit the whole run, so it holds on slow and loaded nodes. `math.inf` turns it off.
            None is the pytest ini option `simulate_timeout_s`, or 30 seconds.

    Returns:
        The results in rank order: a tuple with the attribute `trace`.

    Raises:
        DesyncError: Ranks disagree about the next collective, or a rank waits forever. The message
            contains what each rank was doing, and its call site.
        TimeoutError: A rank ran for `timeout_s` without a collective; shows the line.
        BaseException: The exception of the rank that failed first. A note names the rank.

    Examples:
        >>> import faccel
        >>> out = simulate(lambda ctx: faccel.reduce(torch.tensor(ctx.rank), ctx), 4)
        >>> out[0], out.trace[0].op, out.trace[0].num_bytes
        (tensor(6), 'all_reduce', 8)
    """
    # The scheduler would otherwise wait for a first rank that does not exist.
    positive("world_size", world_size)
    if timeout_s is None:
        timeout_s = LIMITS.timeout_s
    scheduler = Scheduler([mix(seed, rank) for rank in range(world_size)])
    world = World(scheduler, faults or ())
    contexts: list[DistContext] = []

    def run_rank(rank: int) -> T:
        connect = functools.partial(_connect, world, rank, world_size, config)
        ctx = _context(rank, world_size, config, mesh, connect)
        contexts.append(ctx)
        return fn(ctx, *args)

    results = Results(scheduler.run(run_rank, timeout_s))
    # Background saves end here; their errors are those of the simulation.
    for ctx in contexts:
        ctx.lifetime.close()
    # Last: an exception of a rank explains more than an open collective.
    world.check_complete()
    results.trace = tuple(world.trace)
    return results


def fake_context(
    rank: int, world_size: int, *, mesh: _MeshLike = None, config: _ConfigLike = None
) -> DistContext:
    """Return the context of one rank without peers, for functions that do not communicate.

    Effects: pure.

    Args:
        rank: The rank.
        world_size: Number of ranks.
        mesh: As in `Config`.
        config: As for `faccel.init`. The environment is not read.

    Returns:
        A context. Its collectives raise `WorldError`, unless `world_size` is 1.

    Examples:
        >>> fake_context(3, 8, mesh="dp_replicate=8").data_rank
        3
    """
    comm: Collectives = SingleCollectives()
    if world_size > 1:
        # It implements the protocol by raising from `__getattr__`.
        comm = cast("Collectives", _NoPeers(world_size))
    return _context(rank, world_size, config, mesh, lambda spec: comm)


def _context(
    rank: int,
    world_size: int,
    config: _ConfigLike,
    mesh: _MeshLike,
    connect: Callable[[MeshSpec], Collectives],
) -> DistContext:
    # On the CPU, also on a node with GPUs: threads share one CUDA context.
    overrides: dict[str, object] = {"device": "cpu"}
    if mesh is not None:
        overrides["mesh"] = mesh
    resolved = resolve(config, overrides=overrides)
    spec = (resolved.mesh or MeshSpec(dp_replicate=-1)).fill(world_size)
    topology = Topology(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        source="simulated",
    )
    return DistContext(
        topology=topology,
        config=resolved,
        device=torch.device("cpu"),
        mesh=Mesh(spec, functools.partial(create_device_mesh, "cpu")),
        comm=connect(spec),
        # An empty environment: variables of DeepSpeed must not change a simulation.
        parallelism=choose(spec, {}, resolved, "cpu"),
    )


def _connect(
    world: World, rank: int, world_size: int, config: _ConfigLike, spec: MeshSpec
) -> Collectives:
    """Create the process groups of a simulated rank."""
    if world_size == 1:
        return SingleCollectives()
    store = SimulatedStore(world, rank)
    world.stores.append(store)
    dist.init_process_group(
        BACKEND,
        store=store,
        rank=rank,
        world_size=world_size,
        pg_options=Endpoint(world, rank),
    )
    # One group per axis, so that the trace names the axis.
    groups = create_axis_groups(spec, rank, share=False)
    recovery = SimulatedRecovery(world, rank, world_size)
    return create_collectives(groups, resolve(config), store, recovery=recovery)


class _NoPeers:
    """The collectives of a fake context: every one raises."""

    recovery = None

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size

    def size(self, axis: str) -> int:
        return self._world_size

    def set_call_label(self, call: str, x: object) -> None:
        """Do nothing: labels are for the checks of debug mode."""

    def name_model(self, model: object) -> None:
        """Do nothing: there are no peers to compare with."""

    def count_waits(self, waits: object) -> None:
        """Do nothing: there are no peers to wait for."""

    def begin_call(self, call: str) -> None:
        """Do nothing: there are no peers to compare with."""

    def as_rank_error(self, error: RuntimeError, action: str, axis: str) -> None:
        """Return None: the error was not raised by a collective."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        def refuse(*args: object, **kwargs: object) -> NoReturn:
            raise WorldError(
                f"a fake context has no peers, so it does not support `{name}`",
                got=f"`fake_context` of a world of {self._world_size}",
                fix="write `faccel.testing.simulate(fn, world_size)`",
            )

        return refuse
