"""The context: which process this is, its configuration, its device, and how it communicates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import attrs
import torch

from faccel.call_site import call_site_of_error, override_call_site
from faccel.checks import instance_of
from faccel.config import Config
from faccel.errors import TopologyError
from faccel.lifetime import Lifetime
from faccel.mesh import WORLD, MeshSpec

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh  # noqa: TID251 (a name for the type checker)

    from faccel.protocols import Collectives, Parallelism

# fp8 is the precision of some linear layers; all other operations are autocast to bf16.
_DTYPES = {
    "no": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
    # Without autocast: the parameters themselves have the dtype.
    "bf16-true": None,
    "fp16-true": None,
}
_PARAM_DTYPES = {"bf16-true": torch.bfloat16, "fp16-true": torch.float16}


@attrs.frozen
class Topology:
    """The position of this process among all processes of the run.

    Args:
        rank: Number of this process, `0 <= rank < world_size`.
        world_size: Number of processes.
        local_rank: Number of this process on its node.
        local_world_size: Number of processes on this node.
        node_rank: Number of this node.
        num_nodes: Number of nodes.
        source: Where the values come from: `"torchrun"`, `"single"`, `"simulated"`, ...
        main_address: Host of the rendezvous store, empty for a single process.
        main_port: Port of the rendezvous store.
        attempt: Number of restarts by an elastic launcher.
        store_is_hosted: Whether the launcher hosts the store; otherwise rank 0 does.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    source: str = "single"
    main_address: str = ""
    main_port: int = 0
    attempt: int = 0
    store_is_hosted: bool = False

    # Checked here, because PyTorch's rendezvous reports neither the launcher nor the variable.
    def __attrs_post_init__(self) -> None:
        self._check_below("rank", "world_size")
        self._check_below("local_rank", "local_world_size")
        self._check_below("node_rank", "num_nodes")

    def _check_below(self, rank_name: str, size_name: str) -> None:
        rank = getattr(self, rank_name)
        size = getattr(self, size_name)
        if 0 <= rank < size:
            return
        raise TopologyError(
            f"`{rank_name}` must be between 0 and `{size_name} - 1`",
            got=f"{rank_name}={rank}, {size_name}={size} from {self.source}",
            fix="start every process with the same launcher, and remove these values wherever you "
            "set them yourself",
        )


@attrs.frozen(eq=False)
class Mesh:
    """The mesh of a context.

    Args:
        spec: Ranks per axis, without -1: `spec.size == world_size`.
        make_device_mesh: Makes a `DeviceMesh` from extents by axis. Collective.
    """

    spec: MeshSpec
    make_device_mesh: Callable[[Mapping[str, int]], DeviceMesh] = attrs.field(repr=False)
    # A cache, not state: making a mesh creates process groups, which are never freed.
    _device_meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = attrs.field(
        factory=dict, init=False, repr=False
    )

    @property
    def device_mesh(self) -> DeviceMesh:
        """The `DeviceMesh` of the axes with more than one rank. The first access is collective."""
        extents = self.spec.extents
        return self.device_mesh_of({axis: size for axis, size in extents.items() if size > 1})

    def device_mesh_of(self, extents: Mapping[str, int]) -> DeviceMesh:
        """Return the `DeviceMesh` of these extents, whose product is the world size.

        The first call for the same extents is collective.
        """
        # With the order: it decides which ranks form a group.
        key = tuple(extents.items())
        if key not in self._device_meshes:
            self._device_meshes[key] = self.make_device_mesh(extents)
        return self._device_meshes[key]


def _close_lifetime(ctx: DistContext, error: BaseException | None) -> None:
    ctx.lifetime.close()


