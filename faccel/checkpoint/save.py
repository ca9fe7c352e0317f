"""Saving a state: at once, or in the background."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from faccel.checkpoint.background import settle, start
from faccel.checkpoint.manifest import Checkpoint
from faccel.checkpoint.policy import KeepPolicy, keep_policy
from faccel.checkpoint.transaction import begin
from faccel.comm.all_or_error import all_or_error
from faccel.context import DistContext
from faccel.effects import AMBIENT, COLLECTIVE, effectful
from faccel.errors import CheckpointError


@effectful(AMBIENT, COLLECTIVE)
def save(
    state: Any,
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
    """Save `state` as the checkpoint of `step`: when this returns it is on the disk, or it did not happen.

    Effects: ambient, collective. Writes files; every rank of the world must call it with a state of the same structure,
    on a file system that all of them see. Each rank writes its part (replicas are shared out), rank 0 commits.

    Args:
        state: Any nesting of wrapped models, modules, optimizers, schedulers, scalers, cursors, random states,
            TensorDicts, tensors, arrays, numbers, strings, records, and objects with `state_dict` and
            `load_state_dict`. Random states differ between ranks, of everything else that is no tensor rank 0's counts.
        path: A directory of checkpoints, which is made where it is missing. One run writes into it at a time.
        ctx: The world.
        step: Must be above the newest committed checkpoint's.
        keep: How many checkpoints stay, or a policy; None keeps all. Those that go, go after this one is committed.
        overwrite: Whether `step` may be at or below the newest: those at and above it are dropped, once this one is
            committed.
        background: Whether to return as soon as the state is copied; threads write it, never two at once. A failure is
            raised by the next call that saves or loads, or by `shutdown`.
        trained_only: Whether the parameters of models that require no gradients are left out, as those below adapters
            (LoRA): `load` leaves them as they are, so build the model with them first.
        metadata: Numbers and strings for policies and people, as in `{"accuracy": 0.97}`; found in `Checkpoint`.

    Returns:
        The checkpoint, the same on every rank, which can be loaded at once; with `background` its `problem` says that
        it is still being written.

    Raises:
        CheckpointError: `step` is not above the newest, another writer is at work, the disk is full, ...; on every
            rank, and the older checkpoints are as they were.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     at = save({"step": 3}, path, ctx, step=3)
        ...     at.step, at.problem
        (3, None)
    """
    policy = keep_policy(keep)
    settle(ctx)
    begun = begin(
        os.path.abspath(path),
        state,
        ctx,
        step,
        overwrite=overwrite,
        background=background,
        trained_only=trained_only,
    )
    if background:
        start(begun, ctx, metadata, policy)
        return Checkpoint(begun.target.final, step, ctx.world_size, problem="still being written")
    try:
        files = [
            entry
            for part in all_or_error(begun.write, ctx, "write its part", error=CheckpointError)
            for entry in part
        ]
        manifest = begun.manifest(files, metadata, ctx)
        done = all_or_error(
            lambda: begun.commit(manifest, policy) if ctx.is_main else None,
            ctx,
            "commit",
            error=CheckpointError,
        )[0]
        assert done is not None
        return done
    finally:
        begun.end()
