"""Free memory: the default budget of a rank, and the return of freed memory to the system."""

from __future__ import annotations

import ctypes
import os
import shutil

import torch

from faccel.context import DistContext
from faccel.device_table import is_host

_FRACTION = 0.9  # activations need the rest


def default_budget(ctx: DistContext) -> dict[str, int]:
    """Return 90 % of the free memory of the device and of the host, and the disk.

    Effects: ambient: reads the sizes from the operating system. The ranks of a node divide the
    memory of the host.
    """
    budget: dict[str, int] = {}
    if not is_host(ctx.device):
        free, _ = torch.get_device_module(ctx.device).mem_get_info(ctx.device)
        budget[str(ctx.device)] = int(_FRACTION * free)
    # Pages of the file cache are not counted as available: a lower, safe number.
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    budget["cpu"] = int(_FRACTION * available / ctx.topology.local_world_size)
    # A limit that no model exceeds: nothing is written.
    budget["disk"] = shutil.disk_usage("/").total
    return budget


def trim_host_memory() -> None:
    """Return freed memory of this process to the operating system.

    Effects: ambient. glibc keeps freed blocks of less than 32 MB. Small tensors between them keep
    them apart, so that a larger tensor does not fit: a process would grow with each tensor.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
    if trim is not None:
        trim(0)
