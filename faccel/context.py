"""Where this process stands, what it was asked to do, and how it talks: the value that every function takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import attrs
import torch

from faccel.config import Config
from faccel.errors import TopologyError
from faccel.lifetime import Lifetime
from faccel.mesh import MeshSpec
from faccel.protocols import Collectives, Parallelism

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh  # noqa: TID251 (a name for the type checker)


@attrs.frozen
class Topology:
    """Which process of how many this is.

    Args:
        rank: Number of this process, `0 <= rank < world_size`.
        world_size: How many processes there are.
        local_rank: Number of this process on its machine.
        local_world_size: How many processes this machine runs.
        node_rank: Number of the machine.
        num_nodes: How many machines there are.
        source: What said so: `"torchrun"`, `"single"`, `"simulated"`, ...
        main_address: Host of the rendezvous store, empty for a single process.
        main_port: Its port.
        attempt: How often an elastic launcher has restarted this world.
        store_is_hosted: Whether the launcher serves the store; otherwise rank 0 does.
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

    def __attrs_post_init__(self) -> None:
        pairs = (
            ("rank", "world_size"),
            ("local_rank", "local_world_size"),
            ("node_rank", "num_nodes"),
        )
        for part, whole in pairs:
            if not 0 <= getattr(self, part) < getattr(self, whole):
                raise TopologyError(
                    f"{self.source} says `{part}` of a world in which it must be below `{whole}`",
                    got=f"{part}={getattr(self, part)}, {whole}={getattr(self, whole)}",
                    fix="start every process with the same launcher, and set these by hand in no other place",
                )


@attrs.frozen(eq=False)
class Mesh:
    """The mesh of a context.

    Args:
        spec: Ranks per axis, filled: `spec.size == world_size`.
        make_device_mesh: Makes torch's own mesh of named extents. Collective.
    """

    spec: MeshSpec
    make_device_mesh: Callable[[Mapping[str, int]], DeviceMesh] = attrs.field(repr=False)
    _made: dict[tuple[tuple[str, int], ...], DeviceMesh] = attrs.field(
        factory=dict, init=False, repr=False
    )

    @property
    def device_mesh(self) -> DeviceMesh:
        """torch's `DeviceMesh` of the axes with more than one rank, made at the first use, which is collective."""
        return self.device_mesh_of({axis: n for axis, n in self.spec.extents.items() if n > 1})

    def device_mesh_of(self, extents: Mapping[str, int]) -> DeviceMesh:
        """Return torch's mesh of these extents, whose product is the world, made at the first use. Collective."""
        key = tuple(extents.items())
        if key not in self._made:
            self._made[key] = self.make_device_mesh(extents)
        return self._made[key]


@attrs.frozen(eq=False)
class DistContext:
    """An immutable description of the distributed world, passed to every function.

    Made by `faccel.init`, or by `faccel.testing.simulate` and `fake_context`. As a context manager it ends with
    `faccel.shutdown`.

    Args:
        topology: Which process of how many this is.
        config: What was asked for.
        device: Where this process computes.
        mesh: `mesh.spec` the record, `mesh.device_mesh` torch's own.
        comm: How it talks to the other ranks.
        parallelism: How the mesh runs a model.
    """

    topology: Topology
    config: Config
    device: torch.device
    mesh: Mesh
    comm: Collectives = attrs.field(repr=False)
    parallelism: Parallelism = attrs.field(repr=False)
    _close: Callable[[DistContext, BaseException | None], None] = attrs.field(
        default=lambda ctx, error: ctx.lifetime.close(), repr=False, alias="close"
    )
    lifetime: Lifetime = attrs.field(factory=Lifetime, repr=False)

    rank: int = attrs.field(init=False)
    world_size: int = attrs.field(init=False)
    data_rank: int = attrs.field(init=False)
    data_world_size: int = attrs.field(init=False)
    is_replicated: bool = attrs.field(init=False, repr=False)
    """Whether every rank has whole models and gradients: one process, or replicas."""

    def __attrs_post_init__(self) -> None:
        spec, rank = self.mesh.spec, self.topology.rank
        for name, value in (
            ("rank", rank),
            ("world_size", self.topology.world_size),
            ("data_rank", spec.data_rank(rank)),
            ("data_world_size", spec.data_world_size),
            ("is_replicated", spec.size == spec.dp_replicate and self.parallelism.is_replicated),
        ):
            object.__setattr__(self, name, value)

    @property
    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return self.topology.local_rank

    @property
    def local_world_size(self) -> int:
        """How many processes this machine runs."""
        return self.topology.local_world_size

    @property
    def node_rank(self) -> int:
        """Number of this machine."""
        return self.topology.node_rank

    @property
    def num_nodes(self) -> int:
        """How many machines there are."""
        return self.topology.num_nodes

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of the world."""
        return self.topology.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.topology.local_rank == 0

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The dtype that forward passes are autocast to; None where they are not."""
        return _DTYPES[self.config.mixed_precision]

    def __enter__(self) -> DistContext:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if error is not None and self.world_size > 1:
            error.add_note(f"on rank {self.rank} of {self.world_size}")
        try:
            self._close(self, error)
        except Exception as late:
            if error is None:
                raise
            error.add_note(f"and while the context was closed: {late}")


_DTYPES: dict[str, Any] = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
