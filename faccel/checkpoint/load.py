"""`load`: every file is verified on some rank before any rank changes the state."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Protocol

import attrs

from faccel.checkpoint.arguments import folder_argument, path_argument
from faccel.checkpoint.background import wait_for_pending_saves
from faccel.checkpoint.codec import Decoder, Node, Update
from faccel.checkpoint.codecs import decoder_for
from faccel.checkpoint.dcp import MemoryReader, Reader
from faccel.checkpoint.formats import format_argument
from faccel.checkpoint.import_folder import ImportedSource
from faccel.checkpoint.manifest import (
    Checkpoint,
    check_format,
    check_hash,
    checkpoints,
    newest_committed,
    read_manifest,
)
from faccel.checkpoint.partial import LoadReport, Renamed
from faccel.checkpoint.rank_calls import on_all_ranks, on_rank_0
from faccel.checkpoint.snapshot import Snapshot
from faccel.checkpoint.tensor_names import dotted, first_names
from faccel.checkpoint.tied_tensors import check_equal
from faccel.checkpoint.verification import content_problem
from faccel.checkpoint.verified import VerifiedFolders
from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, COLLECTIVE, effectful, updates
from faccel.errors import CheckpointError, ConfigError, short_repr
from faccel.tree import Tree

_logger = logging.getLogger(__name__)


@effectful(AMBIENT, COLLECTIVE)
def latest(path: str | os.PathLike[str], ctx: DistContext) -> Checkpoint | None:
    """Return the newest committed checkpoint of a directory; None if there is none.

    Effects: ambient, collective. The result is equal on every rank. Rank 0 reads manifests and
    sizes of files; `load` compares hashes too.

    Raises:
        CheckpointError: A newer one was written by a newer version of faccel, or `path` is a file.

    Examples:
        >>> from faccel.testing import fake_context
        >>> latest("missing/directory", fake_context(0, 1)) is None
        True
    """
    require_context(ctx, "faccel.latest(path, ctx)")
    directory = folder_argument(path)
    ctx.comm.begin_call("latest")
    wait_for_pending_saves(ctx)
    # Rank 0's list is on every rank, so all raise for a checkpoint of a newer version.
    return newest_committed(_list(directory, ctx))


def _list(path: str, ctx: DistContext) -> list[Checkpoint]:
    """Return rank 0's list, on every rank: another rank may see the directory a moment later."""
    return on_rank_0(lambda: checkpoints(path), ctx, f"list the checkpoints in `{path}`")


@effectful(AMBIENT, COLLECTIVE, updates("state"))
def load(
    state: Tree,
    path: str | os.PathLike[str],
    ctx: DistContext,
    *,
    step: int | None = None,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
    format: str = "faccel",
) -> Tree:
    """Load the newest valid checkpoint of a directory into `state`.

    Effects: updates state, ambient, collective. Reads files and executes no code from them. Models,
    optimizers, schedulers and other objects with `load_state_dict` are updated in place, after all
    files were verified on all ranks. All values (scaler, cursor, random states, numbers, tensors)
    are returned new.

    Args:
        state: Has the structure that was saved, or a part of it: a dict may leave out keys.
        path: A directory of checkpoints.
        ctx: The world. Its size and mesh may differ from those that saved.
        step: Which checkpoint to load; None loads the newest valid one.
        strict: Whether everything in `state` must be in the checkpoint, with the same shape, and
            models and optimizers must have all that was saved. Otherwise what does not fit is left
            as it is, and values are cast to the dtypes of the model.
        rename: New names by those in the checkpoint, as keys joined by dots:
            `{"model.body": "model.backbone"}`. A name stands for everything below it. They are
            applied in order, also to the states of optimizers.
        format: What has written `path`: "accelerate" (`save_state`), "fabric", "dcp", "torch"
            (files of `torch.save`), "safetensors", or "auto" for the one that the names of the
            files show. Each rank reads all files, and needs the memory of their tensors.

    Returns:
        The state, with the same objects and new values. Without `strict`, `(state, report)`; the
        fields `missing`, `unexpected` and `mismatched` of the report are names, equal on every
        rank.

    Raises:
        CheckpointError: There is no checkpoint, the one of `step` is corrupt, all are, a newer
            version of faccel has written it, or it does not fit `state`; on every rank. The state
            is unchanged. Only a failure of the disk after the verification, or of a model's
            `load_state_dict`, leaves models that are loaded in part.
        ConfigError: `state` and `path` are swapped, or a name in `rename` is not in the checkpoint.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> from faccel.checkpoint.save import save
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = save({"step": 3, "x": torch.ones(2)}, path, ctx, step=3)
        ...     load({"step": 0, "x": None}, path, ctx)
        {'step': 3, 'x': tensor([1., 1.])}
    """
    directory = path_argument("state", state, path, "faccel.load(state, path, ctx)")
    options = _LoadOptions(step, strict, rename, format)
    with ctx.lifetime.phase("checkpoint"):
        loaded, loaded_step = _load(state, directory, ctx, options)
    if loaded_step is not None:
        ctx.lifetime.note("loaded", loaded_step)
    return loaded


