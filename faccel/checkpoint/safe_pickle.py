"""Files of `torch.save`, read without executing code that they contain."""

from __future__ import annotations

import functools
import os
import pickle
import re
import zipfile
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from faccel.errors import CheckpointError, short_text
from faccel.tree import Tree

# The reader of torch names what it has refused: `GLOBAL posix.system was not an allowed global`.
_REFUSED = re.compile(r"GLOBAL ([\w.]+)|with type (\S+)|instantiate (\S+)")


def read_pickle(source: str | BinaryIO, name: str) -> Tree:
    """Return what `torch.save` has written.

    Effects: ambient. Reads a file. It builds tensors, arrays, numbers, strings and containers. Any
    other class or function that the file names is refused before it is imported.

    Args:
        source: The path of a file, or its bytes.
        name: The name of the file, for messages.

    Raises:
        CheckpointError: The file contains code, or is corrupt; names it.

    Examples:
        >>> import io, os, torch
        >>> class Code:
        ...     def __reduce__(self):
        ...         return os.system, ("echo executed",)
        >>> buffer = io.BytesIO()
        >>> torch.save({"x": Code()}, buffer)
        >>> _ = buffer.seek(0)
        >>> try:
        ...     read_pickle(buffer, "optimizer.bin")
        ... except CheckpointError as error:
        ...     print(error.problem, error.got, sep=": ")
        `optimizer.bin` contains pickled code, which is not executed: posix.system
    """
    # A pipe or a device would block the reader forever.
    if isinstance(source, str) and not os.path.isfile(source):
        raise unreadable(name, "no regular file")
    # Tensors stay on the disk until they are read. The old format has no such reader.
    is_mapped = isinstance(source, str) and zipfile.is_zipfile(source)
    try:
        with torch.serialization.safe_globals(_safe_globals()):
            return torch.load(
                cast(Any, source), map_location="cpu", weights_only=True, mmap=is_mapped
            )
    except pickle.UnpicklingError as error:
        # Without torch's advice before the cause: to execute what the file names.
        match = _REFUSED.search(str(error))
        if match is None:
            cause = str(error).rpartition("WeightsUnpickler error:")[2]
            raise unreadable(name, f"no file of `torch.save`: {cause.strip()}") from None
        raise refused(name, next(filter(None, match.groups()))) from None
    except MemoryError:
        raise
    except Exception as error:  # what a corrupt file raises depends on the corrupt byte
        raise unreadable(name, f"{type(error).__name__}: {error}") from None


def refused(name: str, code: str) -> CheckpointError:
    """Return the error for a file that names a class or a function that is not data."""
    return CheckpointError(
        f"`{short_text(name)}` contains pickled code, which is not executed",
        got=short_text(code),
        fix="write its tensors and numbers as a `state_dict`; "
        "`faccel checkpoints import --skip NAME` leaves out a file of Accelerate's `save_state`",
    )


def unreadable(name: str, got: str) -> CheckpointError:
    """Return the error for a file that is corrupt or something else."""
    return CheckpointError(
        f"`{short_text(name)}` cannot be read",
        got=short_text(got.strip().partition("\n")[0], 200),
        fix="copy it again; `faccel checkpoints import --skip NAME` leaves out a file of "
        "Accelerate's `save_state`",
    )


@functools.cache
def _safe_globals() -> list[Any]:
    """Return what builds arrays of numbers, as the states of NumPy's generators have them."""
    # Protocol of pickled arrays: `_reconstruct(ndarray, ...)` and `dtype("u4")` build, and the
    # setters of both fill in. None of them imports or calls what the file names.
    core = np.zeros(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    entries: list[Any] = [np.ndarray, np.dtype]
    # NumPy 1 and 2 have other names for one module.
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        entries += [(core, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    codes = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"
    entries += {type(np.dtype(code)) for code in codes}
    return entries
