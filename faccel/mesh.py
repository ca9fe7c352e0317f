"""The mesh as arithmetic: how many ranks each parallelism takes, and where a rank stands. Integers only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import attrs

from faccel.errors import ConfigError, nearest

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The axes of a mesh from the slowest to the fastest varying; `ep` is a view of `dp_shard` and `cp`."""

DATA_AXES = ("dp_replicate", "dp_shard")
"""The axes whose ranks read different samples."""


VIEWS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "data": DATA_AXES,
        "loss": (*DATA_AXES, "cp"),
        "storage": ("dp_shard", "cp"),
        "stage": (*DATA_AXES, "cp", "tp"),
    }
)
"""Several axes as one: who reads other samples, whose losses and gradients are averaged, who shares the parameters, who
has the same stage of a pipeline."""


def _is_extent(_: Any, attribute: attrs.Attribute[int], value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise ConfigError(
            f"mesh axis `{attribute.name}` must be a positive number, or -1 to fill the world",
            got=repr(value),
            fix=f"write `{attribute.name}=1` to leave the axis out",
        )


@attrs.frozen
class MeshSpec:
    """How many ranks each axis takes; their product is the world size.

    Args:
        dp_replicate: Replicas that hold whole parameters (DDP); -1 fills the world, as for the others.
        dp_shard: Ranks that share the parameters among them (FSDP2).
        cp: Context parallel: ranks that share one sequence.
        tp: Tensor parallel: ranks that share one matrix.
        pp: PipelineConfig parallel: ranks that share the depth.
        ep: Expert parallel: a view of the ranks of `dp_shard` and `cp`, it does not count in the product.

    Examples:
        >>> MeshSpec(dp_replicate=-1, tp=2).fill(8)
        MeshSpec(dp_replicate=4, dp_shard=1, cp=1, tp=2, pp=1, ep=1)
    """

    dp_replicate: int = attrs.field(default=1, validator=_is_extent)
    dp_shard: int = attrs.field(default=1, validator=_is_extent)
    cp: int = attrs.field(default=1, validator=_is_extent)
    tp: int = attrs.field(default=1, validator=_is_extent)
    pp: int = attrs.field(default=1, validator=_is_extent)
    ep: int = attrs.field(default=1, validator=_is_extent)

    @classmethod
    def parse(cls, text: str) -> MeshSpec:
        """Read `"dp_shard=2,tp=2"`."""
        pairs = [part.partition("=") for part in text.split(",") if part.strip()]
        try:
            return cls.of({key.strip(): int(value) for key, _, value in pairs})
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                "a mesh is written as `axis=number,...`",
                got=repr(text),
                fix='write it like `"dp_shard=2,tp=2"`',
            ) from None

    @classmethod
    def of(cls, value: MeshSpec | Mapping[str, int] | str) -> MeshSpec:
        """Take a `MeshSpec`, a mapping of its fields, or its text."""
        if isinstance(value, MeshSpec):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            fix = 'write `mesh="dp_shard=2,tp=2"`'
            raise ConfigError("a mesh is a `MeshSpec`, a mapping or text", got=repr(value), fix=fix)
        for key in value:
            if key not in attrs.fields_dict(cls):
                raise ConfigError(
                    f"`{key}` is not an axis of a mesh", fix=nearest(key, attrs.fields_dict(cls))
                )
        return cls(**value)

    @property
    def size(self) -> int:
        """The product of the axes."""
        return math.prod(self.extents.values())

    @property
    def extents(self) -> dict[str, int]:
        """Extent of each axis, slowest first."""
        return {axis: getattr(self, axis) for axis in AXES}

    def fill(self, world_size: int) -> MeshSpec:
        """Return the mesh with its -1 replaced, for exactly `world_size` ranks.

        Raises:
            ConfigError: It does not fit; names a mesh that would.
        """
        extents = self.extents
        free = [axis for axis, n in extents.items() if n == -1]
        known = math.prod(n for n in extents.values() if n != -1)
        if len(free) > 1:
            raise ConfigError(
                "only one axis of a mesh can be -1", got=str(self), fix="name the others"
            )
        if free and world_size % known == 0:
            return attrs.evolve(self, **{free[0]: world_size // known})._with_experts()
        if not free and known == world_size:
            return self._with_experts()
        would = "axes whose product divides it"
        for axis in free or sorted(
            extents, key=lambda axis: extents[axis] == 1 and axis != "dp_replicate"
        ):
            rest = known if free else known // extents[axis]
            if world_size % rest == 0:
                would = f"`{axis}={world_size // rest}`"
                break
        raise ConfigError(
            f"the mesh does not fit {world_size} processes",
            got=f"{self}, {known} ranks",
            fix=f"use {would}, or start {known} processes",
        )

    def _with_experts(self) -> MeshSpec:
        holders = self.dp_shard * self.cp
        if self.ep == -1:
            return attrs.evolve(self, ep=holders)
        if holders % self.ep:
            raise ConfigError(
                "`ep` divides the ranks that share the parameters, `dp_shard * cp`",
                got=f"ep={self.ep} of {holders}",
                fix=f"use `ep={math.gcd(holders, self.ep)}`, or `dp_shard={self.ep}`",
            )
        return self

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return where `rank` stands on each axis; the last axis of `AXES` varies fastest."""
        place: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return place

    def peers(self, rank: int, view: str) -> tuple[int, ...]:
        """Return the ranks that an axis or a view of `VIEWS` spans from `rank` on, in order; `rank` is one of them.

        `"ep"` are blocks of the ranks of the view `"storage"`, and `"ep_storage"` those that hold the same experts.

        Examples:
            >>> MeshSpec(dp_shard=2, tp=2).peers(1, "dp_shard"), MeshSpec(dp_shard=2, cp=2, ep=2).peers(1, "ep_storage")
            ((1, 3), (1, 3))
        """
        if view in ("ep", "ep_storage"):
            holders = self.peers(rank, "storage")
            block, place = divmod(holders.index(rank), self.ep)
            return (
                holders[block * self.ep :][: self.ep] if view == "ep" else holders[place :: self.ep]
            )
        place, ranks, stride = self.coordinates(rank), [rank], 1
        for axis in reversed(AXES):  # the fastest varying first
            extent = getattr(self, axis)
            if axis in VIEWS.get(view, (view,)):
                first = place[axis] * stride
                ranks = [r - first + i * stride for i in range(extent) for r in ranks]
            stride *= extent
        return tuple(ranks)

    def table(self) -> str:
        """Return each axis and view with its extent and the groups of ranks that it joins, a line each.

        Examples:
            >>> print(MeshSpec(dp_shard=2, tp=2).table())
            dp_shard  2  (0 2) (1 3)
            tp        2  (0 1) (2 3)
            data      2  (0 2) (1 3)
            loss      2  (0 2) (1 3)
            storage   2  (0 2) (1 3)
            stage     4  (0 1 2 3)
        """
        names = [axis for axis in (*AXES, "ep") if getattr(self, axis) > 1]
        rows: list[str] = []
        for name in [*names, *VIEWS]:
            groups = sorted({self.peers(rank, name) for rank in range(self.size)})
            joined = " ".join(f"({' '.join(map(str, group))})" for group in groups)
            rows.append(f"{name:<8}  {len(groups[0])}  {joined}")
        return "\n".join(rows)

    def picture(self) -> str:
        """Return the ranks as a picture: a row for each data rank, a column for each other coordinate.

        Examples:
            >>> print(MeshSpec(dp_shard=2, tp=2).picture())
                                   tp=0  tp=1
            dp_shard=0                0     1
            dp_shard=1                2     3
        """
        rows: dict[str, dict[str, int]] = {}
        for rank in range(self.size):
            place = {
                axis: at for axis, at in self.coordinates(rank).items() if getattr(self, axis) > 1
            }
            row = (
                " ".join(f"{axis}={at}" for axis, at in place.items() if axis in DATA_AXES)
                or "data=0"
            )
            column = (
                " ".join(f"{axis}={at}" for axis, at in place.items() if axis not in DATA_AXES)
                or "rank"
            )
            rows.setdefault(row, {})[column] = rank
        columns = list(next(iter(rows.values())))
        lines = [
            "".join(
                [
                    f"{'':<21}",
                    *(f"{column:>6}" if len(column) < 5 else f"  {column}" for column in columns),
                ]
            )
        ]
        for row, ranks in rows.items():
            cells = [f"{ranks[column]:>{max(6, len(column) + 2)}}" for column in columns]
            lines.append("".join([f"{row:<21}", *cells]))
        return "\n".join(lines)

    @property
    def data_world_size(self) -> int:
        """How many different parts a batch has."""
        return self.dp_replicate * self.dp_shard

    def data_rank(self, rank: int) -> int:
        """Which part of a batch `rank` reads."""
        place = self.coordinates(rank)
        return place["dp_replicate"] * self.dp_shard + place["dp_shard"]
