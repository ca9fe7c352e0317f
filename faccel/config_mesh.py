"""The mesh of a configuration, for the number of processes that were or will be started."""

from __future__ import annotations

from faccel.config import Config
from faccel.errors import ConfigError, with_source
from faccel.mesh import MeshSpec


def mesh_for(config: Config, world_size: int) -> MeshSpec:
    """Return the mesh of a configuration for `world_size` ranks; replicas if it has none.

    Effects: pure.

    Raises:
        ConfigError: The mesh does not fit. The message names the file or variable it is from.

    Examples:
        >>> from faccel.config_sources import resolve
        >>> mesh_for(resolve({"mesh": "dp_shard=-1"}), 4).dp_shard
        4
    """
    try:
        return (config.mesh or MeshSpec(dp_replicate=-1)).fill(world_size)
    except ConfigError as error:
        raise with_source(error, config.sources.get("mesh", "argument")) from None


def fixed_mesh_size(config: Config) -> int | None:
    """Return the number of ranks of a mesh without -1; None for any other mesh.

    Effects: pure.
    """
    if config.mesh is None or config.mesh.size < 1:
        return None
    return config.mesh.size


def check_num_processes(config: Config, num_processes: int) -> None:
    """Raise if no number of nodes with `num_processes` each fits the mesh.

    Effects: pure.

    Raises:
        ConfigError: The mesh has a fixed size, which is not a multiple.
    """
    size = fixed_mesh_size(config)
    if size is not None and size % num_processes:
        mesh_for(config, num_processes)