@attrs.frozen(eq=False)
class DistContext:
    """The distributed world as an immutable value, which every function takes.

    `faccel.init` returns one, and so do `faccel.testing.simulate` and `fake_context`. At the end of
    `with faccel.init() as ctx:` it is shut down.

    Args:
        topology: Which of the processes this is.
        config: The configuration, with the source of each value.
        device: The device on which this process computes.
        mesh: `mesh.spec` is the record, `mesh.device_mesh` PyTorch's.
        comm: The collectives of this process.
        parallelism: The strategy that runs a model on the mesh.
        lifetime: What must be closed before the context: background saves, signal handlers.
    """

    topology: Topology
    config: Config
    device: torch.device
    mesh: Mesh
    comm: Collectives = attrs.field(repr=False)
    parallelism: Parallelism = attrs.field(repr=False)
    _close: Callable[[DistContext, BaseException | None], None] = attrs.field(
        default=_close_lifetime, repr=False, alias="close"
    )
    lifetime: Lifetime = attrs.field(factory=Lifetime, repr=False)

    # Stored and not computed at each access: the step reads them several times.
    rank: int = attrs.field(init=False)
    world_size: int = attrs.field(init=False)
    data_rank: int = attrs.field(init=False)
    data_world_size: int = attrs.field(init=False)
    is_replicated: bool = attrs.field(init=False, repr=False)
    """Whether every rank has a full copy of models and gradients: one process, or DDP."""

    def __attrs_post_init__(self) -> None:
        spec = self.mesh.spec
        # Both: DeepSpeed runs on a mesh of replicas, but shards states, gradients or parameters.
        is_mesh_replicated = spec.size == spec.dp_replicate
        derived = {
            "rank": self.topology.rank,
            "world_size": self.topology.world_size,
            "data_rank": spec.data_rank(self.topology.rank),
            "data_world_size": spec.data_world_size,
            "is_replicated": is_mesh_replicated and self.parallelism.is_replicated,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # as attrs does in a frozen class

    @property
    def local_rank(self) -> int:
        """Number of this process on its node."""
        return self.topology.local_rank

    @property
    def local_world_size(self) -> int:
        """Number of processes on this node."""
        return self.topology.local_world_size

    @property
    def node_rank(self) -> int:
        """Number of this node."""
        return self.topology.node_rank

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.topology.num_nodes

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.topology.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its node."""
        return self.topology.local_rank == 0

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype of autocast in forward; None without it, as for `mixed_precision="no"`."""
        return _DTYPES[self.config.mixed_precision]

    @property
    def param_dtype(self) -> torch.dtype | None:
        """The dtype to which `wrap` casts parameters; None where they keep theirs."""
        return _PARAM_DTYPES.get(self.config.mixed_precision)

    def __enter__(self) -> DistContext:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Torchrun mixes the tracebacks of all ranks in one output.
        if error is not None and self.world_size > 1:
            error.add_note(f"on rank {self.rank} of {self.world_size}")
        failure: Exception | None = None
        if isinstance(error, RuntimeError):
            # Of a collective that the script called itself. While the group is still open.
            failure = rank_error(error, traceback, self.comm)
        # After an error, too: a process group that stays open keeps the other ranks waiting.
        try:
            self._close(self, failure or error)
        except Exception as close_error:
            if error is None:
                raise
            # the first error is the cause: closing may fail because of it
            error.add_note(f"closing the context failed too: {close_error}")
        if failure is not None:
            raise failure from error


def rank_error(
    error: RuntimeError, traceback: TracebackType | None, comm: Collectives
) -> Exception | None:
    """Return the error that names the failed rank for one that nothing has caught.

    Effects: ambient. Reads the status of the other ranks from the store of the world.

    Returns:
        None if another rank is not the cause.
    """
    with override_call_site(call_site_of_error(traceback)):
        return comm.as_rank_error(error, "a collective", WORLD)


def require_context(ctx: object, call: str) -> None:
    """Raise unless `ctx` is a context: usually the arguments of a call are in another order.

    Effects: pure.

    Args:
        ctx: What the user passed.
        call: The call with its arguments in order, for the fix of the error.

    Examples:
        >>> require_context(3, "faccel.barrier(ctx)")
        Traceback (most recent call last):
        faccel.errors.ConfigError: `ctx` must be a DistContext. Got 3, of type int.
        To fix: write `faccel.barrier(ctx)`.
    """
    # Called in every step: one test of the class, and a message only for a mistake.
    if not isinstance(ctx, DistContext):
        instance_of("ctx", ctx, DistContext, fix=f"write `{call}`")
