"""For tests of user code: a world of any size inside one process, and a context with no peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NoReturn, TypeVar

import torch
import torch.distributed as dist

from faccel.backends.table import choose
from faccel.comm.collectives import SingleCollectives
from faccel.config import Config, resolve
from faccel.context import DistContext, Mesh, Topology
from faccel.errors import ConfigError, WorldError
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
    """What each rank returned, in rank order.

    Attributes:
        trace: Every call of a collective, in the order in which they were made.
    """

    trace: tuple[TraceEvent, ...]


def _context(
    rank: int,
    world_size: int,
    config: _ConfigLike,
    mesh: _MeshLike,
    comm: Callable[[MeshSpec], Collectives],
) -> DistContext:
    resolved = resolve(
        config, overrides={"device": "cpu"} | ({} if mesh is None else {"mesh": mesh})
    )
    spec = (resolved.mesh or MeshSpec(dp_replicate=-1)).fill(world_size)
    return DistContext(
        topology=Topology(
            rank=rank,
            world_size=world_size,
            local_rank=rank,
            local_world_size=world_size,
            source="simulated",
        ),
        config=resolved,
        device=torch.device("cpu"),
        mesh=Mesh(spec, functools.partial(create_device_mesh, "cpu")),
        comm=comm(spec),
        parallelism=choose(spec, {}, resolved, "cpu"),
    )


def simulate(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    config: _ConfigLike = None,
    mesh: _MeshLike = None,
    seed: int = 0,
    faults: Sequence[Fault] | None = None,
    timeout_s: float = 30.0,
) -> Results[T]:
    """Run `fn(ctx, *args)` on every rank of a world inside this process.

    Ranks are threads of which exactly one runs at a time, in a fixed order: runs are deterministic. Each has its own
    process-wide generators of torch, numpy and python and its own table of process groups, so that `torch.manual_seed`,
    dropout and `torch.distributed` do what they would in its own process. The communicator is a c10d process group
    with collectives, send and receive, on which torch's own DDP runs.

    Effects: pure, as far as `fn` is: the generators of this process are put back.

    Args:
        fn: What a rank does; it gets its context first.
        world_size: How many ranks.
        *args: Passed on; shared between the ranks.
        config: As for `faccel.init`, without the environment.
        mesh: As in `Config`.
        seed: Ranks start with process-wide generators seeded from it, each with others.
        faults: What goes wrong at which call of a collective, for tests of what happens then.
        timeout_s: Seconds of wall time until the simulation is given up.

    Returns:
        The results in rank order, a tuple that has `.trace`.

    Raises:
        DesyncError: Ranks disagree about the next collective, or one waits for ever; names what each was doing, and
            at which line.
        BaseException: What the first failing rank raised, not what that made others raise.

    Examples:
        >>> import faccel
        >>> out = simulate(lambda ctx: faccel.reduce(torch.tensor(ctx.rank), ctx), 4)
        >>> out[0], out.trace[0].op, out.trace[0].num_bytes
        (tensor(6), 'all_reduce', 8)
    """
    if world_size < 1:
        raise ConfigError(
            "a world has at least one rank", got=f"world_size={world_size}", fix="use 1 or more"
        )
    baton = Scheduler([mix(seed, rank) for rank in range(world_size)])
    world = World(baton, faults or ())

    def body(rank: int) -> T:
        def comm(spec: MeshSpec) -> Collectives:
            if world_size == 1:
                return SingleCollectives()
            world.stores.append(SimulatedStore(world, rank))
            dist.init_process_group(
                BACKEND,
                store=world.stores[-1],
                rank=rank,
                world_size=world_size,
                pg_options=Endpoint(world, rank),
            )
            return create_collectives(
                create_axis_groups(spec, rank, share=False), resolve(config), world.stores[-1]
            )

        contexts.append(_context(rank, world_size, config, mesh, comm))
        return fn(contexts[-1], *args)

    contexts: list[DistContext] = []
    results = Results(baton.run(body, timeout_s))
    for ctx in contexts:
        ctx.lifetime.close()
    world.check_done()
    results.trace = tuple(world.trace)
    return results


class _NoPeers:
    """The communication of a context that has none."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size

    def size(self, axis: str) -> int:
        return self._world_size

    def set_call_label(self, call: str, x: Any) -> None:
        pass  # nobody listens

    def as_rank_error(self, error: RuntimeError, doing: str, axis: str) -> None:
        pass  # nobody else can have failed

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise WorldError(
                f"a fake context has no peers, so `{name}` cannot be done",
                fix="write `faccel.testing.simulate(fn, world_size)` for functions that communicate",
            )

        return refuse


def fake_context(
    rank: int, world_size: int, *, mesh: _MeshLike = None, config: _ConfigLike = None
) -> DistContext:
    """Return the context of one rank that has no peers, for functions that do not communicate.

    Effects: pure.

    Args:
        rank: Which rank.
        world_size: Of how many.
        mesh: As in `Config`.
        config: As for `faccel.init`, without the environment.

    Raises:
        WorldError: Later, when a function tries to communicate (a world of one can).

    Examples:
        >>> fake_context(3, 8, mesh="dp_replicate=8").data_rank
        3
    """
    comm: Any = SingleCollectives() if world_size == 1 else _NoPeers(world_size)
    return _context(rank, world_size, config, mesh, lambda spec: comm)
