"""The mesh as arithmetic: the number of ranks per axis, and the coordinates of a rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import attrs

from faccel.checks import MAX_COUNT
from faccel.errors import ConfigError, nearest, short_repr, short_text

# Tensor parallel communicates in every layer, so its ranks are neighbours, usually on one node.
# Stages of a pipeline communicate least, so they are furthest apart. torchtitan has the same order.
AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The axes of a mesh, slowest varying first; `ep` is a view of `EXPERT_AXES`."""

DATA_AXES = ("dp_replicate", "dp_shard")
"""The axes along which ranks read different samples."""

# The ranks of `tp` have the same tokens, of which each dispatches a part. The experts are sharded
# over these ranks as well, so that no rank computes what another one computes.
EXPERT_AXES = ("dp_shard", "cp", "tp")
"""The axes over which experts are sharded: the ranks of a stage without their replicas."""

DATA = "data"  # the ranks that read different data: a view of `VIEWS`
WORLD = "world"  # all ranks

VIEWS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "data": DATA_AXES,
        # A rank of `cp` has the loss of its chunk of the sequence only.
        "loss": (*DATA_AXES, "cp"),
        # The ranks of `cp` have the same parameters, so FSDP2 can shard over them as well.
        "storage": ("dp_shard", "cp"),
        "stage": (*DATA_AXES, "cp", "tp"),
    }
)
"""Several axes as one.

`"data"` are the ranks that read different samples, `"loss"` those whose losses and gradients are
averaged, `"storage"` those over which parameters are sharded, `"stage"` those with the same stage
of a pipeline.
"""


def _check_extent(mesh: object, attribute: attrs.Attribute[int], value: object) -> None:
    # a bool is an int in Python
    is_bool = isinstance(value, bool)
    if isinstance(value, int) and not is_bool and (value == -1 or 1 <= value < MAX_COUNT):
        return
    raise ConfigError(
        f"`{attribute.name}` must be an int of at least 1, or -1 to fill the world",
        got=f"{attribute.name}={short_repr(value)}",
        fix=f"write `{attribute.name}=1` to leave the axis out",
    )


def _axis_field() -> int:
    return attrs.field(default=1, validator=_check_extent)


