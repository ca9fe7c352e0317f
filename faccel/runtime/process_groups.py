"""PyTorch's default process group, its store, the groups of the mesh axes and the device mesh."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from faccel.comm.call_exchange import CallExchange
from faccel.comm.call_order import CallOrder
from faccel.comm.collectives import TorchCollectives
from faccel.comm.debug import DebugCollectives
from faccel.comm.debug_group import DebugGroup, DebugOptions
from faccel.comm.debug_group import register_backend as register_debug_backend
from faccel.comm.rank_status import RankStatus
from faccel.comm.recovery import ProcessRecovery
from faccel.comm.world_store import WorldStore
from faccel.config import Config
from faccel.context import Topology
from faccel.errors import FaccelError, WorldError
from faccel.mesh import VIEWS, WORLD, MeshSpec
from faccel.protocols import Recovery
from faccel.runtime.connections import Connections
from faccel.runtime.devices import bound_device, c10d_backend
from faccel.runtime.rendezvous import agree_on_name, connection_fix
from faccel.runtime.store_client import open_store

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]


class DefaultGroup:
    """PyTorch's default process group, which all contexts of a process share.

    The first context of more than one process creates it, or adopts the user's. The last context
    destroys it if faccel created it.
    """

    def __init__(self) -> None:
        self.num_contexts = 0  # of this process so far: a number for each, equal on all ranks
        self._close_fns: dict[int, Callable[[], None]] = {}  # by the context's id
        # False for an adopted group, which only the user destroys.
        self._is_created = False
        self._num_created = 0
        self._num_generations = 0
        self._hooks: tuple[_Hook, _Hook] | None = None  # `sys.excepthook` before and after c10d
        self._store: WorldStore | None = None
        self._rank_status: RankStatus | None = None
        self._start_timeout_s = 0.0
        self._private_groups: list[dist.ProcessGroup] = []
        self.connections = Connections()
        """Of the groups that faccel has created."""
        self._recovery: ProcessRecovery | None = None
        self.call_order: CallOrder | None = None
        """Compares the calls of the ranks; None in debug mode, which compares all of them."""
        self.private_world: dist.ProcessGroup | None = None
        """A gloo group of all ranks for faccel's collectives on the CPU; None in debug mode."""

    def acquire(
        self, topology: Topology, device: torch.device, config: Config
    ) -> tuple[WorldStore, RankStatus]:
        """Return the store of the world and the status of its ranks; afterwards see `call_order`.

        The first call creates the group. Collective then.

        Raises:
            WorldError: The processes did not connect, or this process is in another world.
        """
        if dist.is_initialized():
            _check_same_world(topology)
        else:
            self._create(topology, device, config)
        # The private function is the only way to the store of an adopted group.
        store = WorldStore(c10d._get_default_store())  # pyright: ignore[reportPrivateUsage]
        self._store = store
        self._start_timeout_s = config.start_timeout_s or config.timeout_s
        self.num_contexts += 1
        if self._rank_status is None:
            # A new generation: what ranks reported to earlier contexts must not be read again.
            self._num_generations += 1
            self._rank_status = RankStatus(store, topology.rank, self._num_generations)
            self._recovery = None
            if isinstance(dist.group.WORLD, DebugGroup):
                dist.group.WORLD.options.exchange.set_rank_status(self._rank_status)
            if not config.debug and dist.is_gloo_available():
                timeout = timedelta(seconds=config.timeout_s)
                call_group = _new_world("faccel_calls", timeout)
                self.private_world = _new_world("faccel_collectives", timeout)
                self.call_order = CallOrder(self._rank_status, call_group)
                self._private_groups += [call_group, self.private_world]
        return store, self._rank_status

    @contextmanager
    def creating_groups(self, topology: Topology) -> Generator[None]:
        """Record the groups of the body; raise a `WorldError` for an error of c10d in it."""
        self.connections.store_port = topology.main_port
        try:
            with self.connections.recording():
                yield
            if self._rank_status is not None:
                self._rank_status.join(topology.world_size)
        except FaccelError:
            raise
        except (dist.DistError, RuntimeError) as error:
            statuses = "no status"
            if self._rank_status is not None:
                statuses = self._rank_status.report(range(topology.world_size), "init")
            if not self._close_fns and self._is_created:
                self._rank_status = None
                if self.call_order is not None:
                    self.call_order.close()
                self.call_order, self.private_world = None, None
                self._private_groups.clear()
                self._destroy()  # a failed `init` leaves nothing open
            raise WorldError(
                f"rank {topology.rank} could not connect to all of the {topology.world_size} "
                "processes: one of them ended",
                got=f"{statuses}; {first_line(error)}",
                fix="read the output of that process, and start all of them again",
            ) from None  # of c10d, with 20 lines of C++ frames

    def wait_until_all_connected(self) -> None:
        """Return when all ranks have created the groups that this one has created. Collective."""
        if self._rank_status is not None:
            self._rank_status.join(dist.get_world_size())
            self._rank_status.wait_until_all_joined(self._start_timeout_s)

    def add_context(self, context_id: int, close: Callable[[], None]) -> None:
        """Keep the group until `release(context_id)`, which calls `close`."""
        self._close_fns[context_id] = close

    def release(self, context_id: int, error: BaseException | None) -> None:
        """Close the communication of a context; the last one destroys the group.

        Args:
            context_id: Identity of the context. A second call for the same one does nothing.
            error: The exception that ended the context, for the messages on the other ranks.
        """
        close = self._close_fns.pop(context_id, None)
        # `shutdown` after a `with` block, or at exit, calls it again.
        if close is None:
            return
        close()
        # Other contexts of this process still use the group.
        if self._close_fns:
            return
        disagreement = self._leave(error)
        # After the status: a rank that waits in these groups reads it when the connection closes.
        private_groups, self._private_groups = self._private_groups, []
        self.private_world = None
        if self._is_created:
            self._destroy()
        elif dist.is_initialized():
            for group in private_groups:
                dist.destroy_process_group(group)
        if disagreement is not None:
            raise disagreement

    def _leave(self, error: BaseException | None) -> FaccelError | None:
        """Post that this rank leaves; return an error if another rank waits for a call of it."""
        rank_status, self._rank_status = self._rank_status, None
        call_order, self.call_order = self.call_order, None
        if call_order is not None:
            call_order.close()
        if rank_status is None or self._store is None or self._store.has_ended():
            return None
        disagreement: FaccelError | None = None
        if call_order is not None and error is None:
            disagreement = call_order.unanswered_call()
        if error is None:
            rank_status.wait_until_all_joined(self._start_timeout_s)
        # Before the store is gone: the other ranks read the reason from it.
        rank_status.leave(error)
        return disagreement

    def _create(self, topology: Topology, device: torch.device, config: Config) -> None:
        backend, options = c10d_backend(device, config.comm_backend), None
        previous_hook = sys.excepthook
        timeout = timedelta(seconds=config.timeout_s)
        start_timeout = timedelta(seconds=config.start_timeout_s or config.timeout_s)
        try:
            store = open_store(topology, start_timeout)
            # It waits for all ranks to start; later calls have the timeout of collectives.
            prefix = self._prefix(store, topology, start_timeout)
            if config.debug:
                exchange = CallExchange(
                    WorldStore(store), timeout.total_seconds(), f"c10d_{self._num_created}"
                )
                device_id = bound_device(device)
                options = DebugOptions(backend, device_id, exchange)
                backend = register_debug_backend(device.type)
            dist.init_process_group(
                backend,
                store=dist.PrefixStore(prefix, store),
                rank=topology.rank,
                world_size=topology.world_size,
                timeout=timeout,
                # With it NCCL connects now and not in the first collective.
                device_id=None if config.debug else bound_device(device),
                pg_options=options,
            )
        except (dist.DistError, RuntimeError, TypeError) as error:
            sys.excepthook = previous_hook
            address = f"{topology.main_address}:{topology.main_port}"
            raise WorldError(
                f"rank {topology.rank} could not connect to the {topology.world_size} processes "
                f"at {address}",
                got=first_line(error),
                fix=connection_fix(error),
            ) from None  # of c10d, with 20 lines of C++ frames
        # `init_process_group` replaces `sys.excepthook`, and `destroy_process_group` leaves it.
        self._hooks = (previous_hook, sys.excepthook)
        # A failed attempt is not counted: the other ranks may not have tried yet.
        self._num_created += 1
        self._is_created = True

    def _prefix(self, store: dist.Store, topology: Topology, timeout: timedelta) -> str:
        """Return a prefix of the store's keys that no earlier world used.

        Otherwise a restarted rank, or a second world, would read the addresses of an earlier one.
        The agents of several nodes count restarts separately, so the ranks agree on a name. This
        also waits for all ranks: c10d would print lines from C++ for one that is missing.
        """
        rank, world_size = topology.rank, topology.world_size
        return f"faccel/{agree_on_name(store, rank, world_size, timeout.total_seconds())}"

    def recovery(self, topology: Topology, timeout_s: float) -> ProcessRecovery | None:
        """Return how ranks continue after a failure; None where their groups cannot be renewed."""
        if self._recovery is not None:  # of another context, which uses the same groups
            return self._recovery
        call_order, rank_status = self.call_order, self._rank_status
        # In debug mode ranks wait in the store. The connections of an adopted group are unknown.
        if call_order is None or rank_status is None or not self._is_created:
            return None
        # NCCL's and others' connections are not sockets that belong to one group.
        if dist.get_backend() != "gloo" or not self.connections.is_supported():
            return None
        # The private function is the only way to the store without the checks of `WorldStore`.
        store = c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        timeout = timedelta(seconds=timeout_s)

        def renew(prefix: str) -> None:
            self.connections.renew(store, prefix, timeout)
            # A rank that fails again at once would close its connections while others connect.
            rank_status.join(topology.world_size)
            rank_status.wait_until_all_joined(timeout_s)
            rank_status.renew()
            call_order.renew()

        self._recovery = ProcessRecovery(
            self.connections, rank_status, topology.world_size, timeout_s, renew
        )
        return self._recovery

    def _destroy(self) -> None:
        self._is_created = False
        self.connections = Connections()
        if dist.is_initialized():
            dist.destroy_process_group()
        if self._hooks is None:
            return
        previous_hook, c10d_hook = self._hooks
        if sys.excepthook is c10d_hook:  # otherwise the user has replaced it since
            sys.excepthook = previous_hook


