"""`init` and `shutdown`: read the environment once, and return it as a context."""

from __future__ import annotations

import atexit
import functools
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from faccel.backends.table import choose
from faccel.comm.single import SingleCollectives
from faccel.config import Config
from faccel.config_mesh import mesh_for
from faccel.config_sources import launcher_flags, resolve
from faccel.context import DistContext, Mesh, Topology, rank_error, require_context
from faccel.device_table import is_host
from faccel.effects import AMBIENT, effectful
from faccel.errors import ConfigError, WorldError, short_repr, short_text
from faccel.mesh import MeshSpec
from faccel.runtime.detect import detect
from faccel.runtime.devices import check_launched, choose_device, use_device
from faccel.runtime.end_signals import end_by_interrupt, ended_by_signals
from faccel.runtime.excepthook import ExceptHook
from faccel.runtime.numerics import Numerics
from faccel.runtime.observation import Observation
from faccel.runtime.user_traceback import uncaught_without_frames

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh, ProcessGroup

    from faccel.comm.collectives import TorchCollectives
    from faccel.comm.debug import DebugCollectives

# `runtime.process_groups` is imported in functions: one process does not need it.
_numerics = Numerics()
_except_hook = ExceptHook()  # process-wide, as `sys.excepthook` is
_observation = Observation()


@effectful(AMBIENT)
def init(
    config: Config | Mapping[str, Any] | str | None = None,
    /,
    *,
    env: Mapping[str, str] | None = None,
    **overrides: Any,
) -> DistContext:
    """Return the context of this process: its rank, device, mesh and communication.

    The launcher (torchrun, srun, mpirun, ...) determines the number of processes. Without a
    launcher there is one process. `init` may be called several times in a process.

    Effects: ambient. Reads the environment once. With several processes it creates PyTorch's
    default process group, or adopts an existing one, and `shutdown` destroys what it created. It
    installs a `sys.excepthook` until `shutdown`, so that Ctrl-C prints one line on rank 0 instead
    of a traceback on each rank, and an error of faccel is printed without the frames inside of
    faccel. While `init` waits for other processes, signals end this one at once. `shutdown` also
    runs at the exit of the process.

    Args:
        config: A `Config`, a mapping of its fields, or a file: `"training.yaml"`, or a section
            `"training.yaml#faccel"`. Without a file, `$FACCEL_CONFIG` applies, or the user's own
            file (`faccel config path`).
        env: The environment; None reads that of the process.
        **overrides: Single fields of `Config`. They override all other sources; None is not given.

    Returns:
        The context. `with faccel.init() as ctx:` shuts it down at the end.

    Raises:
        ConfigError: A name is unknown or a value is invalid.
        TopologyError: The environment of the launcher is incomplete or contradictory.
        DeviceError: The device does not exist, or there are more processes than devices.
        WorldError: The processes did not connect, or this process is a rank of another world.

    Examples:
        >>> ctx = init({"mixed_precision": "bf16"}, env={}, seed=1)
        >>> ctx.rank, ctx.world_size, ctx.config.seed
        (0, 1, 1)
    """
    if env is None:
        env = os.environ
    with uncaught_without_frames(env):
        return _create_context(config, env, overrides)


def _create_context(
    config: Config | Mapping[str, Any] | str | None,
    env: Mapping[str, str],
    overrides: Mapping[str, Any],
) -> DistContext:
    resolved = _resolve(config, env, overrides)
    # After the configuration, whose errors are the same on any number of processes.
    topology = detect(env)
    spec = mesh_for(resolved, topology.world_size)
    device = choose_device(resolved, topology)
    # Before the process group: an unsupported mesh raises on each rank and leaves nothing open.
    parallelism = choose(spec, env, resolved, device.type)
    check_launched(device, topology, env)
    _numerics.check(resolved)
    use_device(device)
    with (
        _ended_by_signals(topology.world_size),
        _observation.starting(resolved, topology, spec),
    ):
        try:
            comm = _connect(spec, resolved, topology, device)
        except WorldError as error:
            # The cause is in another process, so the frames of this one would only add lines.
            raise error.with_traceback(None) from None
        ctx = DistContext(
            topology=topology,
            config=resolved,
            device=device,
            mesh=Mesh(spec, functools.partial(_create_device_mesh, device.type)),
            comm=comm,
            parallelism=parallelism,
            close=_close,
        )
        # After everything that may raise: a failed `init` leaves no hook.
        _numerics.install(id(ctx), resolved)
        as_rank_error = functools.partial(rank_error, comm=comm)
        _except_hook.install(
            id(ctx),
            topology.rank,
            topology.world_size,
            env,
            as_rank_error,
            shows_frames=resolved.debug,
            on_error=_observation.note_error,
        )
        _observation.attach(ctx)
    if not isinstance(comm, SingleCollectives):
        from faccel.runtime.process_groups import DEFAULT_GROUP

        DEFAULT_GROUP.add_context(id(ctx), comm.close)
    # A script without `with` or `shutdown` ends its communication too.
    atexit.register(_close_at_exit, ctx)
    try:
        parallelism.start(ctx)
    except Exception as error:
        _close(ctx, error)
        raise
    return ctx