@attrs.frozen
class MeshSpec:
    """The number of ranks along each axis; their product is the world size.

    Args:
        dp_replicate: Data parallel with replicated parameters (DDP). -1 fills the world, here and
            in the other axes.
        dp_shard: Data parallel with sharded parameters (FSDP2).
        cp: Context parallel: each rank has a chunk of every sequence.
        tp: Tensor parallel: each rank has a shard of every large matrix.
        pp: Pipeline parallel: each rank has some of the layers.
        ep: Expert parallel: each rank has some of the experts. A view of the ranks of `dp_shard`,
            `cp` and `tp`, so it is not a factor of the product. A multiple or a divisor of `tp`.

    Examples:
        >>> MeshSpec(dp_replicate=-1, tp=2).fill(8)
        MeshSpec(dp_replicate=4, dp_shard=1, cp=1, tp=2, pp=1, ep=1)
    """

    dp_replicate: int = _axis_field()
    dp_shard: int = _axis_field()
    cp: int = _axis_field()
    tp: int = _axis_field()
    pp: int = _axis_field()
    ep: int = _axis_field()

    @classmethod
    def parse(cls, text: str) -> MeshSpec:
        """Return the mesh that a text like `"dp_shard=2,tp=2"` stands for."""
        extents: dict[str, int] = {}
        for item in text.split(","):
            axis, _, extent = item.partition("=")
            if not item.strip():  # an empty text, or a comma at the end
                continue
            axis = axis.strip()
            if axis in extents:
                raise ConfigError(
                    f"`mesh` has the axis `{short_text(axis)}` twice",
                    got=short_repr(text),
                    fix="remove one of the two",
                )
            try:
                extents[axis] = int(extent)
            except ValueError:
                raise ConfigError(
                    "`mesh` must have the form `axis=number,...`",
                    got=short_repr(text),
                    fix='write `mesh="dp_shard=2,tp=2"`',
                ) from None
        return cls.of(extents)

    @classmethod
    def of(cls, value: MeshSpec | Mapping[str, int] | str) -> MeshSpec:
        """Return the mesh for a `MeshSpec`, a mapping of its fields, or a text."""
        if isinstance(value, MeshSpec):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(
                "`mesh` must be a `MeshSpec`, a mapping or a str",
                got=short_repr(value),
                fix='write `mesh="dp_shard=2,tp=2"`',
            )
        # Before the constructor, whose TypeError would not suggest an axis.
        fields = attrs.fields_dict(cls)
        for axis in value:
            if axis not in fields:
                raise ConfigError(
                    f"`mesh` has the unknown axis `{short_text(axis)}`",
                    got=f"{short_text(axis)}={short_repr(value[axis])}",
                    fix=nearest(axis, fields),
                )
        return cls(**value)

    @property
    def size(self) -> int:
        """The product of the axes."""
        return math.prod(self.extents.values())

    @property
    def extents(self) -> dict[str, int]:
        """The number of ranks along each axis, slowest axis first."""
        return {axis: getattr(self, axis) for axis in AXES}

    def fill(self, world_size: int) -> MeshSpec:
        """Return the mesh for exactly `world_size` ranks, with -1 replaced.

        Raises:
            ConfigError: The mesh does not fit; the message suggests one that does.
        """
        extents = self.extents
        free_axes = [axis for axis, extent in extents.items() if extent == -1]
        if len(free_axes) > 1:
            raise ConfigError(
                "`mesh` has several axes of -1, but only one axis can fill the world",
                got=str(self),
                fix="write the number of ranks of the others",
            )
        num_ranks = abs(math.prod(extents.values()))  # without the -1
        # `ep` comes last: it must divide `dp_shard * cp`, of which one may have been -1.
        if free_axes and world_size % num_ranks == 0:
            filled = attrs.evolve(self, **{free_axes[0]: world_size // num_ranks})
            return filled._with_expert_axis()
        if not free_axes and world_size == num_ranks:
            return self._with_expert_axis()
        raise ConfigError(
            f"`mesh` does not fit {world_size} processes",
            got=f"{self}, {num_ranks} ranks",
            fix=(
                f"use {self._fitting_extent(world_size)}, or start {num_ranks} processes, as with "
                f"`faccel launch --nproc {num_ranks}`"
            ),
        )

    def _fitting_extent(self, world_size: int) -> str:
        """Return an `axis=number` with which the mesh fits, if changing one axis is enough."""
        # With the other axes unchanged, an axis fits if they divide the world.
        num_ranks = abs(self.size)
        for axis in self._axes_to_change():
            extent = getattr(self, axis)
            num_others = num_ranks // abs(extent)
            if world_size % num_others:
                continue
            fitting = f"`{axis}={world_size // num_others}`"
            if extent == -1:
                return fitting
            return f"{fitting}, or `{axis}=-1`, which fills the world"
        return "axes whose product divides it"

    def _axes_to_change(self) -> list[str]:
        """Return the axes to try: the free one, else `dp_replicate` and those in use first."""
        free: list[str] = []
        used: list[str] = []
        unused: list[str] = []
        for axis, extent in self.extents.items():
            if extent == -1:
                free.append(axis)
            # `dp_replicate` at 1, too: it is the axis that a run without `mesh` uses.
            if extent > 1 or axis == "dp_replicate":
                used.append(axis)
            else:
                unused.append(axis)
        return free or used + unused

    def _with_expert_axis(self) -> MeshSpec:
        """Return the mesh with `ep` checked, and -1 replaced by `dp_shard * cp * tp`."""
        # The experts are sharded in blocks of `ep` ranks.
        num_expert_ranks = self.dp_shard * self.cp * self.tp
        if self.ep == -1:
            return attrs.evolve(self, ep=num_expert_ranks)
        if num_expert_ranks % self.ep:
            raise ConfigError(
                "`ep` must divide `dp_shard * cp * tp`",
                got=f"ep={self.ep}, dp_shard * cp * tp = {num_expert_ranks}",
                # the largest divisor of both
                fix=f"use `ep={math.gcd(num_expert_ranks, self.ep)}`, or `dp_shard={self.ep}`",
            )
        # Ranks of one `tp` group dispatch parts of equal size, so all of them need the same
        # capacity, which the ranks of a block agree about.
        if self.ep % self.tp and self.tp % self.ep:
            raise ConfigError(
                "`ep` must be a multiple or a divisor of `tp`",
                got=f"ep={self.ep}, tp={self.tp}",
                fix=f"use `ep={self.tp}`, or another `tp`",
            )
        return self

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the index of `rank` along each axis; the last axis of `AXES` varies fastest."""
        coordinates: dict[str, int] = {}
        # mixed radix: the remainder is the index along the fastest axis
        for axis in reversed(AXES):
            rank, coordinates[axis] = divmod(rank, getattr(self, axis))
        return coordinates

    def peers(self, rank: int, view: str) -> tuple[int, ...]:
        """Return the ranks of an axis or a view of `VIEWS` that contain `rank`, in order.

        `"ep"` are blocks of the ranks along `EXPERT_AXES`; `"ep_storage"` those with the same
        experts.

        Examples:
            >>> MeshSpec(dp_shard=2, tp=2).peers(1, "dp_shard")
            (1, 3)
            >>> MeshSpec(dp_shard=2, cp=2, ep=2).peers(1, "ep_storage")
            (1, 3)
        """
        if view in ("ep", "ep_storage"):
            return self._expert_peers(rank, view)
        return self._peers_along(rank, VIEWS.get(view, (view,)))

    def _peers_along(self, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
        # The ranks are `rank` with every combination of coordinates along the axes. Built axis by
        # axis, the fastest first, so that they come out sorted; the other axes cost nothing.
        coordinates = self.coordinates(rank)
        ranks = [rank]
        stride = 1
        for axis in reversed(AXES):
            extent = getattr(self, axis)
            if axis in axes:
                origin = coordinates[axis] * stride
                shifted: list[int] = []
                for index in range(extent):
                    offset = index * stride - origin
                    shifted += [other_rank + offset for other_rank in ranks]
                ranks = shifted
            stride *= extent
        return tuple(ranks)

    def _expert_peers(self, rank: int, view: str) -> tuple[int, ...]:
        ranks = self._peers_along(rank, EXPERT_AXES)
        # `ep` varies fastest, as in the DeviceMesh that shards experts. With n ranks:
        # index = block * ep + expert_rank, block < n / ep, expert_rank < ep
        block, expert_rank = divmod(ranks.index(rank), self.ep)
        if view == "ep":
            start = block * self.ep
            return ranks[start : start + self.ep]
        return ranks[expert_rank :: self.ep]

    def table(self) -> str:
        """Return a line for each axis and view: its size and its groups of ranks.

        Examples:
            >>> print(MeshSpec(dp_shard=2, tp=2).table())
            dp_shard  2  (0 2) (1 3)
            tp        2  (0 1) (2 3)
            data      2  (0 2) (1 3)
            loss      2  (0 2) (1 3)
            storage   2  (0 2) (1 3)
            stage     4  (0 1 2 3)
        """
        axes = [axis for axis in (*AXES, "ep") if getattr(self, axis) > 1]
        lines: list[str] = []
        for name in [*axes, *VIEWS]:
            # a set, because each rank of a group lists the same group
            groups = sorted({self.peers(rank, name) for rank in range(self.size)})
            line = f"{name:<8}  {len(groups[0])} "
            for group in groups:
                line += f" ({' '.join(map(str, group))})"
            lines.append(line)
        return "\n".join(lines)

    def picture(self) -> str:
        """Return the ranks as a picture: one row per data rank, one column per other coordinate.

        Examples:
            >>> print(MeshSpec(dp_shard=2, tp=2).picture())
                                   tp=0  tp=1
            dp_shard=0                0     1
            dp_shard=1                2     3
        """
        # Rows are data ranks: what one row contains reads the same samples.
        rank_by_cell: dict[str, dict[str, int]] = {}
        for rank in range(self.size):
            row = self._coordinate_label(rank, is_data=True) or "data=0"
            column = self._coordinate_label(rank, is_data=False) or "rank"
            rank_by_cell.setdefault(row, {})[column] = rank
        columns = list(next(iter(rank_by_cell.values())))
        widths = {column: max(6, len(column) + 2) for column in columns}
        header = " " * 21
        for column in columns:
            header += f"{column:>{widths[column]}}"
        lines = [header]
        for row, ranks in rank_by_cell.items():
            line = f"{row:<21}"
            # every row has the same columns: a mesh is a full grid
            for column in columns:
                line += f"{ranks[column]:>{widths[column]}}"
            lines.append(line)
        return "\n".join(lines)

    def _coordinate_label(self, rank: int, *, is_data: bool) -> str:
        """Return `axis=index ...` of a rank along the data axes, or along the other axes."""
        labels: list[str] = []
        for axis, index in self.coordinates(rank).items():
            if getattr(self, axis) > 1 and (axis in DATA_AXES) == is_data:
                labels.append(f"{axis}={index}")
        return " ".join(labels)

    @property
    def data_world_size(self) -> int:
        """Number of ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    def data_rank(self, rank: int) -> int:
        """Return the number of `rank` among those that read different samples."""
        # Ranks that differ along `cp`, `tp` or `pp` only have the same number: they read the same
        # samples.
        coordinates = self.coordinates(rank)
        return coordinates["dp_replicate"] * self.dp_shard + coordinates["dp_shard"]
