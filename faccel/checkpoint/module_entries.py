"""Reading the entries of a module's state into the tensors of the module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch

from faccel.checkpoint.codec import Decoder, Node, Restore, StoredTensor, kind_of, mismatch
from faccel.checkpoint.codec_tensors import TENSOR, decode_spec
from faccel.checkpoint.codec_wrappers import (
    WRAPPER,
    check_same_wrapper,
    inner_tensors,
    is_wrapper,
)
from faccel.checkpoint.tensor_names import child_name, name_difference
from faccel.checkpoint.tensor_views import stored_view
from faccel.training.module_names import user_name
from faccel.tree import Tree, is_sharded


@attrs.frozen(eq=False)
class ModuleEntries:
    """The entries of a module in a checkpoint.

    Args:
        node: The node of the module.
        saved_names: The names of the entries by the user's names.
        ties: All names of each tied tensor of the model, by each of them.
        path: The path of the module in the state.
        decoder: Plans what is read.
    """

    node: Node
    saved_names: Mapping[str, str]
    ties: Mapping[str, Sequence[str]]
    path: str
    decoder: Decoder

    def restores(self, state: Mapping[str, Tree]) -> dict[str, Restore]:
        """Plan to read the entries of `state`; leave out those that the checkpoint does not fit."""
        restores: dict[str, Restore] = {}
        # By the name that is read: one for all names of a tied tensor.
        planned: dict[str, Restore] = {}
        for name, entry in state.items():
            sources = self._sources(user_name(name), entry)
            if not sources:
                continue
            if sources[0] not in planned:
                planned[sources[0]] = self._decode(sources, entry)
            restores[name] = planned[sources[0]]
        return restores

    def _sources(self, name: str, entry: Tree) -> list[str]:
        """Return the names in the checkpoint of what an entry may be read from.

        Every copy of a tied tensor, also those of other pipeline stages, gets the same list.
        """
        sources: list[str] = []
        for tied_name in self.ties.get(name, (name,)):
            saved_name = self.saved_names.get(tied_name)
            if saved_name is None:
                continue
            # Quantized tensors consist of others, which have other names.
            is_tensor = kind_of(self.node["v"][saved_name]) in TENSOR.kinds
            if (is_tensor or tied_name == name) and not self._is_unfit(saved_name, entry):
                sources.append(saved_name)
        return sources

    def _is_unfit(self, name: str, entry: Tree) -> bool:
        """Return whether an entry does not fit and may be left out; add it to the report."""
        path, node, decoder = child_name(self.path, name), self.node["v"][name], self.decoder
        is_tensor = isinstance(entry, torch.Tensor) and kind_of(node) in TENSOR.kinds
        if decoder.strict or not is_tensor:
            return False
        spec = decode_spec(node, path, decoder)
        # A cast of complex numbers to real ones, or of real numbers to ints, would lose a part of
        # each.
        if spec.shape == entry.shape and torch.can_cast(spec.dtype, entry.dtype):
            return False
        decoder.mismatched.add(path)
        return True

    def _decode(self, names: Sequence[str], entry: Tree) -> Restore:
        """Plan to read the first of several tensors, which must be equal."""
        decoder, nodes = self.decoder, self.node["v"]
        first_path, *other_paths = [child_name(self.path, name) for name in names]
        restore = _decode_entry(nodes[names[0]], entry, first_path, decoder)
        for name, path in zip(names[1:], other_paths, strict=True):
            assert isinstance(entry, torch.Tensor)
            if decoder.strict:
                _check_tensor(entry, decode_spec(nodes[name], path, decoder), path)
            decoder.require_equal(first_path, path, entry.dtype)
        return restore


def _decode_entry(node: Node, entry: Tree, path: str, decoder: Decoder) -> Restore:
    """Plan to read an entry of a module's state into the memory that it has."""
    if not isinstance(entry, torch.Tensor):  # an extra state
        return decoder.decode(node, entry, path)
    kind = kind_of(node)
    if kind in WRAPPER.kinds or is_wrapper(entry):
        return _decode_wrapper_entry(node, entry, path, decoder)
    if kind not in TENSOR.kinds:
        raise mismatch(path, "no tensor in the checkpoint, a tensor in the model")
    spec = decode_spec(node, path, decoder)
    if not decoder.strict and spec.dtype != entry.dtype and spec.shape == entry.shape:
        return decoder.decode(node, entry, path)  # `load_state_dict` casts
    _check_tensor(entry, spec, path)
    entry = entry.detach()
    if entry.is_conj() or entry.is_neg():  # a lazy result has no memory
        return decoder.decode(node, entry, path)
    decoder.read_into_module(path, stored_view(entry))  # no second copy of the parameter
    return lambda: entry


def _decode_wrapper_entry(node: Node, entry: torch.Tensor, path: str, decoder: Decoder) -> Restore:
    """Plan to read the tensors that an entry consists of."""
    if kind_of(node) not in WRAPPER.kinds:
        got = f"an ordinary tensor in the checkpoint, a {type(entry).__name__} in the model"
        raise mismatch(path, got, "load it before you quantize the model")
    check_same_wrapper(node, entry, path)
    inner = inner_tensors(entry)
    if inner.keys() != node["v"].keys():
        raise mismatch(path, name_difference(node["v"].keys(), inner.keys()))
    for name, tensor in inner.items():
        _decode_entry(node["v"][name], tensor, child_name(path, name), decoder)
    return lambda: entry


def _check_tensor(entry: torch.Tensor, stored: StoredTensor, path: str) -> None:
    if StoredTensor(entry.shape, entry.dtype) != stored:
        raise mismatch(
            path,
            f"{stored.dtype} {list(stored.shape)} in the checkpoint, "
            f"{entry.dtype} {list(entry.shape)} in the model",
            "build the model that was saved, in its dtype",
        )
    if has_overlap(entry):
        raise mismatch(path, OVERLAP, FIX_OF_OVERLAP)


OVERLAP = "an expanded tensor, whose elements overlap in memory"
FIX_OF_OVERLAP = "register a `.clone()` of it"


def has_overlap(entry: torch.Tensor) -> bool:
    """Return whether reading into a tensor would leave the last value in several elements."""
    if is_sharded(entry):
        return False
    return any(
        size > 1 and stride == 0 for size, stride in zip(entry.shape, entry.stride(), strict=True)
    )
