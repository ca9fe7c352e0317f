"""Loading: everything that will be read is verified on some rank before any rank writes anything."""

from __future__ import annotations

import logging
import os
from typing import Any

from faccel.checkpoint.background import settle
from faccel.checkpoint.dcp import Reader
from faccel.checkpoint.decode import Decoder
from faccel.checkpoint.manifest import Checkpoint, Manifest, check_hash, checkpoints, read_manifest
from faccel.comm.all_or_error import all_or_error
from faccel.context import DistContext
from faccel.effects import AMBIENT, COLLECTIVE, effectful, updates
from faccel.errors import CheckpointError

_logger = logging.getLogger(__name__)


@effectful(AMBIENT, COLLECTIVE)
def latest(path: str | os.PathLike[str], ctx: DistContext) -> Checkpoint | None:
    """Return the newest committed checkpoint of a directory, the same on every rank; None where there is none.

    Effects: ambient, collective. Rank 0 looks at manifests and sizes; `load` compares hashes too.

    Examples:
        >>> from faccel.testing import fake_context
        >>> latest("no/such/place", fake_context(0, 1)) is None
        True
    """
    settle(ctx)
    found = _found(path, ctx)
    return next((each for each in found if each.problem is None), None)


def _found(path: str | os.PathLike[str], ctx: DistContext) -> list[Checkpoint]:
    looked = all_or_error(
        lambda: checkpoints(path) if ctx.is_main else None,
        ctx,
        f"look into `{os.fspath(path)}`",
        error=CheckpointError,
    )
    return looked[0] or []


@effectful(AMBIENT, COLLECTIVE, updates("state"))
def load(
    state: Any, path: str | os.PathLike[str], ctx: DistContext, *, step: int | None = None
) -> Any:
    """Load the newest valid checkpoint of a directory into `state`.

    Effects: updates state, ambient, collective. Reads files, and executes nothing that is in them. What has identity
    (models, optimizers, schedulers, objects with `load_state_dict`) is written in place, after everything that is read
    was verified on all ranks; every value (scaler, cursor, random states, numbers, tensors) is returned new.

    Args:
        state: Of the structure that was saved, or a part of it: a dict may leave out keys.
        path: A directory of checkpoints.
        ctx: The world. Its size and layout may differ from those that saved.
        step: Which checkpoint; None takes the newest that is as it was written.

    Returns:
        The state, with the same objects and new values.

    Raises:
        CheckpointError: There is none, the one of `step` is not as it was written, none is, or it does not fit `state`;
            on every rank, and nothing has been written.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from faccel.checkpoint.save import save
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = save({"step": 3, "x": torch.ones(2)}, path, ctx, step=3)
        ...     load({"step": 0, "x": None}, path, ctx)
        {'step': 3, 'x': tensor([1., 1.])}
    """
    settle(ctx)
    found = _found(path, ctx)
    candidates = found if step is None else [each for each in found if each.step == step]
    if not candidates:
        there = ", ".join(str(each.step) for each in found) or "nothing"
        raise CheckpointError(
            f"there is no checkpoint{'' if step is None else f' of step {step}'} in `{os.fspath(path)}`",
            got=f"steps: {there}" if found else there,
            fix="ask `faccel.latest(path, ctx)` first, which is None where there is none",
        )
    problems: list[str] = []
    for each in candidates:
        problem = each.problem or _verify(each, ctx)
        if problem is None:
            return _load(each, state, ctx)
        problems.append(f"step {each.step}: {problem}")
        if ctx.is_main:
            _logger.warning(
                "checkpoint `%s` is not as it was written, so an older one is tried: %s",
                each.path,
                problem,
            )
    raise CheckpointError(
        f"no checkpoint{'' if step is None else f' of step {step}'} in `{os.fspath(path)}` is as it was written",
        got="; ".join(problems),
        fix="restore it from a copy"
        if step is None
        else "load another step, or none in particular",
    )


def _verify(checkpoint: Checkpoint, ctx: DistContext) -> str | None:
    """Compare the hash of every file, each on one rank; return what is wrong."""

    def mine() -> list[str]:
        manifest = read_manifest(checkpoint.path)
        files = manifest.files[ctx.rank :: ctx.world_size]
        return [problem for entry in files if (problem := check_hash(checkpoint.path, entry))]

    try:
        return next(
            (
                problem
                for part in all_or_error(mine, ctx, "verify", error=CheckpointError)
                for problem in part
            ),
            None,
        )
    except CheckpointError as error:
        return error.got


def _load(checkpoint: Checkpoint, state: Any, ctx: DistContext) -> Any:
    def plan() -> Any:
        manifest: Manifest = read_manifest(checkpoint.path)
        reader = Reader(checkpoint.path, [each.name for each in manifest.files])
        decoder = Decoder(state, reader.stored(), ctx)
        finish = decoder.decode(manifest.state, state)
        planned.append((reader, decoder, finish))

    planned: list[Any] = []
    all_or_error(plan, ctx, "find a place for everything in the checkpoint", error=CheckpointError)
    reader, decoder, finish = planned[0]
    all_or_error(
        lambda: reader.read(decoder.destinations), ctx, "read the checkpoint", error=CheckpointError
    )
    loaded: list[Any] = []
    all_or_error(lambda: loaded.append(finish()), ctx, "load the checkpoint", error=CheckpointError)
    return loaded[0]
