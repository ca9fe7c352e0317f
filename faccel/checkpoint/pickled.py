"""`save_object`: any object as an atomic file."""

from __future__ import annotations

import io
import os
import secrets

import torch

from faccel.checkpoint.arguments import path_argument
from faccel.checkpoint.files import sync_directory, write_file
from faccel.checkpoint.rank_calls import on_rank_0
from faccel.context import DistContext
from faccel.effects import AMBIENT, COLLECTIVE, effectful


@effectful(AMBIENT, COLLECTIVE)
def save_object(obj: object, path: str | os.PathLike[str], ctx: DistContext) -> None:
    """Write rank 0's object with `torch.save`, atomically.

    Effects: ambient, collective. To resume a run, use `save` instead: loading this file executes
    pickled code.

    Args:
        obj: Any object that torch can pickle. Those of the other ranks are ignored.
        path: The file.
        ctx: The world.

    Raises:
        CheckpointError: It cannot be written; on every rank. An older file is unchanged.

    Examples:
        >>> import os, tempfile
        >>> from faccel.testing import fake_context
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_object({"x": 1}, os.path.join(folder, "x.pt"), fake_context(0, 1))
        ...     torch.load(os.path.join(folder, "x.pt"))
        {'x': 1}
    """
    call = "faccel.checkpoint.save_object(obj, path, ctx)"
    target = path_argument("obj", obj, path, call)
    ctx.comm.begin_call("save_object")
    on_rank_0(lambda: _write_pickle(obj, target), ctx, f"write `{target}`")


def _write_pickle(obj: object, path: str) -> None:
    # In memory first: an object that cannot be pickled leaves no file.
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    folder, name = os.path.split(path)
    temporary_name = f".tmp-{name}-{secrets.token_hex(4)}"
    temporary = os.path.join(folder, temporary_name)
    try:
        write_file(folder, temporary_name, [buffer.getvalue()])
        os.replace(temporary, path)  # atomic: readers see the old file or the new one
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    sync_directory(folder)
