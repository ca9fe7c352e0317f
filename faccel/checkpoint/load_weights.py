"""`load_model`: weights from safetensors files, also of the Hugging Face ecosystem."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import nn

from faccel.checkpoint.arguments import path_argument
from faccel.checkpoint.codec_modules import first_names
from faccel.checkpoint.dcp import Reader
from faccel.checkpoint.export import INDEX_FILES, WEIGHTS_FILES, Weights, user_module
from faccel.checkpoint.files import read_regular_file
from faccel.checkpoint.headers import check_slices, read_slices
from faccel.checkpoint.rank_calls import on_all_ranks
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
    readers: list[Reader] = []
    destinations: dict[str, torch.Tensor] = {}

    def plan() -> None:
        folder, files = files_with_weights(absolute)
        _check_complete(folder, files)
        readers.append(Reader(folder, files))
        destinations.update(_destinations(weights, readers[0]))

    on_all_ranks(plan, ctx, "find the weights of the model")
    on_all_ranks(lambda: readers[0].read(destinations), ctx, "read the weights")
    # Most modules' `state_dict` returns the parameters themselves, which have been read into; some
    # return copies.
    on_all_ranks(lambda: model.load_state_dict(state), ctx, "load the weights")


def _destinations(weights: Weights, reader: Reader) -> dict[str, torch.Tensor]:
    """Return the model's tensors under the names in the files.

    Raises:
        CheckpointError: Names or shapes differ, or dtypes cannot be cast.
    """
    all_stored = reader.stored()
    # Files that were exported from a compiled model have its names.
    file_names = original_names(all_stored)
    stored = with_user_names(all_stored)
    destinations = dict(weights.tensors)
    for name, first_name in weights.ties.items():
        # the files may contain a tied tensor under another of its names
        if name in stored and first_name not in stored and first_name in destinations:
            destinations[name] = destinations.pop(first_name)
    # Everything is compared before the first weight is read.
    missing = destinations.keys() - stored.keys()
    unknown = stored.keys() - destinations.keys() - weights.ties.keys()
    misshapen: set[str] = set()
    mistyped: set[str] = set()
    for name, tensor in destinations.items():
        if name in stored and stored[name].shape != tensor.shape:
            misshapen.add(name)
        if name in stored and not torch.can_cast(stored[name].dtype, tensor.dtype):
            mistyped.add(name)
    check_none(missing, "missing in the files")
    check_none(unknown, "unknown to the model")
    check_none(misshapen, "of another shape")
    # A cast of complex numbers to real ones, or of real numbers to ints, would lose a part of each.
    check_none(mistyped, "of a dtype that cannot be cast to the model's")
    return {file_names[name]: tensor for name, tensor in destinations.items()}


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
