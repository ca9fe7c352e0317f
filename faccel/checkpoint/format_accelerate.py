"""Folders of Accelerate's `save_state`, with DDP, with FSDP, or on one process."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import attrs

from faccel.checkpoint.dcp_folder import METADATA, read_dcp
from faccel.checkpoint.imported import (
    ImportedModule,
    ImportedObject,
    ImportedOptimizer,
    ImportedRandomStates,
    is_optimizer_state,
    scaler_of,
)
from faccel.checkpoint.imported_folder import Imported, read_safetensors, without_prefix
from faccel.checkpoint.safe_pickle import read_pickle, unreadable
from faccel.errors import CheckpointError, short_text
from faccel.random.seeding import RngState
from faccel.training.precision import ScalerState
from faccel.tree import Tree

# The files of each part of the state by number. Accelerate reads the first pattern that exists.
_FILES: Mapping[str, tuple[re.Pattern[str], ...]] = {
    "model": tuple(map(re.compile, (
        r"model(?:_(\d+))?\.safetensors", r"pytorch_model(?:_(\d+))?\.bin",
        r"pytorch_model_fsdp(?:_(\d+))?\.bin", r"pytorch_model_fsdp_(\d+)",
    ))),
    "optimizer": (re.compile(r"optimizer(?:_(\d+))?\.bin"), re.compile(r"optimizer_(\d+)")),
    "scheduler": (re.compile(r"scheduler(?:_(\d+))?\.bin"),),
    "scaler": (re.compile(r"scaler\.pt()"),),
    "rng": (re.compile(r"random_states_(\d+)\.pkl"),),
    "custom": (re.compile(r"custom_checkpoint_(\d+)\.pkl"),),
}  # fmt: skip
# `torch_cuda_manual_seed`, `torch_xpu_manual_seed`, ...
_DEVICE_SEED = re.compile(r"torch_([a-z]+)_manual_seed")
# Files of Accelerate that have no equal; none of them is opened.
_REASONS = {
    r"sampler(_\d+)?\.bin": "a pickled sampler with its dataset; faccel computes the order of the "
    "data from the seed and the epoch",
    r"dl_state_dict(_\d+)?\.bin": "a position in Accelerate's order of the data; pass `--epoch` "
    "and `--samples`",
    r".*_rank\d+\.bin": "the shards of one rank; save with `use_dcp=True`",
}


def is_accelerate(names: Collection[str]) -> bool:
    """Return whether a folder with files of these names was written by `save_state`.

    Effects: pure.

    Examples:
        >>> is_accelerate({"model.safetensors", "random_states_0.pkl"})
        True
        >>> is_accelerate({"model.safetensors", "config.json"})
        False
    """
    # Weights alone may be of any program of Hugging Face.
    kinds = {kind for _, kind, _ in _recognized(names)}
    return bool(kinds - {"model"})


def _recognized(names: Iterable[str]) -> list[tuple[str, str, int]]:
    """Return name, kind and number of each file of Accelerate, the preferred files first."""
    files: list[tuple[str, str, int]] = []
    for kind, patterns in _FILES.items():
        for pattern in patterns:
            for name in sorted(names):
                match = pattern.fullmatch(name)
                if match is not None:
                    files.append((name, kind, int(match[1] or 0)))
    return files


def _key(kind: str, number: int) -> str:
    """Return the key of a part in the state: `model`, `model_1`, `custom_0`, `rng`."""
    if kind == "rng" or (number == 0 and kind != "custom"):
        return kind
    return f"{kind}_{number}"


def read_accelerate(path: str, keys: Collection[str] | None, skip: Collection[str]) -> Imported:
    """Return the state of a folder of `save_state`.

    Effects: ambient. Reads the files of the selected keys.

    Args:
        path: The folder.
        keys: The keys of the state that are read; None reads all.
        skip: Names of files that are left out.

    Raises:
        CheckpointError: A file contains code or is corrupt, or no key is one of the folder.
    """
    names = set(os.listdir(path))
    # Every name of the folder ends in `state` or in `left_out`: nothing is lost silently.
    skipped = names & set(skip)
    left_out = dict.fromkeys(sorted(skipped), "skipped")
    files = _recognized(names - skipped)
    for name in sorted(names - skipped - {file for file, _, _ in files}):
        left_out[name] = _reason(name)
    _check_keys(files, keys)
    ranks = [name for name, kind, _ in _recognized(names) if kind == "rng"]
    folder = _Folder(path, len(ranks))
    # The generators of all ranks or of none: a rank without its file would get another's.
    has_random_states = bool(ranks) and skipped.isdisjoint(ranks)
    if not has_random_states:
        reason = "the generators of another rank were skipped"
        left_out.update(dict.fromkeys(sorted(set(ranks) - skipped), reason))
    state: dict[str, Tree] = {}
    # The preferred kind of file comes first, as in `load_state`.
    for name, kind, number in files:
        key = _key(kind, number)
        if kind == "rng" or (keys is not None and key not in keys):
            continue
        if key in state:
            left_out[name] = f"`{key}` was read from another file"
            continue
        state[key] = folder.read(name, kind, number)
    if has_random_states and (keys is None or "rng" in keys):
        state["rng"] = folder.random_states()
    if _has_no_scaler(names, keys):
        state["scaler"] = ScalerState()
    notes = _notes(state, len(ranks))
    state = without_prefix(state, notes)
    return Imported(state, left_out, tuple(notes), frozenset(skipped))


def _reason(name: str) -> str:
    for pattern, reason in _REASONS.items():
        if re.fullmatch(pattern, name):
            return reason
    return "not a file of Accelerate's `save_state`"


def _check_keys(files: Sequence[tuple[str, str, int]], keys: Collection[str] | None) -> None:
    """Raise if the folder has none of the keys of the user's state, such as `net` for `model`."""
    # A run that is not in fp16 has no file of a scaler.
    available = {"scaler", *(_key(kind, number) for _, kind, number in files)}
    if keys is None or not files or not available.isdisjoint(keys):
        return
    raise CheckpointError(
        "the folder of Accelerate has none of the keys of the state",
        got=short_text(", ".join(sorted(keys)) or "no key", 200),
        fix=f"name the keys as {', '.join(sorted(available))}, or pass their new names in "
        '`rename={"model": "net"}`',
    )


