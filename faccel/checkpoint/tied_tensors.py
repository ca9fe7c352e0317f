"""Tied tensors: the names that a model has for one tensor, and their values in a checkpoint.

PyTorch's `load_state_dict` copies the values of one name after the other into the tensor, so the
last one wins. The stages of a pipeline have one name each: their copies would differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

import attrs
import torch
from torch import nn

from faccel.checkpoint.tensor_names import all_names
from faccel.checkpoint.tensor_views import is_storable, memory_key
from faccel.context import DistContext
from faccel.errors import CheckpointError, short_text
from faccel.training.model import WrappedModel
from faccel.training.module_names import user_name
from faccel.tree import Tree, has_inner_tensors, local_tensor

_BLOCK_BYTES = 1 << 26  # two of them are in memory while values are compared


def tie_keys(model: WrappedModel | nn.Module, state: Mapping[str, Tree]) -> dict[str, Hashable]:
    """Return a key for each tensor of `state` that is stored as it is; tied ones have one key.

    Effects: pure.

    Args:
        model: The model.
        state: Its `state_dict`, or a part of it, under the user's names.
    """
    ids = {name: id(param) for name, param in all_names(model)}
    keys: dict[str, Hashable] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or has_inner_tensors(tensor):
            continue
        if not is_storable(tensor):  # its memory cannot be read
            continue
        # A `state_dict` has new objects, so their memory is compared. An empty shard has none.
        if local_tensor(tensor).numel() == 0:
            keys[name] = ids.get(name, name)
        else:
            keys[name] = memory_key(name, tensor)
    return keys


def tied_names(
    model: WrappedModel | nn.Module, state: Mapping[str, Tree]
) -> dict[str, Sequence[str]]:
    """Return all names of each tied tensor, by each of its names.

    Effects: pure. In a pipeline also names of other ranks, in an order that is equal on all ranks.

    Args:
        model: The model.
        state: Its `state_dict` under the user's names.
    """
    names_by_key: dict[Hashable, list[str]] = {}
    for name, key in tie_keys(model, state).items():
        names_by_key.setdefault(key, []).append(name)
    groups: Iterable[Sequence[str]] = names_by_key.values()
    if isinstance(model, WrappedModel):
        # These have the names on this rank, too: they come last and replace the smaller groups.
        groups = chain(groups, model.parallelism.tied_names(model.engine).values())
    ties: dict[str, Sequence[str]] = {}
    for group in groups:
        names = tuple(map(user_name, group))
        if len(names) > 1:
            ties |= dict.fromkeys(names, names)
    return ties


@attrs.frozen
class StoredTie:
    """Two tensors in files that are values of one tensor of a model; the first one is read.

    Args:
        names: Their names in the state, for messages.
        stored_names: Their names in the files.
        dtype: Of the tensor that they are read into.
    """

    names: tuple[str, str]
    stored_names: tuple[str, str]
    dtype: torch.dtype


ReadBlock = Callable[[str, Sequence[int], Sequence[int]], torch.Tensor]
"""Returns a block of a stored tensor on the CPU, from its name, its offsets and its sizes."""


def check_equal(
    ties: Iterable[StoredTie],
    shapes: Mapping[str, torch.Size],
    read_block: ReadBlock,
    ctx: DistContext,
    *,
    fix: Callable[[str], str],
) -> None:
    """Raise if the files have different values for one tensor of the model.

    Effects: ambient. Each data rank compares some blocks, so all of them must call it, and raise
    together.

    Args:
        ties: What to compare.
        shapes: Of the tensors in the files, by their names there.
        read_block: Reads a part of one.
        ctx: The world.
        fix: Returns how to load the first tensor alone, from the name of the second one.

    Raises:
        CheckpointError: Two tensors differ; the message names them.
    """
    for tie in ties:
        first, other = tie.stored_names
        is_equal = shapes[first] == shapes[other]
        if not (is_equal and all(_blocks_are_equal(tie, shapes[first], read_block, ctx))):
            raise different_values(tie.names, fix(tie.names[1]))


def different_values(names: tuple[str, str], fix: str) -> CheckpointError:
    """Return the error for files with different values for one tensor of a model.

    Args:
        names: The names in the files.
        fix: How to load one of them alone.
    """
    first_name, other_name = map(short_text, names)
    return CheckpointError(
        "two names of one tied tensor have different values in the files",
        got=f"`{first_name}` and `{other_name}`, which are one tensor of the model",
        fix=f"make two tensors of them in the model, or {fix}",
    )


def are_equal(first: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether two contiguous tensors are equal, as values of a tensor of `dtype`."""
    if first.dtype != other.dtype:
        first, other = first.to(dtype), other.to(dtype)
    # As bytes, because NaN is not equal to itself.
    return torch.equal(first.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def _blocks_are_equal(
    tie: StoredTie, shape: torch.Size, read_block: ReadBlock, ctx: DistContext
) -> Iterator[bool]:
    for index, (offsets, sizes) in enumerate(_blocks(shape, tie.dtype.itemsize)):
        if index % ctx.data_world_size == ctx.data_rank:
            first, other = (read_block(name, offsets, sizes) for name in tie.stored_names)
            yield are_equal(first, other, tie.dtype)


def _blocks(shape: torch.Size, itemsize: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield offsets and sizes of blocks of whole rows that cover a tensor."""
    if not shape:
        yield [], []
        return
    row_bytes = math.prod(shape[1:]) * itemsize
    num_rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], num_rows):
        offsets = [start] + [0] * (len(shape) - 1)
        yield offsets, [min(num_rows, shape[0] - start), *shape[1:]]