DEFAULT_GROUP = DefaultGroup()
"""The one of this process: PyTorch has one default group."""


def first_line(error: BaseException) -> str:
    """Return the message of an error of c10d without its 20 lines of C++ frames.

    Effects: pure.
    """
    return str(error).strip().split("\n")[0]


def _check_same_world(topology: Topology) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if (rank, world_size) == (topology.rank, topology.world_size):
        return
    raise WorldError(
        "this process is already a rank of another world",
        got=f"rank {rank} of {world_size} before, "
        f"rank {topology.rank} of {topology.world_size} now",
        fix="call `faccel.shutdown(ctx)` before `faccel.init()` for another world",
    )


def _new_world(name: str, timeout: timedelta) -> dist.ProcessGroup:
    """Create a group of all ranks for tensors on the CPU. Collective."""
    # gloo also where the ranks have accelerators: the names of calls are on the host
    group = dist.new_group(backend="gloo", timeout=timeout, group_desc=name)
    assert isinstance(group, dist.ProcessGroup)
    return group


def create_axis_groups(
    spec: MeshSpec, rank: int, *, share: bool = True, world: dist.ProcessGroup | None = None
) -> dict[str, dist.ProcessGroup]:
    """Create the process group of each mesh axis and view. Collective.

    An axis of one rank has no group. A view (`"data"`, for example) always has one, so that the
    same script gathers over the data ranks of any mesh.

    Effects: collective.

    Args:
        spec: The mesh.
        rank: Rank of this process in the world.
        share: Whether axes with the same ranks share a group. Otherwise each group has the name of
            its axis, which a trace shows.
        world: The group of all ranks; None is PyTorch's default group.
    """
    if world is None:
        world = dist.group.WORLD
    assert world is not None
    names = [axis for axis, size in spec.extents.items() if size > 1]
    names += VIEWS
    if spec.ep > 1:
        names += ["ep", "ep_storage"]
    groups: dict[str, dist.ProcessGroup] = {WORLD: world}
    by_ranks: dict[tuple[int, ...], dist.ProcessGroup] = {}
    if share:
        by_ranks[tuple(range(spec.size))] = world
    for name in names:
        ranks = spec.peers(rank, name)
        if not share or ranks not in by_ranks:
            # Local synchronization: ranks outside of the group do not take part.
            by_ranks[ranks] = dist.new_group(  # type: ignore[assignment]
                list(ranks), use_local_synchronization=True, group_desc=name
            )
        groups[name] = by_ranks[ranks]
    return groups


