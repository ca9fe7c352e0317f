"""The default process group of a single process, for engines that cannot do without one."""

from __future__ import annotations

import torch.distributed as dist

from faccel.context import DistContext
from faccel.device_table import is_host


def ensure_process_group(ctx: DistContext) -> None:
    """Create the default process group of one process, which engines require.

    Effects: ambient. The group is destroyed when the context closes.
    """
    if dist.is_initialized():
        return
    backend = None
    if is_host(ctx.device):
        backend = "gloo"
    # A `HashStore` needs no port: there is no other process to meet.
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def destroy() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    ctx.lifetime.on_close(destroy)
