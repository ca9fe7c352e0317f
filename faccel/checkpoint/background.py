"""Background saves: a thread on each rank writes a copy of the state while training continues.

The threads use no collectives, which would interleave with those of the training loop. Instead,
each rank leaves a marker file with its result in the temporary folder, and rank 0 commits after it
has read the markers of all ranks.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import attrs

from faccel.checkpoint.files import FileEntry
from faccel.checkpoint.policy import KeepPolicy
from faccel.checkpoint.rank_calls import on_all_ranks
from faccel.checkpoint.transaction import SaveTransaction
from faccel.comm.all_or_error import as_faccel_error, raise_on_all_ranks
from faccel.context import DistContext
from faccel.errors import (
    CheckpointError,
    DesyncError,
    FaccelError,
    RankFailedError,
    WorldError,
)
from faccel.mesh import WORLD

_POLL_INTERVAL_S = 0.005
_DOING = "finish the background save"
_SHUTDOWN_TIMEOUT_S = 30.0


class PendingSave:
    """A background save of this rank. Creating it starts its thread.

    Args:
        work: What the thread runs.
        discard: Called after a failure, when the threads of all ranks have ended.
    """

    def __init__(
        self,
        work: Callable[[PendingSave], None],
        discard: Callable[[], None] = lambda: None,
    ) -> None:
        self._work = work
        self.discard = discard
        self._error: BaseException | None = None
        # How long rank 0 waits for a rank that writes nothing; None is the `timeout_s` of the
        # configuration.
        self.stall_timeout_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="faccel-save", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work(self)
        except BaseException as error:  # raised by the next call that saves or loads
            self._error = error

    def error(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait up to `timeout_s` for the thread; return the error that it raised, if any."""
        self._thread.join(timeout_s)
        return self._error

    def __call__(self) -> None:
        """Wait for the thread and raise its error; for `shutdown`, when other ranks may be dead."""
        self.stall_timeout_s = _SHUTDOWN_TIMEOUT_S
        error = self.error()
        if error is not None:
            raise as_faccel_error(error, _DOING, CheckpointError)


def wait_for_pending_saves(ctx: DistContext) -> None:
    """Wait until no checkpoint is being written in the background.

    Effects: ambient, collective.

    Raises:
        CheckpointError: It failed on a rank; on every rank.
    """
    pending = ctx.lifetime.callbacks(PendingSave)
    if not pending:
        return
    # In a simulation only one rank runs at a time: none may block before all have started their
    # threads.
    ctx.comm.barrier(WORLD)
    for save in pending:
        ctx.lifetime.cancel(save)
    # Rank 0's thread waits for the markers of the other ranks. A rank may have failed without one.
    # Its error then ends the wait: so rank 0 joins the exchange of errors without waiting for its
    # own thread.
    first_timeout_s = None
    if ctx.is_main:
        first_timeout_s = 0.1
    try:
        _raise_first(pending, ctx, first_timeout_s)
    except (DesyncError, RankFailedError, WorldError):  # the other ranks are not reachable
        _end_threads(pending)
        raise
    except FaccelError:
        _end(pending, ctx)
        raise
    _raise_first(pending, ctx, None)


def _end(saves: Sequence[PendingSave], ctx: DistContext) -> None:
    """Wait for the threads of all ranks after a failure, and delete what they have written."""
    _end_threads(saves)
    # Only now: a thread that still writes would add files to a folder that rank 0 is deleting.
    ctx.comm.barrier(WORLD)
    for save in saves:
        save.discard()


def _end_threads(saves: Sequence[PendingSave]) -> None:
    """Wait for the threads of this rank, which do not wait for other ranks any more.

    Until then the directory is locked, and rank 0 could still commit.
    """
    for save in saves:
        save.stall_timeout_s = 0.0
        save.error()