def _resolve(
    config: Config | Mapping[str, Any] | str | None,
    env: Mapping[str, str],
    overrides: Mapping[str, Any],
) -> Config:
    """Merge the file, the environment, the launcher's flags and the arguments of `init`."""
    if "config" in overrides:
        raise ConfigError(
            "`config` is a positional argument of `init`",
            got="`init(config=...)`",
            fix="write `faccel.init(config)`",
        )
    from faccel.config_file import find, read

    # A file in the call replaces the default file; it is not merged with it.
    if isinstance(config, str):
        _check_launcher_config(config, env)
        return resolve(env=env, overrides=overrides, file=read(config))
    reference = find(env)
    file = None
    if reference is not None:
        file = read(reference)
    return resolve(config, env=env, overrides=overrides, file=file)


def _check_launcher_config(reference: str, env: Mapping[str, str]) -> None:
    """Raise if `faccel launch --config` names another file than the script."""
    from faccel.config_file import absolute

    launcher_reference = launcher_flags(env).get("config")
    if launcher_reference in (None, absolute(reference)):
        return
    raise ConfigError(
        "the script and the launcher use different configuration files",
        got=f"`faccel.init({short_repr(reference)})` and `faccel launch --config "
        f"{short_text(launcher_reference)}`",
        fix="remove one of the two",
    )


def _ended_by_signals(world_size: int) -> AbstractContextManager[None]:
    """Let signals end this process while it waits for the other ranks, unless it has a context."""
    # There is nothing to save yet. An open context may have handlers that save.
    if world_size == 1 or _except_hook.num_contexts:
        return nullcontext()
    return ended_by_signals(also_handled=True)


def _connect(
    spec: MeshSpec, config: Config, topology: Topology, device: torch.device
) -> TorchCollectives | DebugCollectives | SingleCollectives:
    if topology.world_size == 1:
        return SingleCollectives()
    from faccel.runtime.process_groups import DEFAULT_GROUP, create_axis_groups, create_collectives

    with DEFAULT_GROUP.creating_groups(topology):
        store, rank_status = DEFAULT_GROUP.acquire(topology, device, config)
        groups = create_axis_groups(spec, topology.rank)
        private_groups: dict[str, ProcessGroup] = {}
        call_order = DEFAULT_GROUP.call_order
        if call_order is not None:
            call_order.add_groups(groups.values(), groups.get("pp"))
            # A second communicator of an accelerator would need memory on it.
            if is_host(device):
                private_world = DEFAULT_GROUP.private_world
                private_groups = create_axis_groups(spec, topology.rank, world=private_world)
                call_order.add_groups(private_groups.values())
    # Debug mode keeps the calls of different contexts apart by it.
    number = DEFAULT_GROUP.num_contexts
    recovery = DEFAULT_GROUP.recovery(topology, config.timeout_s)
    return create_collectives(
        groups, config, store, rank_status, number, call_order, private_groups, recovery
    )


def _create_device_mesh(device_type: str, extents: Mapping[str, int]) -> DeviceMesh:
    from faccel.runtime.process_groups import DEFAULT_GROUP, create_device_mesh

    with DEFAULT_GROUP.connections.recording():
        mesh = create_device_mesh(device_type, extents)
    if DEFAULT_GROUP.call_order is not None:
        DEFAULT_GROUP.call_order.add_groups(mesh.get_all_groups())
    DEFAULT_GROUP.wait_until_all_connected()
    return mesh


@effectful(AMBIENT)
def shutdown(ctx: DistContext) -> None:
    """Release what `init` acquired: the process group and `sys.excepthook`.

    The last context of the process destroys the group. A second call does nothing.

    Effects: ambient. Waits for background saves of this process, not for other ranks.

    Raises:
        CheckpointError: A background save failed.

    Examples:
        >>> ctx = init(env={})
        >>> shutdown(ctx)
    """
    require_context(ctx, "faccel.shutdown(ctx)")
    _close(ctx, None)


def _close(ctx: DistContext, error: BaseException | None) -> None:
    try:
        ctx.lifetime.close()
    except BaseException as close_error:  # a failed save, or Ctrl-C while this waits for it
        if error is None:
            error = close_error
        raise
    finally:
        # Also after a failed save: an open group would keep the other ranks waiting.
        _observation.close(id(ctx), error)
        _disconnect(ctx, error)


def _disconnect(ctx: DistContext, error: BaseException | None) -> None:
    _numerics.uninstall(id(ctx))
    if ctx.world_size == 1:
        _except_hook.uninstall(id(ctx), error)
        return
    from faccel.runtime.process_groups import DEFAULT_GROUP

    # Without the hook a Ctrl-C would print a traceback of this function.
    with ended_by_signals(also_handled=False):
        _except_hook.uninstall(id(ctx), error)
        DEFAULT_GROUP.release(id(ctx), error)


def _close_at_exit(ctx: DistContext) -> None:
    if ctx.world_size > 1:
        # A Ctrl-C from here on would print a traceback of an exit handler, once for each rank.
        end_by_interrupt()
    # Python stores an uncaught exception here before it runs the exit handlers.
    _close(ctx, getattr(sys, "last_value", None))
