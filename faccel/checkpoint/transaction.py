"""`SaveTransaction`: one checkpoint is planned, written and committed; a crash loses nothing.

All files are written and fsynced in a temporary folder. Renaming the folder commits the checkpoint.
Only after that older checkpoints are deleted.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs
import torch
import xxhash

from faccel.checkpoint.arguments import check_encodable, check_step, metadata_argument
from faccel.checkpoint.codec import Node
from faccel.checkpoint.codec_per_rank import key_paths
from faccel.checkpoint.codecs import encoder_for
from faccel.checkpoint.dcp import global_save_plan, local_save_plan, planned_slices
from faccel.checkpoint.files import (
    DirectoryLock,
    FileEntry,
    Slice,
    make_directory,
    sync_directory,
    write_file,
    write_shards,
)
from faccel.checkpoint.folders import delete_folder, remove_left_overs, unused_folder
from faccel.checkpoint.manifest import (
    MANIFEST,
    TEMPORARY_PREFIX,
    Checkpoint,
    Manifest,
    check_format,
    checkpoint_of,
    checkpoints,
    is_written_by_faccel,
)
from faccel.checkpoint.merge_pipeline import merge_stages
from faccel.checkpoint.node_checks import check_nodes
from faccel.checkpoint.policy import KeepPolicy
from faccel.checkpoint.rank_calls import on_all_ranks
from faccel.checkpoint.save_request import SaveRequest, check_equal_requests
from faccel.checkpoint.tensor_names import first_names
from faccel.checkpoint.verification import first_problem
from faccel.checkpoint.verified import VerifiedFolders
from faccel.comm.objects import gather_objects
from faccel.context import DistContext
from faccel.device_table import is_host, kind_of
from faccel.errors import CheckpointError
from faccel.tree import Tree

if TYPE_CHECKING:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.planner import SavePlan

_logger = logging.getLogger(__name__)


@attrs.frozen
class Destination:
    """The folders of one save, chosen by rank 0.

    Args:
        temporary: Where all ranks write.
        final: The name that the folder gets when it is committed.
        corrupt: Corrupt checkpoints at or above the step, which are renamed, so that they do not
            hide the new one.
    """

    temporary: str
    final: str
    corrupt: tuple[str, ...] = ()


@attrs.frozen(eq=False)
class _Proposal:
    """What each rank sends to all ranks before anything is written."""

    request: SaveRequest
    destination: Destination | None
    plan: SavePlan
    node: Node
    per_rank: Mapping[str, Node]
    keys: str


class SaveTransaction:
    """One checkpoint that is being written. Call `plan`, `write`, `commit`, and always `close`.

    Args:
        request: What to save where.
        ctx: The world.
        metadata: See `save`. Rank 0's is stored.
    """

    def __init__(
        self, request: SaveRequest, ctx: DistContext, metadata: Mapping[str, Any] | None = None
    ) -> None:
        self.request = request
        self._metadata = metadata
        self.rank = ctx.rank
        self.world_size = ctx.world_size
        self._ctx = ctx
        self._verified = VerifiedFolders.of(ctx)
        self._lock: DirectoryLock | None = None  # on rank 0
        self._destination: Destination | None = None
        self._planner: DefaultSavePlanner | None = None
        self._node: Node = None
        self._per_rank_lists: dict[str, list[Node]] = {}
        self._slices: list[Slice] = []

    @property
    def destination(self) -> Destination:
        """The folders of this save; known after `plan`."""
        assert self._destination is not None
        return self._destination

    def plan(self, state: Tree) -> None:
        """Encode the state, make the folder on rank 0, and decide what each rank writes.

        Effects: ambient, collective.

        Raises:
            CheckpointError: On every rank; nothing was written.
        """
        proposals = on_all_ranks(lambda: self._propose(state), self._ctx, "begin a checkpoint")
        check_equal_requests([proposal.request for proposal in proposals])
        self._check_equal_keys([proposal.keys for proposal in proposals])
        self._fill_per_rank([proposal.per_rank for proposal in proposals])
        self._destination = proposals[0].destination
        # DCP's own `save` gathers plans and scatters the global one. The global plan is
        # deterministic, so every rank computes it: one collective instead of two.
        plans = global_save_plan([proposal.plan for proposal in proposals])
        assert self._planner is not None
        self._slices = planned_slices(plans[self.rank], self._planner)
        # It refers to all tensors of the state, also to temporary ones such as gathered optimizer
        # states. A background save must not keep them on the device while training continues.
        self._planner = None
        spec = self._ctx.mesh.spec
        if spec.pp > 1:
            stages = [proposals[rank].node for rank in spec.peers(0, "pp")]
            # Rank 0's itself and not the copy that was sent: it has the lists of `per_rank`.
            self._node = merge_stages([self._node, *stages[1:]])

    def _propose(self, state: Tree) -> _Proposal:
        check_step(self.request.step)
        check_encodable(self.request.path)
        # A copy: in the background, the commit comes after the user's next changes.
        self._metadata = metadata_argument(self._metadata)
        encoder = encoder_for(state, self._ctx, trained_only=self.request.trained_only)
        self._node = encoder.encode(state)
        _check_loadable(self._node)
        self._per_rank_lists = encoder.per_rank_lists
        self._planner, plan = local_save_plan(encoder.tensors, self.rank)
        if self._ctx.is_main:
            self._destination = self._open()
        # A rank of a pipeline has some of the modules; elsewhere rank 0 has the node of the full
        # state.
        node = None
        if self._ctx.mesh.spec.pp > 1:
            node = self._node
        keys = xxhash.xxh3_64_hexdigest("\n".join(key_paths(self._node)).encode())
        return _Proposal(self.request, self._destination, plan, node, encoder.per_rank, keys)

    def _fill_per_rank(self, by_rank: Sequence[Mapping[str, Node]]) -> None:
        """Add the nodes of all ranks to the values that are marked with `per_rank`."""
        for rank, nodes in enumerate(by_rank):
            unequal = nodes.keys() ^ by_rank[0].keys()
            if unequal:
                raise CheckpointError(
                    f"{first_names(unequal)} is marked with `per_rank` on some ranks only",
                    got=f"ranks 0 and {rank}",
                    fix="mark it on every rank",
                )
            for path, node in nodes.items():
                self._per_rank_lists[path][rank] = node

    def _check_equal_keys(self, digests: Sequence[str]) -> None:
        """Raise if ranks have other keys: only rank 0's are stored. Collective if they differ."""
        # Stages of a pipeline have different modules.
        if self._ctx.mesh.spec.pp > 1 or len(set(digests)) == 1:
            return
        rank = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
        keys_by_rank = gather_objects(key_paths(self._node), self._ctx)
        first, other = set(keys_by_rank[0]), set(keys_by_rank[rank])
        differences: list[str] = []
        if first - other:
            differences.append(f"{first_names(first - other)} only on rank 0")
        if other - first:
            differences.append(f"{first_names(other - first)} only on rank {rank}")
        raise CheckpointError(
            "the states of the ranks have different keys, and rank 0's would be stored",
            got=", ".join(differences),
            fix="give the state the same keys on all ranks, or mark the value above them: "
            "`faccel.checkpoint.per_rank(value)`",
        )

    def _open(self) -> Destination:
        """Lock the directory, delete what crashed writers left, make the temporary folder.

        On rank 0.
        """
        path, step = self.request.path, self.request.step
        make_directory(path)
        self._lock = DirectoryLock(path)
        remove_left_overs(path)
        existing = checkpoints(path)
        # A run that resumed from an older checkpoint saves the steps of corrupt ones again.
        # Only those can hide the new one; hashing all checkpoints would be slow.
        at_or_above = [checkpoint for checkpoint in existing if checkpoint.step >= step]
        for checkpoint in at_or_above:  # newest first
            check_format(checkpoint)
        corrupt = [checkpoint.path for checkpoint in at_or_above if _is_corrupt(checkpoint)]
        if not self.request.overwrite:
            _check_newest(step, existing, corrupt)
        temporary = os.path.join(path, f"{TEMPORARY_PREFIX}{step}-{secrets.token_hex(4)}")
        os.mkdir(temporary)
        final = unused_folder(path, step)
        return Destination(temporary, final, tuple(corrupt))

    def copy_to_host(self) -> None:
        """Copy the slices of this rank into memory of the host.

        Effects: ambient. Later updates of the parameters do not change the copies.
        """
        copies: list[Slice] = []
        is_on_device = False
        for piece in self._slices:
            if is_host(piece.tensor.device):
                copy = piece.tensor.clone()
            else:
                # Pinned memory: the copies of all slices overlap, and one synchronization waits for
                # them.
                copy = torch.empty(
                    piece.tensor.shape,
                    dtype=piece.tensor.dtype,
                    pin_memory=kind_of(piece.tensor.device).has_pinned_memory,
                )
                copy.copy_(piece.tensor, non_blocking=True)
                is_on_device = True
            copies.append(attrs.evolve(piece, tensor=copy))
        if is_on_device:
            torch.accelerator.synchronize()
        self._slices = copies

    def write(self) -> list[FileEntry]:
        """Write the slices of this rank; return the files.

        Effects: ambient.
        """
        return write_shards(self.destination.temporary, self.rank, self._slices)

    def commit(
        self,
        files: Iterable[FileEntry],
        policy: KeepPolicy,
    ) -> Checkpoint:
        """Turn the temporary folder into a checkpoint, then delete older ones. On rank 0.

        Effects: ambient.

        Args:
            files: The files of all ranks.
            policy: Which checkpoints to keep.
        """
        manifest = Manifest(
            step=self.request.step,
            world_size=self.world_size,
            mesh=attrs.asdict(self._ctx.mesh.spec),
            created_s=time.time(),
            metadata=self._metadata or {},
            files=tuple(files),
            state=self._node,
        )
        path, temporary, final = (
            self.request.path,
            self.destination.temporary,
            self.destination.final,
        )
        new = checkpoint_of(final, manifest)
        # The policy is the user's code: it runs before the commit, so that its error leaves
        # everything unchanged.
        obsolete = self._obsolete(new, policy)
        # The order is what makes a save atomic: all bytes and names are on the disk before the
        # rename.
        write_file(temporary, MANIFEST, [manifest.to_bytes()])
        sync_directory(temporary)
        os.rename(temporary, final)  # the commit
        sync_directory(path)
        self._verified.forget(final)
        try:
            for folder in filter(is_written_by_faccel, self.destination.corrupt):
                os.rename(folder, f"{folder}.corrupt-{secrets.token_hex(4)}")
            for checkpoint in obsolete:
                delete_folder(checkpoint.path)
        except OSError as error:  # the checkpoint is committed, so `save` has succeeded
            _logger.warning("old checkpoints could not be deleted: %s", error)
        return new

    def _obsolete(self, new: Checkpoint, policy: KeepPolicy) -> list[Checkpoint]:
        """Return the checkpoints to delete after the commit, oldest first."""
        existing = checkpoints(self.request.path)
        committed = [checkpoint for checkpoint in existing if self._is_committed(checkpoint)]
        older = [checkpoint for checkpoint in committed if checkpoint.step < new.step]
        kept_steps = policy([new, *older])
        obsolete: list[Checkpoint] = []
        # The policy counts checkpoints whose hashes were never compared: they may be corrupt.
        verified = [checkpoint for checkpoint in older if self._verified.is_valid(checkpoint.path)]
        protected = verified[:1]  # the newest
        for checkpoint in reversed(committed):
            is_kept = checkpoint.step < new.step and checkpoint.step in kept_steps
            if not is_kept and checkpoint not in protected:
                obsolete.append(checkpoint)
        # Oldest first. With `overwrite`, after a crash in between, the newest one is still the
        # newest of before, not a middle one.
        return obsolete

    def _is_committed(self, checkpoint: Checkpoint) -> bool:
        if checkpoint.problem is not None or checkpoint.path in self.destination.corrupt:
            return False
        return not self._verified.is_corrupt(checkpoint.path)

    def close(self) -> None:
        """Delete what was not committed, and release the directory for the next writer.

        Effects: ambient. Only rank 0 has something to do.
        """
        if self._lock is None:
            return
        # The folder is gone after a commit, and after an earlier call.
        if self._destination is not None and os.path.exists(self._destination.temporary):
            with suppress(OSError):  # the disk may be gone, too
                # Another rank may still be writing. It cannot create files in a renamed folder.
                delete_folder(self._destination.temporary)
        self._lock.release()


def _check_newest(step: int, existing: Sequence[Checkpoint], corrupt: Sequence[str]) -> None:
    """Raise unless `step` is the newest: otherwise `keep` could delete it as an old one."""
    for checkpoint in existing:  # newest first
        if checkpoint.problem is not None or checkpoint.path in corrupt:
            continue
        if step <= checkpoint.step:
            raise CheckpointError(
                f"`step` must be above the newest checkpoint's, got step {step}",
                got=f"step {checkpoint.step} at `{checkpoint.path}`",
                fix=f"load it and continue from step {checkpoint.step + 1}, use another `path`, "
                "or pass `overwrite=True` to delete it",
            )
        return


def _is_corrupt(checkpoint: Checkpoint) -> bool:
    if checkpoint.problem is not None:
        return True
    return first_problem(checkpoint.path) is not None


def _check_loadable(node: Node) -> None:
    """Raise if `load` would refuse a node."""
    try:
        check_nodes(node)
    except ValueError as error:
        raise CheckpointError(
            "the state contains a value that `load` could not read",
            got=str(error),
            fix="leave it out, or store it as tensors, numbers and strings",
        ) from None
