"""`Imported`: what a folder of another program holds, and what of it is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

import attrs
import torch

from faccel.checkpoint.dcp import Reader
from faccel.checkpoint.headers import check_slices, read_slices
from faccel.checkpoint.imported import ImportedModule
from faccel.checkpoint.safe_pickle import unreadable
from faccel.tree import Tree

# `DistributedDataParallel` stores its module under this name.
_PREFIX = "module."


@attrs.frozen(eq=False)
class Imported:
    """The state in a folder of another program.

    Args:
        state: Its values by key.
        left_out: Why each file or key is not part of `state`.
        notes: What differs in faccel, one sentence each.
        skipped: The files that were skipped because the user has named them.
    """

    state: dict[str, Tree]
    left_out: Mapping[str, str] = attrs.field(factory=dict)
    notes: tuple[str, ...] = ()
    skipped: Set[str] = frozenset()


def without_prefix(value: Tree, key: str, notes: list[str]) -> Tree:
    """Return the state of a module without the prefix of `DistributedDataParallel`.

    Effects: updates notes.
    """
    if not isinstance(value, ImportedModule):
        return value
    # One other name shows that the prefix is the model's.
    if not all(name.startswith(_PREFIX) for name in value.entries):
        return value
    notes.append(
        f"{key}: the prefix `{_PREFIX}` of DistributedDataParallel was removed from all names; "
        f'if it is the model\'s, load with `rename={{"{key}": "{key}.module"}}`'
    )
    entries = {name.removeprefix(_PREFIX): entry for name, entry in value.entries.items()}
    return ImportedModule(entries)


def read_safetensors(folder: str, files: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of safetensors files by name.

    Effects: ambient.

    Raises:
        CheckpointError: A file is corrupt.
    """
    try:
        check_slices(read_slices(folder, files))
    except (OSError, ValueError) as error:
        raise unreadable(", ".join(files), str(error)) from None
    reader = Reader(folder, files)
    tensors: dict[str, torch.Tensor] = {}
    for name, stored in reader.stored().items():
        tensors[name] = torch.empty(stored.shape, dtype=stored.dtype)
    reader.read(tensors)
    return tensors
