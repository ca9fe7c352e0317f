"""`load_model`: weights from safetensors files, also of the Hugging Face ecosystem."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress

import attrs
import torch
from torch import nn

from faccel.checkpoint.arguments import path_argument
from faccel.checkpoint.dcp import Reader
from faccel.checkpoint.export import INDEX_FILES, WEIGHTS_FILES, Weights, user_module
from faccel.checkpoint.files import read_regular_file
from faccel.checkpoint.headers import check_slices, read_slices
from faccel.checkpoint.rank_calls import on_all_ranks
from faccel.checkpoint.tensor_names import first_names
from faccel.checkpoint.tied_tensors import StoredTie, check_equal, tied_names
from faccel.context import DistContext
from faccel.effects import AMBIENT, COLLECTIVE, effectful, updates
from faccel.errors import CheckpointError
from faccel.training.model import WrappedModel
from faccel.training.module_names import original_names, with_user_names


@effectful(AMBIENT, COLLECTIVE, updates("model"))
def load_model(
    model: WrappedModel | nn.Module,
    path: str | os.PathLike[str],
    ctx: DistContext,
    *,
    trained_only: bool = False,
) -> None:
    """Load safetensors files, from `export_model` or from the Hugging Face ecosystem, into a model.

    Effects: updates model, ambient, collective. Files are memory-mapped and each rank reads its
    shards, so loading needs the memory of one tensor besides the model. Weights are cast to the
    model's dtypes.

    Args:
        model: From `wrap`, or a module.
        path: A directory with `model.safetensors`, the name of diffusers, or an index; or a file.
        ctx: The world.
        trained_only: Whether the files are from `export_model(..., trained_only=True)`.

    Raises:
        CheckpointError: Names or shapes differ from the model's, or dtypes cannot be cast to the
            model's; the message names them. The model is unchanged.

    Examples:
        >>> import tempfile
        >>> from faccel.testing import fake_context
        >>> from faccel.checkpoint import export_model
        >>> ctx, net = fake_context(0, 1), torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as path:
        ...     _ = export_model(net, path, ctx)
        ...     load_model(net, path, ctx)
    """
    call = "faccel.checkpoint.load_model(model, path, ctx)"
    absolute = path_argument("model", model, path, call)
    user_module(model)  # raises if it is none
    ctx.comm.begin_call("load_model")
    state = model.state_dict()
    weights = Weights.of(model, state, trained_only=trained_only)
    ties = tied_names(model, with_user_names(state))
    plans: list[_ReadPlan] = []

    def plan() -> Set[str]:
        folder, files = files_with_weights(absolute)
        _check_complete(folder, files)
        plans.append(_ReadPlan.of(weights, ties, Reader(folder, files)))
        plans[0].check_ties(ctx)
        return plans[0].unknown

    unknown = on_all_ranks(plan, ctx, "find the weights of the model")
    # A rank of a pipeline has the modules of its stages, so it has some names of the files.
    check_none(set.intersection(*map(set, unknown)), "unknown to the model")
    on_all_ranks(lambda: plans[0].read(), ctx, "read the weights")
    # Most modules' `state_dict` returns the parameters themselves, which have been read into; some
    # return copies.
    on_all_ranks(lambda: model.load_state_dict(state), ctx, "load the weights")


@attrs.frozen(eq=False)
class _ReadPlan:
    """What is read from files into the tensors of a model.

    Args:
        reader: Reads the files.
        destinations: The tensors of the model, by their names in the files.
        ties: What must be equal in the files.
        unknown: Names in the files that this rank's part of the model does not have.
    """

    reader: Reader
    destinations: Mapping[str, torch.Tensor]
    ties: Sequence[StoredTie]
    unknown: Set[str]

    @classmethod
    def of(cls, weights: Weights, ties: Mapping[str, Sequence[str]], reader: Reader) -> _ReadPlan:
        """Plan what is read; everything is compared before the first weight is read.

        Raises:
            CheckpointError: Names or shapes differ, or dtypes cannot be cast.
        """
        all_stored = reader.stored()
        # Files that were exported from a compiled model have its names.
        file_names = original_names(all_stored)
        stored = with_user_names(all_stored)
        destinations: dict[str, torch.Tensor] = {}
        stored_ties: list[StoredTie] = []
        missing: set[str] = set()
        misshapen: set[str] = set()
        mistyped: set[str] = set()
        known: set[str] = set()
        for first_name, tensor in weights.tensors.items():
            # The files may contain a tied tensor under any of its names, or under several.
            names = [name for name in ties.get(first_name, (first_name,)) if name in stored]
            if not names:
                missing.add(first_name)
                continue
            known.update(names)
            destinations[file_names[names[0]]] = tensor
            misshapen.update(name for name in names if stored[name].shape != tensor.shape)
            # A cast of complex numbers to real ones, or of real numbers to ints, would lose a part
            # of each.
            mistyped.update(
                name for name in names if not torch.can_cast(stored[name].dtype, tensor.dtype)
            )
            for other in names[1:]:
                in_files = (file_names[names[0]], file_names[other])
                stored_ties.append(StoredTie((names[0], other), in_files, tensor.dtype))
        check_none(missing, "missing in the files")
        check_none(misshapen, "of another shape")
        check_none(mistyped, "of a dtype that cannot be cast to the model's")
        return cls(reader, destinations, stored_ties, stored.keys() - known)

    def check_ties(self, ctx: DistContext) -> None:
        """Raise if two names of one tied tensor have different values."""
        shapes = {name: stored.shape for name, stored in self.reader.stored().items()}
        check_equal(self.ties, shapes, self.reader.read_block, ctx, fix=_fix_of_tie)

    def read(self) -> None:
        """Read the weights into the model."""
        self.reader.read(self.destinations)


def _fix_of_tie(name: str) -> str:
    return (
        'leave one out: `faccel.load({"model": model}, path, ctx, format="safetensors", '
        f'strict=False, rename={{"model.{name}": "model.{name}_unused"}})`'
    )


def _check_complete(folder: str, files: Sequence[str]) -> None:
    try:
        check_slices(read_slices(folder, files))
    except ValueError as error:
        raise CheckpointError(
            "the weights are incomplete or corrupt",
            got=str(error),
            fix="export or download them again",
        ) from None


def check_none(names: set[str], problem: str) -> None:
    """Raise if there are names of weights with a problem.

    Raises:
        CheckpointError: Names the first ones.
    """
    if names:
        raise CheckpointError(
            "the weights do not fit the model",
            got=f"{first_names(names)}: {problem}",
            fix="build the model that was exported; convert other formats with `from_pretrained`",
        )


def files_with_weights(path: str) -> tuple[str, list[str]]:
    """Return the folder and the names of the files of an export.

    Effects: ambient.

    Raises:
        CheckpointError: There are none.
    """
    if os.path.isfile(path):
        return os.path.dirname(path), [os.path.basename(path)]
    for index_file, weights_file in zip(INDEX_FILES, WEIGHTS_FILES, strict=True):
        index = os.path.join(path, index_file)
        if os.path.exists(index):
            return path, names_in_index(index)
        if os.path.exists(os.path.join(path, weights_file)):
            return path, [weights_file]
    got = f"none of {', '.join([*WEIGHTS_FILES, *INDEX_FILES])}"
    if not os.path.exists(path):
        got = "no such file or folder"
    elif not os.path.isdir(path):
        got = "neither a folder nor a regular file"
    raise CheckpointError(
        f"`{path}` does not contain weights",
        got=got,
        fix="pass a folder of this node that `export_model` or `save_pretrained` has written",
    )


def names_in_index(index: str, suffix: str = ".safetensors") -> list[str]:
    """Return the names of the files in an index of Hugging Face.

    Effects: ambient.

    Raises:
        CheckpointError: It names files elsewhere, or others than files that end with `suffix`.
    """
    names: set[object] = set()
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        # A cache of Hugging Face has links to the files.
        text = read_regular_file(index, follows_links=True)
        names = set(json.loads(text)["weight_map"].values())
    # A name with a directory, such as `../secret`, would read outside the folder.
    is_valid = re.compile(r"[^/\\\0]+" + re.escape(suffix)).fullmatch
    valid = [name for name in names if isinstance(name, str) and is_valid(name)]
    if not valid or len(valid) < len(names):
        raise CheckpointError(
            "the index names no files of its directory", got=f"`{index}`", fix="export it again"
        )
    return sorted(valid)