def _has_no_scaler(names: Collection[str], keys: Collection[str] | None) -> bool:
    """Return whether the run had none, as every run that is not in fp16: a fact, not a default."""
    # A file that is skipped is no evidence that there was none.
    is_selected = keys is None or "scaler" in keys
    return is_selected and "scaler.pt" not in names and bool(_recognized(names))


def _notes(state: Mapping[str, Tree], num_ranks: int) -> list[str]:
    notes: list[str] = []
    # AcceleratedScheduler.step runs the user's scheduler once per process.
    schedulers = [key for key in state if key.startswith("scheduler")]
    if schedulers and num_ranks > 1:
        notes.append(
            f"{', '.join(schedulers)}: Accelerate steps a scheduler {num_ranks} times per update "
            "on as many processes, unless `split_batches=True`; call `scheduler.step()` as often"
        )
    return notes


@attrs.frozen
class _Folder:
    """A folder of `save_state`.

    Args:
        path: The folder.
        num_ranks: The number of ranks that have stored their generators.
    """

    path: str
    num_ranks: int

    def read(self, name: str, kind: str, number: int) -> Tree:
        """Return a part of the state."""
        content = self._content(name, kind)
        if kind == "model":
            return ImportedModule(content)
        if kind == "optimizer":
            # Under FSDP the names of parameters are stored; the optimizer belongs to the model of
            # the same number.
            return ImportedOptimizer(content, _key("model", number))
        if kind == "scaler":
            return scaler_of(content)
        return ImportedObject(content)

    def _content(self, name: str, kind: str) -> Mapping[str, Any]:
        path = os.path.join(self.path, name)
        if name.endswith(".safetensors"):
            return read_safetensors(self.path, [name])
        # FSDP with sharded state dicts writes one DCP folder per model and per optimizer.
        if os.path.isdir(path):
            if not os.path.exists(os.path.join(path, METADATA)):
                raise unreadable(name, f"no `{METADATA}` in the folder")
            content = read_dcp(path).get(kind)
        else:
            content = read_pickle(path, name)
        # Other values would fail later, without the name of the file.
        is_other = kind == "optimizer" and not is_optimizer_state(content)
        if is_other or not isinstance(content, Mapping):
            raise unreadable(name, f"a {type(content).__name__}, no `state_dict` of the {kind}")
        return content

    def random_states(self) -> ImportedRandomStates:
        """Return the generators of all ranks.

        Raises:
            CheckpointError: Those of a rank are missing or invalid.
        """
        # From 0 on without a hole: the file of a rank that is missing is named by the error.
        states: list[RngState] = []
        device_type = None
        for rank in range(self.num_ranks):
            name = f"random_states_{rank}.pkl"
            fields = read_pickle(os.path.join(self.path, name), name)
            try:
                device_type, device = _device_state(fields, rank)
                states.append(_rng_state(fields, device))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise unreadable(name, f"{type(error).__name__}: {error}") from None
        return ImportedRandomStates(tuple(states), device_type)


def _device_state(fields: Mapping[str, Any], rank: int) -> tuple[str | None, Any]:
    """Return the type of the device of a rank and its generator; None on a CPU."""
    for key, devices in fields.items():
        match = _DEVICE_SEED.fullmatch(key)
        # Each process stores the generators of all devices of its node, in their order.
        if match is not None and devices:
            return match[1], devices[rank % len(devices)]
    return None, None


def _rng_state(fields: Mapping[str, Any], device: Any) -> RngState:
    # As `random.getstate` and `numpy.random.get_state` return them.
    version, words, gauss = fields["random_state"]
    kind, array, position, has_gauss, numpy_gauss = fields["numpy_random_seed"]
    return RngState(
        torch=fields["torch_manual_seed"],
        numpy=(kind, array, position, has_gauss, numpy_gauss),
        python=(version, tuple(words), gauss),
        device=device,
    )