@attrs.frozen
class _LoadOptions:
    """The options of `load`."""

    step: int | None
    strict: bool
    rename: Mapping[str, str] | None
    format: str


def _load(
    state: Tree, directory: str, ctx: DistContext, options: _LoadOptions
) -> tuple[Tree, int | None]:
    """Return the state, and the step of its checkpoint; None for a folder of another program."""
    step, strict, rename = options.step, options.strict, options.rename
    ctx.comm.begin_call("load")
    if format_argument(options.format) != "faccel":
        source = _imported_source(directory, state, options.format, step, rename)
        load_plan = _LoadPlan(source, state, ctx, strict=strict, rename=rename)
        return _load_verified(load_plan, ctx), None
    # The newest checkpoint may be the one that is being written.
    wait_for_pending_saves(ctx)
    existing = _list(directory, ctx)
    candidates = existing
    if step is not None:
        candidates = [checkpoint for checkpoint in existing if checkpoint.step == step]
    if not candidates:
        raise _nothing_to_load(directory, step, existing)
    # Only as many are hashed as needed: the newest one is almost always valid.
    problems: list[str] = []
    for checkpoint in candidates:
        # `problem` is rank 0's and `_verify` is collective: all ranks take the same branch
        check_format(checkpoint)
        problem = checkpoint.problem or _verify(checkpoint, ctx)
        VerifiedFolders.of(ctx).record(checkpoint.path, is_valid=problem is None)
        if problem is None:
            source = _CheckpointSource(checkpoint.path)
            load_plan = _LoadPlan(source, state, ctx, strict=strict, rename=rename)
            return _load_verified(load_plan, ctx), checkpoint.step
        problems.append(f"step {checkpoint.step}: {problem}")
        if ctx.is_main:  # one line in the log, not one per rank
            message = "checkpoint `%s` is corrupt, trying an older one: %s"
            _logger.warning(message, checkpoint.path, problem)
    raise _all_corrupt(directory, step, problems)


def _nothing_to_load(
    directory: str, step: int | None, existing: list[Checkpoint]
) -> CheckpointError:
    missing = "a checkpoint"
    if step is not None:
        missing += f" of step {step}"
    steps = ", ".join(str(checkpoint.step) for checkpoint in existing) or "none"
    return CheckpointError(
        f"`path` does not contain {missing}",
        got=f"`{directory}` with steps: {steps}",
        fix="call `faccel.latest(path, ctx)` first, which returns None if there is none",
    )


def _all_corrupt(directory: str, step: int | None, problems: list[str]) -> CheckpointError:
    if step is None:
        problem, fix = f"all checkpoints in `{directory}` are corrupt", "restore one from a copy"
    else:
        problem = f"the checkpoint of step {step} in `{directory}` is corrupt"
        fix = "load another step, or pass `step=None` for the newest valid one"
    return CheckpointError(problem, got="; ".join(problems), fix=fix)


def _verify(checkpoint: Checkpoint, ctx: DistContext) -> str | None:
    """Compare the hash of every file on one rank; return the first problem, equal on every rank."""

    def problems_on_this_rank() -> list[str | None]:
        manifest = read_manifest(checkpoint.path)
        # Files are distributed over the ranks, so that each byte is hashed once.
        entries = manifest.files[ctx.rank :: ctx.world_size]
        problems = [check_hash(checkpoint.path, entry) for entry in entries]
        if ctx.is_main:
            problems.append(content_problem(checkpoint.path, manifest))
        return problems

    try:
        by_rank = on_all_ranks(problems_on_this_rank, ctx, "verify")
    except CheckpointError as error:  # the folder is not readable on a rank
        return error.got
    # Rank 0's last, because a wrong hash is the cause of wrong content.
    for problem in [*chain.from_iterable(by_rank[1:]), *by_rank[0]]:
        if problem is not None:
            return problem
    return None


