"""The mesh as arithmetic: how many ranks each parallelism takes, and where a rank stands. Integers only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs

from faccel.errors import ConfigError, nearest

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The axes of a mesh from the slowest to the fastest varying; `ep` is a view of `dp_shard`, `cp` and `tp`."""

DATA_AXES = ("dp_replicate", "dp_shard")
"""The axes whose ranks read different samples."""


def _is_extent(_: Any, attribute: attrs.Attribute[int], value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise ConfigError(
            f"mesh axis `{attribute.name}` must be a positive number, or -1 to fill the world",
            saw=repr(value),
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
        pp: Pipeline parallel: ranks that share the depth.
        ep: Expert parallel: a view of the ranks above, it does not count in the product.

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
                "a mesh is written as `axis=number,...`", saw=repr(text), fix='write it like `"dp_shard=2,tp=2"`'
            ) from None

    @classmethod
    def of(cls, value: MeshSpec | Mapping[str, int] | str) -> MeshSpec:
        """Take a `MeshSpec`, a mapping of its fields, or its text."""
        if isinstance(value, MeshSpec):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        for key in value:
            if key not in attrs.fields_dict(cls):
                raise ConfigError(f"`{key}` is not an axis of a mesh", fix=nearest(key, attrs.fields_dict(cls)))
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
            raise ConfigError("only one axis of a mesh can be -1", saw=str(self), fix="name the others")
        if free and world_size % known == 0:
            return attrs.evolve(self, **{free[0]: world_size // known})
        if not free and known == world_size:
            return self
        axis = free[0] if free else "dp_replicate"
        rest = known if free else known // max(1, extents["dp_replicate"])
        would = f"`{axis}={world_size // rest}`" if world_size % rest == 0 else "axes whose product divides it"
        raise ConfigError(
            f"the mesh does not fit {world_size} processes",
            saw=f"{self}, {known} ranks",
            fix=f"use {would}, or start {known} processes",
        )

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return where `rank` stands on each axis; the last axis of `AXES` varies fastest."""
        place: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return place

    @property
    def data_world_size(self) -> int:
        """How many different parts a batch has."""
        return self.dp_replicate * self.dp_shard

    def data_rank(self, rank: int) -> int:
        """Which part of a batch `rank` reads."""
        place = self.coordinates(rank)
        return place["dp_replicate"] * self.dp_shard + place["dp_shard"]
