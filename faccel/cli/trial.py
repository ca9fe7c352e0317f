"""`faccel config check`: tries on this node what `faccel.init` would do with a configuration."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from faccel.config import Config
from faccel.config_mesh import mesh_for

if TYPE_CHECKING:
    from faccel.mesh import MeshSpec


def try_configuration(config: Config, num_processes: int) -> None:
    """Raise what `init` would raise on this node for the device, the mesh and the strategy.

    Effects: ambient. Asks PyTorch for the accelerators of this node; imports no engine.

    Args:
        config: The configuration of a file.
        num_processes: Processes per node.

    Raises:
        DeviceError: The device does not exist, or there are more processes than devices.
        BackendError: No strategy runs the mesh, or the one that the file names is unavailable.
    """
    # Imported here, because torch takes seconds.
    from faccel.backends.table import choose
    from faccel.context import Topology
    from faccel.runtime.devices import choose_device

    spec = _filled(config, num_processes)
    # The last process of the node: it fails if there are fewer devices.
    topology = Topology(
        rank=num_processes - 1,
        world_size=num_processes,
        local_rank=num_processes - 1,
        local_world_size=num_processes,
    )
    device = choose_device(config, topology)
    choose(spec, os.environ, config, device.type)


def _filled(config: Config, num_processes: int) -> MeshSpec:
    """Return the mesh for the smallest number of nodes that it fits."""
    num_ranks = 1
    if config.mesh is not None:
        num_ranks = abs(math.prod(config.mesh.extents.values()))  # without the -1
    return mesh_for(config, math.lcm(num_ranks, num_processes))
