"""`init` and `shutdown`: the environment is read here, once, and a context is made of it."""

from __future__ import annotations

import atexit
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from faccel.backends.table import choose
from faccel.comm.collectives import SingleCollectives, TorchCollectives
from faccel.comm.debug import DebugCollectives
from faccel.comm.rank_status import RankStatus
from faccel.config import Config, launcher_flags, resolve
from faccel.config_file import absolute, find, read
from faccel.context import DistContext, Mesh, Topology
from faccel.effects import AMBIENT, effectful
from faccel.errors import ConfigError, DeviceError, WorldError
from faccel.mesh import VIEWS, MeshSpec
from faccel.protocols import WORLD
from faccel.runtime.detect import detect
from faccel.runtime.excepthook import ExceptHook
from faccel.runtime.rendezvous import agreed_name


class _DefaultGroup:
    """torch's default process group, the one thing of a process that contexts share.

    Made or adopted by the first context of more than one process, ended with the last one if faccel made it.
    """

    def __init__(self) -> None:
        self.users: dict[
            int, Callable[[], None]
        ] = {}  # by id of the context: ends its communication
        self.is_ours = False
        self.num_made = 0
        self.hooks: tuple[Any, Any] = (
            None,
            None,
        )  # `sys.excepthook` from before torch's, and torch's
        self.rank_status: RankStatus | None = None
        self.num_contexts = self.num_generations = 0

    def join(
        self, topology: Topology, device: torch.device, timeout_s: float
    ) -> tuple[dist.Store, RankStatus]:
        """Join the processes of `topology`; return their store, and where ranks tell what became of them."""
        if dist.is_initialized():
            self._check_same(topology)
        else:
            self._make(topology, device, timedelta(seconds=timeout_s))
        store = c10d._get_default_store()  # pyright: ignore[reportPrivateUsage] (nobody else knows an adopted group's)
        self.num_contexts += 1
        if self.rank_status is None:
            self.num_generations += 1
            self.rank_status = RankStatus(store, topology.rank, self.num_generations)
        return store, self.rank_status

    def _check_same(self, topology: Topology) -> None:
        have = (dist.get_rank(), dist.get_world_size())
        if have != (topology.rank, topology.world_size):
            raise WorldError(
                "a process can be in one world of several processes at a time",
                got=f"rank {have[0]} of {have[1]} before, rank {topology.rank} of {topology.world_size} now",
                fix="call `faccel.shutdown(ctx)` of the first world before `faccel.init()` of the second",
            )

    def _make(self, topology: Topology, device: torch.device, timeout: timedelta) -> None:
        before = sys.excepthook  # torch replaces it and does not put it back
        try:
            store = _store(topology, timeout)
            # Neither a restarted worker nor a second world may meet the addresses of the one that ended. The agents of
            # several machines do not count restarts alike.
            name = f"attempt_{topology.attempt}/world_{self.num_made}"
            if topology.num_nodes > 1:
                name = agreed_name(
                    store, topology.rank, topology.world_size, timeout.total_seconds()
                )
            dist.init_process_group(
                "gloo"
                if device.type == "cpu"
                else f"cpu:gloo,{device.type}:{_BACKENDS[device.type]}",
                store=dist.PrefixStore(f"faccel/{name}", store),
                rank=topology.rank,
                world_size=topology.world_size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        except (dist.DistError, RuntimeError, TypeError) as error:
            sys.excepthook = before
            raise WorldError(
                f"rank {topology.rank} could not join the {topology.world_size} processes at "
                f"{topology.main_address}:{topology.main_port}",
                got=str(error).strip().split("\n")[0],
                fix="start all of them, with the same `MASTER_ADDR` and a free `MASTER_PORT`",
            ) from error
        self.hooks = (before, sys.excepthook)
        self.num_made += 1  # not by one that failed: the others may not have tried yet
        self.is_ours = True

    def leave(self, user: int, error: BaseException | None) -> None:
        """End the group when its last user leaves, if faccel made it; `error` is why."""
        close = self.users.pop(user, None)
        if close is None:
            return
        close()
        if not self.users and self.rank_status is not None:
            self.rank_status.leave(error)
            self.rank_status = None
        if not self.users and self.is_ours:
            self.is_ours = False
            if dist.is_initialized():
                dist.destroy_process_group()
            before, torchs = self.hooks
            if sys.excepthook is torchs:
                sys.excepthook = before


_ANSWER_S = 5.0


def _listens(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=1):
            return True
    except OSError:
        return False


def _store(topology: Topology, timeout: timedelta) -> dist.TCPStore:
    """Serve the store, or connect to it.

    torch's client waits for ever for the answer of something that listens there and is no store: so a thread does that.
    """
    is_master = topology.rank == 0 and not topology.store_is_hosted
    made: list[dist.TCPStore | BaseException] = []

    def make() -> None:
        address, port, world_size = topology.main_address, topology.main_port, topology.world_size
        try:
            made.append(
                dist.TCPStore(
                    address,
                    port,
                    world_size,
                    is_master=is_master,
                    timeout=timeout,
                    multi_tenant=True,
                    wait_for_workers=False,
                )
            )
        except Exception as error:
            made.append(error)

    thread = threading.Thread(target=make, name="faccel-store", daemon=True)
    thread.start()
    thread.join(min(_ANSWER_S, timeout.total_seconds()))
    deadline = time.monotonic() + timeout.total_seconds()
    while (
        not made and time.monotonic() < deadline
    ):  # nobody may listen yet; who does, answers at once
        listens = _listens(topology.main_address, topology.main_port)
        thread.join(_ANSWER_S)
        if listens and not made:
            raise dist.DistNetworkError(
                "something listens there that does not answer as a store does"
            )
    if not made:
        raise dist.DistNetworkError(f"nobody listens there after {timeout.total_seconds():g} s")
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]


