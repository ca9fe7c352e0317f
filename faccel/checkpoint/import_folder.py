"""A checkpoint of another program as the source of `load`, or written anew by `save`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping

import attrs

from faccel.checkpoint.arguments import folder_argument
from faccel.checkpoint.codec import Node
from faccel.checkpoint.codecs import encoder_for
from faccel.checkpoint.dcp import MemoryReader
from faccel.checkpoint.formats import num_updates, read_format
from faccel.checkpoint.imported import ImportedOptimizer
from faccel.checkpoint.manifest import Checkpoint
from faccel.checkpoint.node_checks import check_nodes
from faccel.checkpoint.save import save
from faccel.context import DistContext
from faccel.data.order import Cursor
from faccel.errors import CheckpointError, ConfigError
from faccel.tree import Tree

_logger = logging.getLogger(__name__)


@attrs.frozen
class ImportedSource:
    """A folder of another program, for `load`.

    Args:
        path: The folder or the file.
        name: Of the format.
        keys: See `read_format`.
    """

    path: str
    name: str
    keys: frozenset[str] | None

    def open(self, ctx: DistContext) -> tuple[Node, MemoryReader]:
        """Return the node of the state, and what reads its tensors.

        Effects: ambient. Reads the files, and logs on rank 0 what is left out.

        Raises:
            CheckpointError: A file contains code or is corrupt.
        """
        imported = read_format(self.path, self.name, keys=self.keys)
        if ctx.is_main:
            for name, reason in imported.left_out.items():
                _logger.warning("`%s` is not loaded: %s", name, reason)
            for note in imported.notes:
                _logger.warning("%s", note)
        # The same nodes as in a file: `load` does not distinguish them.
        encoder = encoder_for(imported.state, ctx)
        encoder.is_per_rank = True  # each rank has read all tensors
        node = encoder.encode(imported.state)
        try:
            check_nodes(node)
        except ValueError as error:
            raise CheckpointError(
                "the checkpoint contains a value that faccel does not store",
                got=str(error),
                fix="leave its key out of the state",
            ) from None
        return node, MemoryReader(encoder.tensors)


@attrs.frozen
class ImportReport:
    """What `import_checkpoint` has written.

    Args:
        checkpoint: The checkpoint.
        state: What each key of its state holds.
        left_out: Why each file or key is not part of it.
        notes: What differs, one sentence each.
    """

    checkpoint: Checkpoint
    state: Mapping[str, str]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]


def import_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    ctx: DistContext,
    *,
    format: str = "auto",
    step: int | None = None,
    epoch: int | None = None,
    samples: int | None = None,
    skip: Collection[str] = (),
) -> ImportReport:
    """Write the checkpoint of another program as one of faccel.

    Effects: ambient, collective. Reads `path` and writes into `out`. It needs the memory of the
    tensors. Executes no code of the files.

    Args:
        path: A folder or a file of another program.
        out: A directory of checkpoints.
        ctx: A world of one process.
        format: See `load`.
        step: The step of the checkpoint; None is `step` or `global_step` of the state, else the
            number of updates that the optimizer counts, else the last number in the name of `path`.
        epoch: The epoch of the cursor; without it and `samples` there is no cursor.
        samples: How many samples of the epoch all ranks together have read.
        skip: Keys of the state, and names of files of Accelerate, that are left out.

    Raises:
        CheckpointError: A file contains code or is corrupt, the folder has another format, or `out`
            has a newer checkpoint.
        ConfigError: An argument is invalid.
    """
    path, out = folder_argument(path), folder_argument(out, "out")
    if format == "faccel":
        raise ConfigError(
            "a checkpoint of faccel needs no import",
            got='format="faccel"',
            fix="call `faccel.load(state, path, ctx)`",
        )
    imported = read_format(path, format, skip=skip)
    state, left_out = imported.state, dict(imported.left_out)
    notes = [*imported.notes, *_numbered(state)]
    # `save` needs a step: the best evidence is used, and the screen shows it.
    if step is None:
        step = _step_of(path, state, num_updates(imported))
    state.setdefault("step", step)
    # Without an option there is no cursor: one at the start would repeat data silently.
    if epoch is not None or samples is not None:
        state["cursor"] = Cursor(epoch or 0, samples or 0)
    elif "cursor" not in state:
        left_out["cursor"] = (
            "the folder holds no epoch: pass `--epoch` and `--samples`, or load a state without it"
        )
    # From here on it is an ordinary state: atomic, hashed, for any world size.
    checkpoint = save(state, out, ctx, step=step)
    kinds = {key: _description(value) for key, value in state.items()}
    return ImportReport(checkpoint, kinds, left_out, tuple(notes))


def _step_of(path: str, state: Mapping[str, Tree], counted: int | None) -> int:
    """Return the step of the checkpoint: the state's, the optimizer's, or that in the name."""
    for key in ("step", "global_step"):
        value = state.get(key)
        if type(value) is int and value >= 0:
            return value
    if counted is not None:
        return counted
    # `checkpoint_3`, `epoch_2`, `step_500`
    numbers = re.findall(r"\d{1,18}", os.path.basename(path))
    return int(numbers[-1]) if numbers else 0


def _numbered(state: Mapping[str, Tree]) -> list[str]:
    """Return a note for each optimizer whose parameters have no names."""
    notes: list[str] = []
    for key, value in state.items():
        if isinstance(value, ImportedOptimizer) and "0" in value.names().values():
            notes.append(
                f"{key}: its parameters have numbers; `load` gives them the names of the "
                "parameters of your optimizer, in their order"
            )
    return notes


def _description(value: Tree) -> str:
    name = type(value).__name__.removeprefix("Imported")
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    if isinstance(value, (int, float, str)):
        return f"{words} {value!r}"
    return words
