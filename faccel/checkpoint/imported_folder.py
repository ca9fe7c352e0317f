"""`Imported`: what a folder of another program holds, and what of it is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

import attrs
import torch

from faccel.checkpoint.dcp import Reader
from faccel.checkpoint.headers import check_slices, read_slices
from faccel.checkpoint.imported import ImportedModule, ImportedOptimizer, map_optimizers
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


def without_prefix(state: Mapping[str, Tree], notes: list[str]) -> dict[str, Tree]:
    """Return a state without the prefix of `DistributedDataParallel` in its models.

    Effects: updates notes.
    """
    result: dict[str, Tree] = {}
    changed: set[str] = set()
    for key, value in state.items():
        result[key] = value
        # One other name shows that the prefix is the model's.
        if isinstance(value, ImportedModule) and _have_prefix(value.entries):
            entries = {name.removeprefix(_PREFIX): entry for name, entry in value.entries.items()}
            result[key] = ImportedModule(entries)
            changed.add(key)
            notes.append(
                f"{key}: the prefix `{_PREFIX}` of DistributedDataParallel was removed from all "
                f'names; if it is the model\'s, load with `rename={{"{key}": "{key}.module"}}`'
            )

    # The names in an optimizer are those of its model.
    def renamed(opt: ImportedOptimizer) -> ImportedOptimizer:
        if opt.model in changed:
            return attrs.evolve(opt, prefix=_PREFIX)
        return opt

    return map_optimizers(renamed, result)


def _have_prefix(names: Iterable[str]) -> bool:
    return all(name.startswith(_PREFIX) for name in names)


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