_BACKENDS = {"cuda": "nccl", "xpu": "xccl", "npu": "hccl", "hpu": "hccl"}
"""What communicates between devices of a kind; other kinds serve one process."""

_default_group = _DefaultGroup()
_except_hook = ExceptHook()


def _choose_device(config: Config, topology: Topology) -> torch.device:
    if config.device is None:
        found = torch.accelerator.current_accelerator(check_available=True)
        kind = (
            "cpu"
            if found is None or (found.type not in _BACKENDS and topology.world_size > 1)
            else found.type
        )
        device = torch.device(kind)
    else:
        device = _named_device(config.device, topology)
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    index = topology.local_rank if device.index is None else device.index  # pyright: ignore[reportUnnecessaryComparison]
    if index >= count:
        raise DeviceError(
            f"process {topology.local_rank} of this machine has no `{device.type}` of its own",
            got=f"{count} devices for {topology.local_world_size} processes",
            fix=(f"start {count} processes on this machine, or " if count else "")
            + "write `faccel.init(device='cpu')`",
        )
    return torch.device(device.type, index)


def _named_device(name: str, topology: Topology) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(
            "torch knows no such device", got=repr(name), fix='use `"cpu"`'
        ) from error
    if topology.world_size > 1 and device.type not in ("cpu", *_BACKENDS):
        raise DeviceError(
            f"several processes cannot communicate between `{device.type}` devices",
            got=f"{topology.world_size} processes",
            fix='start one process, or use `device="cpu"`',
        )
    return device