def _load_verified(load_plan: _LoadPlan, ctx: DistContext) -> Tree:
    # No rank changes its state before all ranks have built all values. Models are changed last:
    # their parameters are read in place, which needs no second copy, and has no way back.
    reports = on_all_ranks(load_plan.make, ctx, "fit the checkpoint to the state")
    report = LoadReport.of_ranks(reports)
    if load_plan.strict and report.unexpected:
        # Each stage of a pipeline loads a subset, so only all ranks together find these.
        raise CheckpointError(
            "the checkpoint does not fit the state",
            got=f"{first_names(set(report.unexpected))} only in the checkpoint",
            fix="build the model and the optimizer that were saved, or pass `strict=False`",
        )
    on_all_ranks(load_plan.build, ctx, "read the values of the checkpoint")
    snapshot = Snapshot(update.target for update in load_plan.updates)
    try:
        on_all_ranks(load_plan.update_objects, ctx, "load the checkpoint into an object")
        on_all_ranks(
            load_plan.update_modules,
            ctx,
            "load the checkpoint to the end, so models are loaded in part",
        )
    except BaseException:  # Ctrl-C, too
        snapshot.restore()
        raise
    if load_plan.strict:
        return load_plan.result
    return load_plan.result, report


class _Source(Protocol):
    """Where a state is loaded from."""

    def open(self, ctx: DistContext) -> tuple[Node, Reader | MemoryReader]:
        """Return the node of the state, and what reads its tensors."""
        ...


@attrs.frozen
class _CheckpointSource:
    """The folder of one checkpoint."""

    folder: str

    def open(self, ctx: DistContext) -> tuple[Node, Reader]:
        manifest = read_manifest(self.folder)
        return manifest.state, Reader(self.folder, manifest.file_names)


def _imported_source(
    path: str, state: Tree, name: str, step: int | None, rename: Mapping[str, str] | None
) -> ImportedSource:
    """Return the source of a folder of another program."""
    if step is not None:
        raise ConfigError(
            "`step` selects one of faccel's checkpoints",
            got=f"step={short_repr(step)}, format={short_repr(name)}",
            fix="leave it out, and pass the folder of the step as `path`",
        )
    # Files of other keys are not read. The keys of the folder are unknown if they get new names.
    keys = None
    if isinstance(state, Mapping) and not rename:
        keys = frozenset(map(str, state))
    return ImportedSource(path, name, keys)


def _fix_of_tie(name: str) -> str:
    """Return how to load without an entry of a model."""
    return f'leave one out: `faccel.load(..., strict=False, rename={{"{name}": "{name}_unused"}})`'


class _LoadPlan:
    """How this rank loads a checkpoint: what is read where, and how the state is restored."""

    def __init__(
        self,
        source: _Source,
        state: Tree,
        ctx: DistContext,
        *,
        strict: bool,
        rename: Mapping[str, str] | None,
    ) -> None:
        self.strict = strict
        self._source = source
        self._state = state
        self._ctx = ctx
        self._rename = rename or {}
        self._reader: Reader | MemoryReader | None = None
        self._decoder: Decoder | None = None
        self._restore: Callable[[], Tree] | None = None
        self.result: Tree = None

    @property
    def updates(self) -> Sequence[Update]:
        """The changes of objects that are no models; known after `build`."""
        assert self._decoder is not None
        return self._decoder.updates

    def make(self) -> LoadReport:
        node, reader = self._source.open(self._ctx)
        renamed = Renamed(node, self._rename)
        # Raises for everything that does not fit, before any rank reads or changes something.
        decoder = decoder_for(
            self._state,
            reader.stored(),
            self._ctx,
            strict=self.strict,
            stored_path=renamed.stored_path,
        )
        decoder.current_names = renamed.current_names
        self._restore = decoder.decode(renamed.node, self._state)
        self._reader, self._decoder = reader, decoder
        return LoadReport(
            tuple(map(dotted, decoder.missing)),
            tuple(map(dotted, decoder.unexpected)),
            tuple(map(dotted, decoder.mismatched)),
        )

    def build(self) -> None:
        """Read the tensors of values, and build all values. Changes nothing in the state."""
        assert self._reader is not None and self._decoder is not None
        assert self._restore is not None
        shapes = {name: stored.shape for name, stored in self._reader.stored().items()}
        read_block = self._reader.read_block
        check_equal(self._decoder.ties, shapes, read_block, self._ctx, fix=_fix_of_tie)
        self._reader.read(self._decoder.destinations)
        self.result = self._restore()

    def update_objects(self) -> None:
        """Update optimizers and other objects, except models."""
        for update in self.updates:
            try:
                update.apply()
            except Exception as error:  # of the user's class
                name = type(update.target).__name__
                raise CheckpointError(
                    f"a {name} raised in `load_state_dict`, so the state is unchanged",
                    got=f"{type(error).__name__}: {error}",
                    fix="load the object that was saved, or leave it out of the state",
                ) from error

    def update_modules(self) -> None:
        """Read the tensors of models in place, and update the models."""
        assert self._reader is not None and self._decoder is not None
        self._reader.read(self._decoder.module_destinations)
        for update in self._decoder.module_updates:
            update.apply()
