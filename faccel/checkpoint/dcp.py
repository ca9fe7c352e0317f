"""PyTorch's distributed checkpoint (DCP): its planners decide what each rank writes and reads.

DCP is imported by the functions that call it: it takes a second, because DTensor imports SymPy.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from faccel.checkpoint.codec import StoredTensor
from faccel.checkpoint.files import Slice

if TYPE_CHECKING:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.planner import ReadItem, SavePlan


def _save_planner() -> DefaultSavePlanner:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    # DCP would flatten nested states by its own rules: names are the encoder's.
    return DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)


def local_save_plan(
    tensors: Mapping[str, torch.Tensor], rank: int
) -> tuple[DefaultSavePlanner, SavePlan]:
    """Return the planner of this rank, and its plan of the slices that it could write.

    The plan can be pickled.
    """
    planner = _save_planner()
    planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
    return planner, planner.create_local_plan()


def global_save_plan(plans: list[SavePlan]) -> list[SavePlan]:
    """Return what each rank writes: every shard, and replicated tensors once, balanced by size."""
    # Deterministic: each rank computes it from the gathered plans, without another collective.
    return _save_planner().create_global_plan(plans)[0]


def planned_slices(plan: SavePlan, planner: DefaultSavePlanner) -> list[Slice]:
    """Return the slices that a rank writes by its part of the global plan."""
    slices: list[Slice] = []
    for item in plan.items:
        tensor = planner.resolve_data(item)
        assert isinstance(tensor, torch.Tensor)
        offsets: Sequence[int] | None = item.index.offset
        if offsets is None:  # a replicated tensor is one slice
            offsets = [0] * tensor.ndim
        assert item.tensor_data is not None
        slices.append(Slice(item.index.fqn, tensor, offsets, item.tensor_data.size))
    return slices


class _FilteredFileSystem:
    """The file system of a DCP reader, in which a directory lists certain files only."""

    def __init__(self, file_system: object, paths: list[str]) -> None:
        self._file_system = file_system
        self._paths = paths

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        return self._paths

    def __getattr__(self, name: str) -> object:
        return getattr(self._file_system, name)


class Reader:
    """Reads the tensors of a folder, independent of the ranks and the layout that wrote them.

    Args:
        folder: A folder with safetensors files.
        files: The names of the files to read; None reads all.
    """

    def __init__(self, folder: str, files: Sequence[str] | None = None) -> None:
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        self._reader = HuggingFaceStorageReader(folder)
        if files is not None:
            # The reader opens every safetensors file that the folder lists: those of another
            # export, too.
            paths = [os.path.join(folder, name) for name in files]
            file_system = _FilteredFileSystem(self._reader.fs, paths)
            self._reader.fs = file_system  # type: ignore[assignment]
        self._metadata = self._reader.read_metadata()
        # Each rank reads for itself, without the collectives of `dcp.load`, so each one is a
        # coordinator.
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def stored(self) -> dict[str, StoredTensor]:
        """Return the full shape and the dtype of each tensor by its name."""
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        tensors: dict[str, StoredTensor] = {}
        for name, metadata in self._metadata.state_dict_metadata.items():
            if isinstance(metadata, TensorStorageMetadata):
                tensors[name] = StoredTensor(metadata.size, metadata.properties.dtype)
        return tensors

    def read(self, destinations: Mapping[str, torch.Tensor]) -> None:
        """Write the stored values into `destinations`, which it updates.

        Of a sharded tensor only the local shard is read.
        """
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(destinations), self._metadata, is_coordinator=True)
        plan = planner.finish_plan(self._reader.prepare_local_plan(planner.create_local_plan()))
        self._reader.read_data(plan, planner).wait()

    def read_block(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Return a block of a stored tensor, on the CPU."""
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            TensorStorageMetadata,
        )
        from torch.distributed.checkpoint.planner import LoadPlan
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        metadata = self._metadata.state_dict_metadata[name]
        assert isinstance(metadata, TensorStorageMetadata)
        block = torch.empty(tuple(sizes), dtype=metadata.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        # The block may be in several slices of the files.
        plan = LoadPlan(create_read_items_for_chunk_list(name, metadata, [chunk]))
        self._reader.read_data(plan, _BlockPlanner(block)).wait()  # type: ignore[arg-type]
        return block


class _BlockPlanner:
    """The two methods of a planner of DCP that a reader of files calls, for one block."""

    def __init__(self, block: torch.Tensor) -> None:
        self._block = block

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        return _block(self._block, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Do nothing: the tensor is a view of the block."""


class MemoryReader:
    """Reads tensors that this process has as full tensors: the same as `Reader`, without files.

    Args:
        tensors: Full tensors on the CPU by name.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def stored(self) -> dict[str, StoredTensor]:
        """Return the full shape and the dtype of each tensor by its name."""
        stored: dict[str, StoredTensor] = {}
        for name, tensor in self._tensors.items():
            stored[name] = StoredTensor(tensor.shape, tensor.dtype)
        return stored

    def read(self, destinations: Mapping[str, torch.Tensor]) -> None:
        """Write the values into `destinations`, which it updates; of a sharded tensor its shard."""
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            Metadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        # A tensor is described as one chunk, as if one file had all of it.
        entries: dict[str, TensorStorageMetadata] = {}
        for name in destinations:
            tensor = self._tensors[name]
            chunk = ChunkStorageMetadata(torch.Size([0] * tensor.ndim), tensor.shape)
            entries[name] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), tensor.shape, [chunk]
            )
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        metadata = Metadata(dict(entries))
        planner.set_up_planner(dict(destinations), metadata, is_coordinator=True)
        # The plan has the slices that this rank's shards need.
        for item in planner.finish_plan(planner.create_local_plan()).items:
            source = _block(
                self._tensors[item.storage_index.fqn], item.storage_offsets, item.lengths
            )
            planner.resolve_tensor(item).detach().copy_(source)

    def read_block(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """Return a block of a tensor; a contiguous one."""
        return _block(self._tensors[name], offsets, sizes).contiguous()


def _block(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """Return a view of a block of a tensor."""
    for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor
