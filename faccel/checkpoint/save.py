"""`save`: a checkpoint of the state, in the foreground or in the background."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import chain
from typing import Any

from faccel.checkpoint.arguments import path_argument
from faccel.checkpoint.background import start_background_save, wait_for_pending_saves
from faccel.checkpoint.manifest import Checkpoint
from faccel.checkpoint.policy import KeepPolicy, keep_policy
from faccel.checkpoint.rank_calls import on_all_ranks, on_rank_0
from faccel.checkpoint.save_request import SaveRequest
from faccel.checkpoint.transaction import SaveTransaction
from faccel.context import DistContext
from faccel.effects import AMBIENT, COLLECTIVE, effectful
from faccel.tree import Tree


@effectful(AMBIENT, COLLECTIVE)
def save(
    state: Tree,
    path: str | os.PathLike[str],
    ctx: DistContext,
    *,
    step: int,
    keep: int | KeepPolicy | None = None,
    overwrite: bool = False,
    background: bool = False,
    trained_only: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Save `state` as the checkpoint of `step`, atomically and durably.

    Effects: ambient, collective. Writes files. Every rank must call it with a state of the same
    structure, on a file system that all ranks can access. Each rank writes its shards and a part of
    the replicated tensors; rank 0 commits.

    Args:
        state: Any nesting of wrapped models, modules, optimizers, schedulers, scalers, cursors,
            random states, TensorDicts, tensors, arrays, numbers, strings, records, and objects with
            `state_dict` and `load_state_dict`. Random states and shards are stored for each rank.
            Of replicated tensors and of all other values, rank 0's are stored.
        path: A directory of checkpoints, created if it is missing. Only one run may write into it
            at a time.
        ctx: The world.
        step: Must be above the step of the newest committed checkpoint.
        keep: How many checkpoints to keep, or a policy; None keeps all. Old ones are deleted after
            the commit. Those that a `load` with this context has found corrupt do not count, and
            the newest that it has verified is never deleted.
        overwrite: Whether `step` may be at or below the newest. Then the checkpoints at and above
            it are deleted after the commit.
        background: Whether to return after copying the state to the host. A thread writes it; the
            next save waits for it. The next call that saves or loads, or `shutdown`, raises its
            error.
        trained_only: Whether to leave out frozen parameters, such as the base model of a LoRA
            adapter. `load` does not change them, so build the model with them first.
        metadata: Numbers and strings for policies and for you, as in `{"accuracy": 0.97}`; stored
            in `Checkpoint`. Rank 0's is stored. It must be a JSON object on every rank.

    Returns:
        The checkpoint, equal on every rank. With `background`, its `problem` is "still being
        written".

    Raises:
        CheckpointError: `step` is not above the newest, another run is writing, the disk is full,
            `load` could not read the state, ...; on every rank. Older checkpoints are unchanged.
        ConfigError: `state` and `path` are swapped, or an argument is invalid.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     checkpoint = save({"step": 3}, path, ctx, step=3)
        >>> checkpoint.step, checkpoint.problem
        (3, None)
    """
    directory = path_argument("state", state, path, "faccel.save(state, path, ctx, step=step)")
    policy = keep_policy(keep)
    request = SaveRequest(directory, step, overwrite, background, trained_only)
    with ctx.lifetime.phase("checkpoint"):
        checkpoint = _save(state, request, ctx, policy, metadata)
    ctx.lifetime.note("saved", step)
    return checkpoint


def _save(
    state: Tree,
    request: SaveRequest,
    ctx: DistContext,
    policy: KeepPolicy,
    metadata: Mapping[str, Any] | None,
) -> Checkpoint:
    ctx.comm.begin_call("save")
    # Never two saves at once: the second one could be committed before the first one.
    wait_for_pending_saves(ctx)
    transaction = SaveTransaction(request, ctx, metadata)
    is_thread_running = False
    try:
        transaction.plan(state)
        if request.background:
            start_background_save(transaction, ctx, policy)
            is_thread_running = True
            final = transaction.destination.final
            return Checkpoint(final, request.step, ctx.world_size, problem="still being written")
        # Rank 0 gets the files of all ranks, for the manifest.
        files = chain.from_iterable(on_all_ranks(transaction.write, ctx, "write its shards"))
        return on_rank_0(lambda: transaction.commit(files, policy), ctx, "commit")
    finally:
        if not is_thread_running:  # else the thread closes it
            transaction.close()
