"""Debug mode: the ranks compare the first inputs of a model, to find a loader without `shard`."""

from __future__ import annotations

import torch

from faccel.comm.objects import gather_json
from faccel.context import DistContext
from faccel.data.shard_checks import digest
from faccel.errors import DataError
from faccel.mesh import DATA
from faccel.protocols import RunMethod
from faccel.tree import Tree

# Two: one equal input may be a trial with constant data.
_NUM_COMPARED = 2


def with_compared_inputs(run: RunMethod, ctx: DistContext) -> RunMethod:
    """Return `run`, which raises if all data ranks train on the same inputs without `shard`.

    Effects: pure. Each of the first calls of the result with gradients is collective.

    Args:
        run: Runs a method of the model.
        ctx: The context.
    """
    num_equal: list[int] = []

    def run_compared(method: str, *args: Tree, **kwargs: Tree) -> Tree:
        is_done = len(num_equal) == _NUM_COMPARED or ctx.lifetime.has_loader
        if not is_done and torch.is_grad_enabled():
            # A loader of `shard` yields other rows on each rank; without one all may read the same.
            digests = gather_json(digest([list(args), kwargs]), ctx, axis=DATA)
            is_equal = digests[0] is not None and len(set(digests)) == 1
            num_equal.append(int(is_equal))
            if sum(num_equal) == _NUM_COMPARED:
                raise _same_inputs_error(ctx)
        return run(method, *args, **kwargs)

    return run_compared


def _same_inputs_error(ctx: DistContext) -> DataError:
    return DataError(
        f"all {ctx.data_world_size} data ranks train on the same inputs: no loader was given to "
        "`faccel.shard`",
        got=f"equal inputs in the first {_NUM_COMPARED} forwards with gradients",
        fix="write `loader = faccel.shard(loader, ctx)`, or "
        '`faccel.shard(loader, ctx, mode="local")` if that is what you want',
    )