@effectful(AMBIENT)
def init(
    config: Config | Mapping[str, Any] | str | None = None,
    /,
    *,
    env: Mapping[str, str] | None = None,
    **overrides: Any,
) -> DistContext:
    """Return the context of this process: where it stands, what it computes on, how it talks.

    Effects: ambient. Reads the environment, once. With more than one process it makes torch's default process group,
    or adopts the one that is there; `shutdown`, which is registered to run at exit, ends what was made. Until then
    Ctrl-C is one line on rank 0 instead of a traceback on every rank.

    The world is the processes that were started, by torchrun for instance; without a launcher it is this one. A second
    call in one process is legal.

    Args:
        config: A `Config`, a mapping of its fields, or a file: `"training.yaml"`, `"training.yaml#faccel"`. Without a
            file here, `$FACCEL_CONFIG` counts, else the user's own (`faccel config path`).
        env: The environment; None takes the process's own.
        **overrides: Single fields of `Config`, which win over everything else.

    Returns:
        The context; as a context manager (`with faccel.init() as ctx:`) it shuts down at the end.

    Raises:
        ConfigError: An unknown or impossible value.
        TopologyError: The environment is half set or contradicts itself.
        DeviceError: The device is not there, or there are more processes than devices.
        WorldError: The processes do not find each other, or this one is in another world already.

    Examples:
        >>> ctx = init({"mixed_precision": "bf16"}, env={}, seed=1)
        >>> ctx.rank, ctx.world_size, ctx.config.seed
        (0, 1, 1)
    """
    if "config" in overrides:
        raise ConfigError(
            "`config` is given by its place",
            got="`init(config=...)`",
            fix="write `faccel.init(config)`",
        )
    env = os.environ if env is None else env
    reference = _file_of(config, env)
    file = None if reference is None else read(reference)
    resolved = resolve(
        None if isinstance(config, str) else config, env=env, overrides=overrides, file=file
    )
    topology = detect(env)
    spec = (resolved.mesh or MeshSpec(dp_replicate=-1)).fill(topology.world_size)
    device = _choose_device(resolved, topology)
    parallelism = choose(spec, env, resolved, device.type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    comm: TorchCollectives | DebugCollectives | SingleCollectives = SingleCollectives()
    if topology.world_size > 1:
        store, rank_status = _default_group.join(topology, device, resolved.timeout_s)
        comm = collectives(
            groups_of(spec, topology.rank),
            resolved,
            store,
            rank_status,
            _default_group.num_contexts,
        )
    ctx = DistContext(
        topology=topology,
        config=resolved,
        device=device,
        mesh=Mesh(spec, functools.partial(device_mesh, device.type)),
        comm=comm,
        parallelism=parallelism,
        close=_leave,
    )
    _except_hook.enter(id(ctx), topology.rank, topology.world_size, env)
    if not isinstance(comm, SingleCollectives):
        _default_group.users[id(ctx)] = comm.close
    atexit.register(_at_exit, ctx)
    return ctx


def _file_of(config: object, env: Mapping[str, str]) -> str | None:
    if not isinstance(config, str):
        return find(env)
    launchers = launcher_flags(env).get("config")
    if launchers is not None and launchers != absolute(config):
        raise ConfigError(
            "the script and the launcher name two configurations",
            got=f"`faccel.init({config!r})`, and `faccel launch --config {launchers}`",
            fix="leave one of them out",
        )
    return config


def groups_of(spec: MeshSpec, rank: int, *, is_named: bool = False) -> dict[str, dist.ProcessGroup]:
    """Make the group of each axis and view that a collective can name. Collective.

    Those of the same ranks share one, unless each is to be known by its name, for a trace. Axes of one rank have none,
    but the views have, so that one script gathers over the data ranks of any mesh.
    """
    world: Any = dist.group.WORLD
    made: dict[tuple[int, ...], dist.ProcessGroup] = (
        {} if is_named else {tuple(range(spec.size)): world}
    )
    found: dict[str, dist.ProcessGroup] = {WORLD: world}
    experts = ("ep", "ep_storage") if spec.ep > 1 else ()
    for name in (*(axis for axis, n in spec.extents.items() if n > 1), *VIEWS, *experts):
        ranks = spec.peers(rank, name)
        if is_named or ranks not in made:
            made[ranks] = dist.new_group(
                list(ranks), use_local_synchronization=True, group_desc=name
            )  # type: ignore[assignment]
        found[name] = made[ranks]
    return found


def collectives(
    groups: dict[str, dist.ProcessGroup],
    config: Config,
    store: dist.Store,
    rank_status: RankStatus | None = None,
    number: int = 0,
) -> TorchCollectives | DebugCollectives:
    """Return the communication over some groups of one world, checked in debug mode."""
    comm = TorchCollectives(groups, rank_status)
    return DebugCollectives(comm, store, config.timeout_s, number) if config.debug else comm


def device_mesh(device_type: str, extents: Mapping[str, int]) -> dist.DeviceMesh:
    """Make torch's mesh of named extents. Collective."""
    from torch.distributed.device_mesh import init_device_mesh

    if not extents:
        raise WorldError(
            "a world of one process has no device mesh",
            fix="start several processes, or use `mesh.spec`",
        )
    return init_device_mesh(device_type, tuple(extents.values()), mesh_dim_names=tuple(extents))


def _at_exit(ctx: DistContext) -> None:
    _leave(ctx, getattr(sys, "last_value", None))  # of a script that an exception ended


def _leave(ctx: DistContext, error: BaseException | None) -> None:
    try:
        ctx.lifetime.close()
    finally:
        _except_hook.leave(id(ctx), error)
        _default_group.leave(id(ctx), error)


@effectful(AMBIENT)
def shutdown(ctx: DistContext) -> None:
    """End what `init` began: the process group after its last context, and the changes of `sys.excepthook`.

    Effects: ambient. Waits for the checkpoint that this process writes in the background, and otherwise for nobody; a
    second call does nothing.

    Raises:
        CheckpointError: What was written in the background could not be.

    Examples:
        >>> ctx = init(env={})
        >>> shutdown(ctx)
    """
    _leave(ctx, None)
