"""Training replicas on uneven inputs: torch's `Join`, and what it leaves out."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.algorithms.join import Join

from faccel.comm.objects import broadcast_objects
from faccel.comm.rank_errors import naming_failed_rank
from faccel.context import DistContext
from faccel.protocols import DATA
from faccel.tree import Tree, map_leaves


@contextmanager
def joining(engine: Any, states: Sequence[Any], ctx: DistContext) -> Generator[None]:
    """Let ranks leave the body after different numbers of updates; then all take model and `states` of the last one."""
    before = engine._join_config
    join = Join([engine])
    try:
        with naming_failed_rank("join", DATA, ctx.comm):
            yield
            with warnings.catch_warnings():  # whose filters it changes
                join.__exit__(None, None, None)
    finally:
        engine._join_config = before  # torch would go on asking who has ended, in each forward
    last = engine._authoritative_rank
    for each in states:  # torch: a rank that ended has not stepped its optimizer since
        (state,) = broadcast_objects(
            [map_leaves(_to_cpu, each.state_dict())], ctx, src=last, axis=DATA
        )
        if ctx.data_rank != last:
            each.load_state_dict(state)


def _to_cpu(leaf: Tree) -> Tree:
    return leaf.detach().cpu() if isinstance(leaf, torch.Tensor) else leaf
