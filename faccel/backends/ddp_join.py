"""Training replicas on uneven inputs: PyTorch's `Join`, and the states that it leaves out."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import cast

from torch.distributed.algorithms.join import Join

from faccel.backends.ddp_engine import DdpEngine
from faccel.backends.param_groups import to_cpu
from faccel.comm.objects import broadcast_objects
from faccel.comm.rank_errors import naming_failed_rank
from faccel.context import DistContext
from faccel.mesh import DATA
from faccel.protocols import Stateful


@contextmanager
def join_uneven(engine: DdpEngine, states: Sequence[Stateful], ctx: DistContext) -> Generator[None]:
    """Let ranks leave the body after different numbers of updates.

    Afterwards every rank has the model and the `states` of a rank that stepped to the end. Updates
    `engine` and `states`; collective.
    """
    config = engine._join_config  # pyright: ignore[reportPrivateUsage]
    # Inside, ranks make different numbers of backwards, after which the engine copies buffers
    # otherwise. DDP's copy in forward takes part in what `Join` counts.
    syncs_in_forward = engine.broadcast_buffers
    engine.broadcast_buffers = engine.syncs_buffers
    # It enables `engine._join_config`, by which each forward counts the ranks that still train.
    join = Join([engine])
    try:
        with naming_failed_rank("join", DATA, ctx.comm):
            yield
            with warnings.catch_warnings():  # Join changes the process's warning filters
                join.__exit__(None, None, None)
    finally:
        # Join leaves its configuration: each later forward would ask which ranks have ended.
        engine._join_config = config  # pyright: ignore[reportPrivateUsage]
        engine.broadcast_buffers = syncs_in_forward
    # DDP has broadcast the parameters from this rank. A rank that ended earlier has not stepped its
    # optimizer and schedulers since.
    last_rank = int(cast("int", engine._authoritative_rank))  # pyright: ignore[reportPrivateUsage]
    for stateful in states:
        (state,) = broadcast_objects([to_cpu(stateful.state_dict())], ctx, src=last_rank, axis=DATA)
        if ctx.data_rank != last_rank:
            stateful.load_state_dict(state)
