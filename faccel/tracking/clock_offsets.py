"""How far the clocks of other nodes differ from that of rank 0, by exchanges over the network."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import attrs
import torch

from faccel.context import DistContext
from faccel.mesh import WORLD

_NUM_ROUNDS = 10
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@attrs.frozen
class Offset:
    """What is added to a rank's clock for that of rank 0, in nanoseconds.

    Args:
        offset_ns: The middle of the possible values.
        error_ns: How far the true value may be from it.
    """

    offset_ns: int = 0
    error_ns: int = 0


def node_id() -> str:
    """Return what is equal for two processes exactly if they read the same clock.

    Effects: ambient. Reads a file of the kernel.
    """
    # Containers of one node have different names and one kernel, whose clock they read.
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return socket.gethostname()


def exchange_times(
    ctx: DistContext, clock: Callable[[], int]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return when each rank has entered and left some exchanges, by its clock: `[round][rank]`.

    Effects: collective. All-gathers of `int64[2]` over all ranks.
    """
    starts: list[list[int]] = []
    ends: list[list[int]] = []
    last_end = 0
    for _ in range(_NUM_ROUNDS + 1):
        row = torch.tensor([clock(), last_end], dtype=torch.int64, device=ctx.device)
        rows = ctx.comm.all_gather(row, WORLD).tolist()
        last_end = clock()
        starts.append([row[0] for row in rows])
        # A round carries the ends of the round before.
        ends.append([row[1] for row in rows])
    return starts[:-1], ends[1:]


def offsets_of(
    starts: Sequence[Sequence[int]], ends: Sequence[Sequence[int]], nodes: Sequence[str]
) -> list[Offset]:
    """Return the offset of each rank.

    No rank leaves an all-gather before every rank has entered it. Let `o` be the offset of rank r:
    `start[0] <= end[r] + o` and `start[r] + o <= end[0]`. Each round and each rank of a node
    narrows the interval of `o`, as the shortest round trip does in Cristian's algorithm (1989).

    Effects: pure.

    Examples:
        >>> starts, ends = [[100, 5100]], [[150, 5130]]  # the second clock is 5 us ahead
        >>> offsets_of(starts, ends, ["a", "b"])
        [Offset(offset_ns=0, error_ns=0), Offset(offset_ns=-4990, error_ns=40)]
    """
    offsets = {nodes[0]: Offset()}
    for node in nodes:
        if node in offsets:
            continue
        ranks = [rank for rank, other in enumerate(nodes) if other == node]
        # The ranks of the node of rank 0 read its clock, too.
        peers = [rank for rank, other in enumerate(nodes) if other == nodes[0]]
        lower = max(
            max(start[peer] for peer in peers) - min(end[rank] for rank in ranks)
            for start, end in zip(starts, ends, strict=True)
        )
        upper = min(
            min(end[peer] for peer in peers) - max(start[rank] for rank in ranks)
            for start, end in zip(starts, ends, strict=True)
        )
        # A clock that is set meanwhile leaves no value: the middle is still the best.
        offsets[node] = Offset((lower + upper) // 2, abs(upper - lower) // 2)
    return [offsets[node] for node in nodes]
