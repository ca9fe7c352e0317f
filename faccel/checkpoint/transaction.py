"""Writing a checkpoint: everything is on the disk before the name that makes it one is, and only then older ones go."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from faccel.checkpoint.dcp import StreamingWriter, global_save_plan, local_save_plan, slice_of
from faccel.checkpoint.encode import Encoder
from faccel.checkpoint.files import (
    FileEntry,
    Slice,
    lock,
    make_directory,
    sync_directory,
    unlock,
    write_file,
)
from faccel.checkpoint.manifest import (
    MANIFEST,
    TEMPORARY,
    Checkpoint,
    Manifest,
    check_hash,
    checkpoint_of,
    checkpoints,
    folder_name,
    read_manifest,
)
from faccel.checkpoint.merge_pipeline import merged
from faccel.checkpoint.policy import KeepPolicy
from faccel.comm.all_or_error import all_or_error
from faccel.context import DistContext
from faccel.errors import CheckpointError, ConfigError

_logger = logging.getLogger(__name__)


@attrs.frozen(eq=False)
class Target:
    """Where rank 0 writes one checkpoint to.

    Args:
        path: The directory of checkpoints.
        temporary: The folder that is written.
        final: The name that it gets.
        corrupt: Those at or above its step that cannot be loaded; they are moved aside.
    """

    path: str
    temporary: str
    final: str
    corrupt: tuple[str, ...] = ()


@attrs.frozen(eq=False)
class Begun:
    """One rank's part of a checkpoint that is being written.

    Args:
        target: Where rank 0 makes it.
        node: Of the state.
        slices: What this rank writes.
        rank: This rank.
        step: Of the checkpoint.
        overwrite: As in `save`.
        held: The lock, on rank 0.
    """

    target: Target
    node: Any
    slices: list[Slice]
    rank: int
    step: int
    overwrite: bool
    held: list[int]

    def write(self) -> list[FileEntry]:
        """Write this rank's part."""
        writer = StreamingWriter(self.target.temporary, self.rank)
        writer.write(self.slices)
        return writer.entries

    def manifest(
        self, files: Sequence[FileEntry], metadata: Mapping[str, Any] | None, ctx: DistContext
    ) -> Manifest:
        """Return what says that these files are the checkpoint."""
        mesh = attrs.asdict(ctx.mesh.spec)
        return Manifest(
            self.step,
            ctx.world_size,
            mesh,
            time.time(),
            dict(metadata or {}),
            tuple(files),
            self.node,
        )

    def commit(self, manifest: Manifest, policy: KeepPolicy | None) -> Checkpoint:
        """Make the folder a checkpoint, then drop what `overwrite` and `policy` say. On rank 0."""
        path, temporary, final = self.target.path, self.target.temporary, self.target.final
        done = checkpoint_of(final, manifest)
        before = [each for each in checkpoints(path) if each.path not in self.target.corrupt]
        gone = self._superseded(done, [each for each in before if each.problem is None], policy)
        write_file(temporary, MANIFEST, [manifest.to_bytes()])
        sync_directory(temporary)
        os.rename(temporary, final)
        sync_directory(path)
        try:
            for folder in self.target.corrupt:
                os.rename(folder, f"{folder}.corrupt-{secrets.token_hex(4)}")
            for each in gone:
                _discard(each.path)
        except OSError as error:  # the checkpoint is there: this is no reason to say that it is not
            _logger.warning("checkpoints that are not to be kept could not be removed: %s", error)
        return done

    def _superseded(
        self, done: Checkpoint, committed: list[Checkpoint], policy: KeepPolicy | None
    ) -> list[Checkpoint]:
        """Return those that go once `done` is there, oldest first: until the last one has gone, it is the newest."""
        stay = [done, *(each for each in committed if each.step < self.step)]
        kept = {each.step for each in stay} if policy is None else policy(stay)
        gone = [each for each in committed if each.step >= self.step or each.step not in kept]
        return sorted(gone, key=lambda each: each.step)

    def end(self) -> None:
        """Remove what was not committed, and let the next writer in. On rank 0."""
        if self.held:
            shutil.rmtree(self.target.temporary, ignore_errors=True)
            unlock(self.held.pop())


def begin(
    path: str,
    state: Any,
    ctx: DistContext,
    step: int,
    *,
    overwrite: bool,
    background: bool,
    trained_only: bool = False,
) -> Begun:
    """Make the folder on rank 0, and plan on every rank what it writes.

    Effects: ambient, collective.
    """
    encoder, held, own = (
        Encoder(state, ctx, trained_only=trained_only),
        list[int](),
        dict[str, Any](),
    )

    is_part = ctx.mesh.spec.pp > 1
    asked = {"path": path, "step": step, "overwrite": overwrite, "background": background}
    asked["trained_only"] = trained_only

    def offer() -> tuple[Target | None, Any, dict[str, Any], Any]:
        _check_step(step)
        own["node"] = encoder.encode(state)
        own["planner"], plan = local_save_plan(encoder.tensors, ctx.rank)
        own["target"] = _open(path, step, held, overwrite=overwrite) if ctx.is_main else None
        return own["target"], plan, asked, own["node"] if is_part else None

    try:
        offers = all_or_error(offer, ctx, "begin a checkpoint", error=CheckpointError)
        _check_same(offers)
        target = offers[0][0]
        assert target is not None
        mine = global_save_plan([plan for _, plan, _, _ in offers])[ctx.rank]
        slices = [slice_of(item, own["planner"]) for item in mine.items]
        node = (
            merged([offers[r][3] for r in ctx.mesh.spec.peers(0, "pp")]) if is_part else own["node"]
        )
        return Begun(target, node, slices, ctx.rank, step, overwrite, held)
    except BaseException:
        if own.get("target") is not None:
            shutil.rmtree(own["target"].temporary, ignore_errors=True)
        for fd in held:
            unlock(fd)
        raise


def _check_same(offers: list[tuple[Target | None, Any, dict[str, Any], Any]]) -> None:
    """Raise on every rank where they have not asked for the same."""
    first = offers[0][2]
    for rank, (_, _, asked, _) in enumerate(offers):
        for name, value in asked.items():
            if value != first[name]:
                raise CheckpointError(
                    f"ranks save with another `{name}`",
                    got=f"rank 0: {first[name]!r}, rank {rank}: {value!r}",
                    fix="decide on one rank, and tell the others with `faccel.agree` or `faccel.broadcast_objects`",
                )


def _open(path: str, step: int, held: list[int], *, overwrite: bool) -> Target:
    """Take the directory, remove what dead writers left, and make a folder to write into. On rank 0."""
    make_directory(path)
    held.append(lock(path))
    for each in os.scandir(path):
        if each.name.startswith(TEMPORARY):
            shutil.rmtree(each.path, ignore_errors=True)
    found = checkpoints(path)
    corrupt = tuple(each.path for each in found if each.step >= step and _is_corrupt(each))
    newest = next(
        (each for each in found if each.problem is None and each.path not in corrupt), None
    )
    if newest is not None and step <= newest.step and not overwrite:
        raise CheckpointError(
            f"step {step} is not above the newest checkpoint, which a later save would prune",
            got=f"step {newest.step} at `{newest.path}`",
            fix=f"load it and go on from step {newest.step + 1}, save elsewhere, or pass `overwrite=True` to drop it",
        )
    taken = {os.path.basename(each.path) for each in found}
    attempt = next(n for n in range(len(taken) + 1) if folder_name(step, n) not in taken)
    temporary = os.path.join(path, f"{TEMPORARY}{step}-{secrets.token_hex(4)}")
    os.mkdir(temporary)
    return Target(path, temporary, os.path.join(path, folder_name(step, attempt)), corrupt)


def _is_corrupt(found: Checkpoint) -> bool:
    """Whether a checkpoint cannot be loaded. It stands in the way of a run that has gone on from an older one."""
    if found.problem is not None:
        return True
    return any(check_hash(found.path, entry) for entry in read_manifest(found.path).files)


def _discard(folder: str) -> None:
    """Remove a checkpoint so that no part of it is ever taken for one."""
    gone = os.path.join(os.path.dirname(folder), f"{TEMPORARY}old-{secrets.token_hex(4)}")
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _check_step(step: Any) -> None:
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ConfigError(
            "`step` counts updates from 0", got=repr(step), fix="pass an int, as in `step=step`"
        )
