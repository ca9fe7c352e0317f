"""A checkpoint that is written while training goes on: copied at once, written by a thread, committed in two phases.

The threads do not communicate: each rank leaves word of its part in the folder, and rank 0 commits when all have.
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
import torch

from faccel.checkpoint.files import FileEntry, Slice
from faccel.checkpoint.policy import KeepPolicy
from faccel.checkpoint.transaction import Begun
from faccel.comm.all_or_error import all_or_error, as_faccel_error, raise_on_all_ranks
from faccel.context import DistContext
from faccel.errors import CheckpointError, FaccelError
from faccel.protocols import WORLD

_POLL_S = 0.005
_WHAT = "finish the checkpoint that was written in the background"
_GRACE_S = 30.0


class Pending:
    """A checkpoint that a thread of this rank is writing.

    Args:
        work: What the thread does.
    """

    def __init__(self, work: Callable[[Pending], None]) -> None:
        self._work = work
        self._error: BaseException | None = None
        self.patience_s: float | None = None  # None: as long as the configuration says
        self._thread = threading.Thread(target=self._run, name="faccel-save", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work(self)
        except BaseException as error:  # told to the next call
            self._error = error

    def outcome(self, timeout_s: float | None = None) -> BaseException | None:
        """Wait for the thread, for so long at most; return its error."""
        self._thread.join(timeout_s)
        return self._error

    def __call__(self) -> None:
        """Wait for the thread, but for ranks that make no progress only a while; raise its error. For `shutdown`."""
        self.patience_s = _GRACE_S
        error = self.outcome()
        if error is not None:
            raise as_faccel_error(error, _WHAT, CheckpointError)


def settle(ctx: DistContext) -> None:
    """Wait for the checkpoint that is being written in the background; where a rank failed, every rank raises.

    Effects: ambient, collective.
    """
    pending = ctx.lifetime.callbacks(Pending)
    if not pending:
        return
    ctx.comm.barrier(WORLD)  # every rank has started its thread: in a simulation nobody else would
    for save in pending:
        ctx.lifetime.cancel(save)
    # Rank 0 waits for the others' parts, so it hears of them first; where it has failed itself, they failed after it.
    first_s = 0.1 if ctx.is_main else None
    errors = [error for each in pending if (error := each.outcome(first_s)) is not None]
    try:
        raise_on_all_ranks(errors[0] if errors else None, ctx, _WHAT, error=CheckpointError)
    except FaccelError:
        for each in pending:
            each.patience_s = 0.0
            each.outcome()
        raise
    errors = [error for each in pending if (error := each.outcome()) is not None]
    raise_on_all_ranks(errors[0] if errors else None, ctx, _WHAT, error=CheckpointError)


def staged(slices: Sequence[Slice]) -> list[Slice]:
    """Copy slices into the memory of the host, so that a later update does not reach them."""
    copies: list[Slice] = []
    for each in slices:
        if each.tensor.device.type == "cpu":
            copy = each.tensor.clone()
        else:
            copy = torch.empty(each.tensor.shape, dtype=each.tensor.dtype, pin_memory=True)
            copy.copy_(each.tensor, non_blocking=True)
        copies.append(attrs.evolve(each, tensor=copy))
    if any(each.tensor.device.type != "cpu" for each in slices):
        torch.accelerator.synchronize()
    return copies


def start(
    begun: Begun, ctx: DistContext, metadata: Mapping[str, Any] | None, policy: KeepPolicy | None
) -> None:
    """Copy this rank's part, and write it on a thread.

    Effects: ambient, collective.
    """
    copies: list[list[Slice]] = []
    try:
        all_or_error(
            lambda: copies.append(staged(begun.slices)), ctx, "copy its part", error=CheckpointError
        )
    except BaseException:
        begun.end()
        raise
    begun = attrs.evolve(begun, slices=copies[0])
    world_size, timeout_s = ctx.world_size, ctx.config.timeout_s

    def work(pending: Pending) -> None:
        try:
            _leave_word(begun, _written(begun))
            if begun.rank == 0:
                files = _wait_for_words(begun.target.temporary, world_size, timeout_s, pending)
                begun.commit(begun.manifest(files, metadata, ctx), policy)
        finally:
            begun.end()

    ctx.lifetime.on_close(Pending(work))


def _written(begun: Begun) -> dict[str, Any]:
    try:
        return {"files": [attrs.asdict(entry) for entry in begun.write()]}
    except Exception as error:
        with suppress(
            OSError
        ):  # a disk that is full takes no word either; rank 0 hears of it from the next call
            _leave_word(begun, {"error": f"{type(error).__name__}: {error}"})
        raise


def _word(folder: str, rank: int) -> str:
    return os.path.join(folder, f"rank-{rank:05d}.json")


def _leave_word(begun: Begun, word: Mapping[str, Any]) -> None:
    path = _word(begun.target.temporary, begun.rank)
    with open(f"{path}.new", "w") as file:
        json.dump(word, file)
    os.rename(f"{path}.new", path)  # whole, or not there


def _bytes_in(folder: str) -> int:
    size = 0
    with os.scandir(folder) as entries:
        for each in entries:
            with suppress(FileNotFoundError):  # a word gets its name just now
                size += each.stat().st_size
    return size


def _wait_for_words(
    folder: str, world_size: int, timeout_s: float, pending: Pending
) -> list[FileEntry]:
    files: list[FileEntry] = []
    moved_at, moved = time.monotonic(), -1
    for rank in range(world_size):
        path = _word(folder, rank)
        while not os.path.exists(path):
            size = _bytes_in(folder)
            if size != moved:  # somebody writes
                moved_at, moved = time.monotonic(), size
            patience_s = timeout_s if pending.patience_s is None else pending.patience_s
            if time.monotonic() > moved_at + patience_s:
                what = f"rank {rank} has not written its part"
                raise CheckpointError(what, got="no word of it", fix="look at its log")
            time.sleep(_POLL_S)
        with open(path) as file:
            word = json.load(file)
        if "error" in word:
            raise CheckpointError(
                f"rank {rank} could not write its part", got=word["error"], fix="mend that"
            )
        files += [FileEntry(**each) for each in word["files"]]
        os.unlink(path)
    return files
