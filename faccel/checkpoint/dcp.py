"""Between torch's distributed checkpoint and our files: its planners say who writes and reads what."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from faccel.checkpoint.decode import Stored
from faccel.checkpoint.files import FileEntry, Slice, write_safetensors


@attrs.define(eq=False)
class StreamingWriter(StorageWriter):
    """Writes what this rank was planned to write: streamed, hashed and synced, without a copy of the state.

    Args:
        directory: Where to.
        rank: Its number is part of the names of the files.
        entries: The files that it has written.
    """

    directory: str
    rank: int
    entries: list[FileEntry] = attrs.field(factory=list)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Forget the files of a checkpoint that ended."""
        self.entries = []

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:  # noqa: FBT001
        """Do nothing: the directory is there."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of a plan."""
        self.write([slice_of(item, planner) for item in plan.items])
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [WriteResult(item.index, item.tensor_storage_size() or 0, None) for item in plan.items]
        )
        return done

    def write(self, slices: Sequence[Slice]) -> None:
        """Write slices; those of one tensor into files of their own, because a name is in a file once."""
        files: list[dict[str, Slice]] = []
        for each in slices:
            free = next((file for file in files if each.key not in file), None)
            if free is None:
                files.append({each.key: each})
            else:
                free[each.key] = each
        for i, file in enumerate(files, start=1):
            name = f"shard-{self.rank + 1:05d}-model-{i:05d}-of-{len(files):05d}.safetensors"
            self.entries.append(write_safetensors(self.directory, name, file.values()))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Do nothing: the headers of the files hold the metadata, the manifest is the caller's."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether this can be written to: a directory."""
        return os.path.isdir(checkpoint_id)


def slice_of(item: WriteItem, planner: SavePlanner) -> Slice:
    """Return what an item of a plan asks to be written."""
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    offsets = item.index.offset
    return Slice(item.index.fqn, tensor, [0] * tensor.ndim if offsets is None else offsets)


def local_save_plan(
    tensors: Mapping[str, torch.Tensor], rank: int
) -> tuple[DefaultSavePlanner, SavePlan]:
    """Return what this rank has to offer. The plan can be pickled."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
    return planner, planner.create_local_plan()


def global_save_plan(plans: list[SavePlan]) -> list[SavePlan]:
    """Return who writes what: replicas once, shared out by size. The same on every rank."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    return planner.create_global_plan(plans)[0]


class _Listed:
    """A file system in which a directory holds what it is said to hold."""

    def __init__(self, fs: Any, paths: list[str]) -> None:
        self._fs, self._paths = fs, paths

    def ls(self, path: Any) -> list[str]:
        return self._paths

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fs, name)


class Reader:
    """Reads the tensors of a folder, whatever ranks and layout wrote them.

    Args:
        folder: Of a checkpoint.
        files: Which of its files; None takes all safetensors.
    """

    def __init__(self, folder: str, files: Sequence[str] | None = None) -> None:
        self._reader = HuggingFaceStorageReader(folder)
        if files is not None:
            paths = [os.path.join(folder, name) for name in files]
            self._reader.fs = _Listed(self._reader.fs, paths)  # type: ignore[assignment]
        self._metadata = self._reader.read_metadata()

    def stored(self) -> dict[str, Stored]:
        """Return what there is under each name."""
        found: dict[str, Any] = self._metadata.state_dict_metadata
        return {
            key: Stored(each.size, each.properties.dtype)
            for key, each in found.items()
            if isinstance(each, TensorStorageMetadata)
        }

    def read(self, destinations: Mapping[str, torch.Tensor]) -> None:
        """Write the stored values into `destinations`: tensors, or DTensors of which this rank's part is read."""
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        planner.set_up_planner(dict(destinations), self._metadata, is_coordinator=True)
        plan = planner.finish_plan(self._reader.prepare_local_plan(planner.create_local_plan()))
        self._reader.read_data(plan, planner).wait()