def _raise_first(saves: Sequence[PendingSave], ctx: DistContext, timeout_s: float | None) -> None:
    first: BaseException | None = None
    for save in saves:
        error = save.error(timeout_s)
        if first is None:
            first = error
    raise_on_all_ranks(first, ctx, _DOING, error=CheckpointError)


def start_background_save(
    transaction: SaveTransaction,
    ctx: DistContext,
    policy: KeepPolicy,
) -> None:
    """Copy the slices of this rank, and start a thread that writes and commits them.

    Effects: ambient, collective. The thread closes the transaction.

    Args:
        transaction: After `plan`.
        ctx: The world.
        policy: See `SaveTransaction.commit`.
    """
    on_all_ranks(transaction.copy_to_host, ctx, "copy its shards")
    folder, timeout_s = transaction.destination.temporary, ctx.config.timeout_s

    def work(pending: PendingSave) -> None:
        try:
            _write_with_marker(transaction)
            if transaction.rank == 0:
                files = wait_for_markers(folder, transaction.world_size, timeout_s, pending)
                transaction.commit(files, policy)
        finally:
            transaction.close()

    ctx.lifetime.on_close(PendingSave(work, transaction.close))


def _write_with_marker(transaction: SaveTransaction) -> None:
    """Write the slices of this rank, then its marker with the files or the error."""
    try:
        files = transaction.write()
    except Exception as error:
        with suppress(OSError):  # a full disk has no room for the marker either
            _write_marker(transaction, {"error": f"{type(error).__name__}: {error}"})
        raise
    _write_marker(transaction, {"files": [attrs.asdict(entry) for entry in files]})


def _marker_path(folder: str, rank: int) -> str:
    return os.path.join(folder, f"rank-{rank:05d}.json")


def _write_marker(transaction: SaveTransaction, marker: Mapping[str, Any]) -> None:
    path = _marker_path(transaction.destination.temporary, transaction.rank)
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump(marker, file)  # not fsynced: if the node crashes, the save has failed anyway
    os.rename(f"{path}.new", path)  # atomic: rank 0 never reads half of it


def wait_for_markers(
    folder: str, world_size: int, timeout_s: float, pending: PendingSave
) -> list[FileEntry]:
    """Wait for the markers of all ranks, remove them, and return the files of all ranks.

    Effects: ambient.

    Args:
        folder: The temporary folder of the save.
        world_size: Number of ranks.
        timeout_s: How long to wait while the size of the folder does not change.
        pending: Its `stall_timeout_s` replaces `timeout_s`, also while this waits.

    Raises:
        CheckpointError: A rank has failed, or writes nothing.
    """
    files: list[FileEntry] = []
    changed_at_s, size = time.monotonic(), -1
    for rank in range(world_size):
        path = _marker_path(folder, rank)
        while not os.path.exists(path):
            current_size = folder_size(folder)
            if current_size != size:  # a rank is writing: slow is not stalled
                changed_at_s, size = time.monotonic(), current_size
            # read again and again, because `shutdown` may lower it while this waits
            limit_s = pending.stall_timeout_s
            if limit_s is None:
                limit_s = timeout_s
            if time.monotonic() > changed_at_s + limit_s:
                raise CheckpointError(
                    f"rank {rank} has not written its shards",
                    got=f"no change in `{folder}` for {limit_s:g} s",
                    fix="look at the log of that rank",
                )
            time.sleep(_POLL_INTERVAL_S)
        files += _read_marker(path, rank)
        os.unlink(path)
    return files


def _read_marker(path: str, rank: int) -> list[FileEntry]:
    with open(path, encoding="utf-8") as file:
        marker = json.load(file)
    if "error" in marker:
        raise CheckpointError(
            f"rank {rank} could not write its shards",
            got=marker["error"],
            fix="look at the log of that rank",
        )
    return [FileEntry(**entry) for entry in marker["files"]]


def folder_size(folder: str) -> int:
    """Return the size of the files in a folder, in bytes.

    Effects: ambient.
    """
    size = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # a marker is being renamed
                size += entry.stat().st_size
    return size
