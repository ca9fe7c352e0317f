"""A world of one process with a real process group: NCCL, DDP and FSDP2 on one device.

`faccel.init` needs no group for one process. Its group, its collectives and its engines are those
of any world, and run here on one rank.
"""

import contextlib
import socket

import faccel
from faccel.backends.table import BACKENDS
from faccel.config_sources import resolve
from faccel.context import DistContext, Mesh, Topology
from faccel.mesh import MeshSpec
from faccel.runtime.devices import use_device
from faccel.runtime.process_groups import (
    DEFAULT_GROUP,
    create_axis_groups,
    create_collectives,
    create_device_mesh,
)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def world_of_one(device, strategy, **overrides):
    """Yield the context of a world of one rank, whose models run on a row of `BACKENDS`."""
    config = resolve(env={}, overrides={"device": str(device), **overrides})
    spec = MeshSpec()
    topology = Topology(source="tests", main_address="127.0.0.1", main_port=free_port())
    use_device(device)
    with DEFAULT_GROUP.creating_groups(topology):
        store, rank_status = DEFAULT_GROUP.acquire(topology, device, config)
        groups = create_axis_groups(spec, topology.rank)
        call_order = DEFAULT_GROUP.call_order
        if call_order is not None:  # None in debug mode
            call_order.add_groups(groups.values())
    comm = create_collectives(groups, config, store, rank_status, call_order=call_order)
    ctx = DistContext(
        topology=topology,
        config=config,
        device=device,
        mesh=Mesh(spec, lambda extents: create_device_mesh(device.type, extents)),
        comm=comm,
        parallelism=BACKENDS[strategy].load(),
    )
    DEFAULT_GROUP.add_context(id(ctx), comm.close)
    try:
        yield ctx
    finally:
        faccel.shutdown(ctx)
        DEFAULT_GROUP.release(id(ctx), None)