def create_collectives(
    groups: Mapping[str, dist.ProcessGroup],
    config: Config,
    store: dist.Store | WorldStore,
    rank_status: RankStatus | None = None,
    context_number: int = 0,
    call_order: CallOrder | None = None,
    private_groups: dict[str, dist.ProcessGroup] | None = None,
    recovery: Recovery | None = None,
) -> TorchCollectives | DebugCollectives:
    """Return the collectives over the groups of a world, with checks if `config.debug` is set.

    Effects: pure.
    """
    # A simulation has no rank status: its scheduler names the ranks.
    comm = TorchCollectives(dict(groups), rank_status, call_order, private_groups or {}, recovery)
    if config.debug:
        world = dist.group.WORLD
        if isinstance(world, DebugGroup):
            # The one of c10d's calls: ranks may disagree about whether faccel or torch is next.
            exchange = world.options.exchange
        else:
            exchange = CallExchange(store, config.timeout_s, str(context_number))
            exchange.set_rank_status(rank_status)
        return DebugCollectives(comm, exchange)
    return comm


def create_device_mesh(device_type: str, extents: Mapping[str, int]) -> dist.DeviceMesh:
    """Create a `DeviceMesh` from the extent of each axis. Collective.

    Effects: collective.

    Raises:
        WorldError: No axis has more than one rank.
    """
    # A slow import, which a run without a device mesh does not need.
    from torch.distributed.device_mesh import init_device_mesh

    if not extents:
        raise WorldError(
            "a single process has no device mesh",
            got="world_size=1",
            fix="start several processes, or use `ctx.mesh.spec`",
        )
    return init_device_mesh(device_type, tuple(extents.values()), mesh_dim_names=tuple(extents))
