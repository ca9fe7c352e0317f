"""`Codec` stores one kind of value; `Encoder` and `Decoder` apply a table of codecs to a state.

This is the only traversal of a state. It works on JSON values (nodes) for the manifest and on named
tensors for the safetensors files. Nodes are data: decoding executes no code of the checkpoint and
imports no class that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import attrs
import torch

from faccel.checkpoint.tensor_names import (
    check_nesting,
    dotted,
    parameter_names,
    parameters_by_name,
)
from faccel.checkpoint.tensor_views import is_storable, memory_key
from faccel.checkpoint.tied_tensors import StoredTie
from faccel.context import DistContext
from faccel.errors import CheckpointError, short_text
from faccel.tree import Tree, local_tensor

Node = Any
"""A JSON value in the manifest. A dict with a key `"!"` is a value of the kind that this key names.
Any other value stands for itself: a dict with string keys, a list, a string, a bool, an int, a
finite float or None."""

Restore = Callable[[], Tree]
"""Returns the decoded value; called after the tensors of values were read. Models, optimizers and
other objects with `load_state_dict` are returned as they are: their updates come afterwards. Every
other value is new."""

K = TypeVar("K")
V = TypeVar("V")
V_contra = TypeVar("V_contra", contravariant=True)


class Encode(Protocol[V_contra]):
    """Returns the node of a value, and adds its tensors to `encoder.tensors` without a copy."""

    def __call__(self, value: V_contra, path: str, encoder: Encoder, /) -> Node: ...


class Decode(Protocol):
    """Checks a node against `target`, the value in the user's state, and plans to restore it.

    Writes nothing.

    Raises:
        CheckpointError: The node does not fit `target`.
    """

    def __call__(self, node: Node, target: Tree, path: str, decoder: Decoder, /) -> Restore: ...


@attrs.frozen
class Codec(Generic[V]):
    """How one kind of value is stored.

    Args:
        kinds: The kinds of nodes that it decodes.
        matches: Whether it encodes a value.
        encode: From a value to a node.
        decode: From a node to a value.
        is_strict: Whether a value of this kind in the state can only be loaded from a node of
            `kinds`.
        is_in_place: Whether loading updates the object in the state instead of returning a new
            value.
        decode_other: Decodes nodes of other kinds into a value of this kind; None leaves that to
            the codec of the node.
    """

    kinds: tuple[str, ...]
    matches: Callable[[object], bool]
    encode: Encode[V]
    decode: Decode
    is_strict: bool = False
    is_in_place: bool = False
    decode_other: Decode | None = None


@attrs.frozen
class StoredTensor:
    """A tensor of a checkpoint.

    Args:
        shape: Of the full tensor, however many ranks wrote it.
        dtype: As stored.
    """

    shape: torch.Size
    dtype: torch.dtype


@attrs.frozen(eq=False)
class Update:
    """A planned change of an object in the state.

    Args:
        target: The object.
        apply: Changes it.
    """

    target: object
    apply: Callable[[], object]


class Encoder:
    """Encodes a state.

    Args:
        codecs: The first one that matches a value encodes it.
        state: The full state, for the names of parameters.
        ctx: This rank; each rank stores its own random state.
        trained_only: Whether frozen parameters of models are left out.
    """

    def __init__(
        self,
        codecs: Sequence[Codec[Any]],
        state: Tree,
        ctx: DistContext,
        *,
        trained_only: bool = False,
    ) -> None:
        self.ctx = ctx
        self.trained_only = trained_only
        self.parameter_names = parameter_names(state)
        self.tensors: dict[str, torch.Tensor] = {}
        self.is_inside_stateful = False
        self.is_inside_module = False
        # Below `per_rank`, each rank stores its tensors.
        self.is_per_rank = False
        # By the path of each marked value: this rank's node, and the list for those of all ranks.
        self.per_rank: dict[str, Node] = {}
        self.per_rank_lists: dict[str, list[Node]] = {}
        self._codecs = codecs
        self._ancestors: list[Tree] = []
        # Also of tensors that another rank stores: all ranks must raise for the same state.
        self._tensor_paths: set[str] = set()

    def encode(self, value: Tree, path: str = "") -> Node:
        """Return the node of `value`; afterwards its tensors are in `tensors`."""
        check_nesting(value, path, self._ancestors)
        for codec in self._codecs:
            if codec.matches(value):
                self._ancestors.append(value)
                node = codec.encode(value, path, self)
                self._ancestors.pop()
                return node
        cls = type(value)
        raise CheckpointError(
            f"`{path}` has a type that cannot be stored without code",
            got=f"an object of type {cls.__module__}.{cls.__qualname__}",
            fix="give it `state_dict` and `load_state_dict`, store its tensors and numbers, "
            "or leave it out",
        )

    def reserve(self, path: str) -> None:
        """Reserve a name for a tensor.

        Raises:
            CheckpointError: Another tensor has the name.
        """
        if path in self._tensor_paths:
            raise CheckpointError(
                f"two tensors have the name `{path}`", got="both of them", fix="rename one of them"
            )
        self._tensor_paths.add(path)

    @contextmanager
    def inside_stateful(self) -> Generator[None]:
        """Encode the result of a `state_dict`, whose records have no target when it is loaded."""
        outer = self.is_inside_stateful
        self.is_inside_stateful = True
        try:
            yield
        finally:
            self.is_inside_stateful = outer

    @contextmanager
    def inside_module(self) -> Generator[None]:
        """Encode the entries of a module, which `load` reads into the tensors of a module."""
        outer = self.is_inside_module
        self.is_inside_module = True
        try:
            yield
        finally:
            self.is_inside_module = outer


class Decoder:
    """Decodes a state in three phases, of which only the last one changes the state.

    `decode` checks and plans. The `Restore` that it returns builds all values, which may still
    fail. Then `updates` change the objects of the state, and `module_updates` its models.

    Args:
        codecs: The table that encoded the state.
        state: The user's state, which is loaded into.
        stored: The tensors of the checkpoint by name.
        ctx: This rank.
        strict: Whether everything in the state must be in the checkpoint. Otherwise what does not
            fit is left as it is, and named in `missing`, `unexpected` and `mismatched`.
        stored_path: From the name of a tensor in the state to that in the files, which differ if
            it was renamed.
    """

    def __init__(
        self,
        codecs: Sequence[Codec[Any]],
        state: Tree,
        stored: Mapping[str, StoredTensor],
        ctx: DistContext,
        *,
        strict: bool = True,
        stored_path: Callable[[str], str] = str,
    ) -> None:
        self.ctx = ctx
        self.strict = strict
        self.missing: set[str] = set()
        self.unexpected: set[str] = set()
        self.mismatched: set[str] = set()
        # The paths that entries of models have now, by those in the files.
        self.current_names: Mapping[str, str] = {}
        self._stored_path = stored_path
        # New tensors, and those of models, which are read last: that cannot be undone.
        self.destinations: dict[str, torch.Tensor] = {}
        self.module_destinations: dict[str, torch.Tensor] = {}
        self._path_by_memory: dict[Hashable, str] = {}
        # Tensors that must be equal, because they are read into one tensor of a model.
        self.ties: list[StoredTie] = []
        self.updates: list[Update] = []
        self.module_updates: list[Update] = []
        # A rank of a pipeline has the modules of its stages, so it loads a subset of a model.
        self.is_pipeline = ctx.mesh.spec.pp > 1
        self.parameter_names = parameter_names(state)
        self.parameters = parameters_by_name(state, self.parameter_names)
        self._stored = stored
        self._codecs = codecs
        self._by_kind: dict[str, Codec[Any]] = {}
        for codec in codecs:
            self._by_kind |= dict.fromkeys(codec.kinds, codec)

    def decode(self, node: Node, target: Tree, path: str = "") -> Restore:
        """Plan to restore `node` to where the state has `target`."""
        kind = kind_of(node)
        # Only objects fix the kind: a value may have been None, a float or a list when it was
        # saved.
        required = self._codec_of(target)
        is_other = required is not None and kind not in required.kinds
        if required is not None and is_other and required.decode_other is not None:
            return required.decode_other(node, target, path, self)
        if required is not None and required.is_strict and is_other:
            raise mismatch(
                path,
                f"no {required.kinds[0]} in the checkpoint, a {type(target).__name__} in the state",
                "load the kind of value that was saved, or leave it out",
            )
        codec = self._by_kind.get(kind)
        if codec is None:  # written by a newer version
            raise mismatch(
                path, f"a value of the unknown kind `{short_text(kind)}`", "update faccel"
            )
        return codec.decode(node, target, path, self)

    def stored(self, path: str) -> StoredTensor:
        """Return the description of the tensor named `path`."""
        stored_path = self._stored_path(path)
        if stored_path not in self._stored:
            raise mismatch(path, "its tensor is in no file of the checkpoint", "save it again")
        return self._stored[stored_path]

    def has_stored(self, path: str) -> bool:
        """Return whether the files have a tensor named `path`."""
        return self._stored_path(path) in self._stored

    def read_into(self, path: str, destination: torch.Tensor) -> None:
        """Plan to read the tensor named `path` into a new tensor of its stored shape and dtype."""
        self.destinations[self._stored_path(path)] = destination

    def read_into_module(self, path: str, destination: torch.Tensor) -> None:
        """Plan to read the tensor named `path` into a tensor of a module.

        If another one is read into the same memory, as where two models have a parameter in common,
        the two must be equal.
        """
        if is_storable(destination) and local_tensor(destination).numel():
            first = self._path_by_memory.setdefault(memory_key(path, destination), path)
            if first != path:
                self.require_equal(first, path, destination.dtype)
                return
        self.module_destinations[self._stored_path(path)] = destination

    def require_equal(self, path: str, other_path: str, dtype: torch.dtype) -> None:
        """Plan to compare two tensors, of which the first one is read into a tensor of `dtype`."""
        stored_paths = (self._stored_path(path), self._stored_path(other_path))
        names = (dotted(path), dotted(other_path))
        self.ties.append(StoredTie(names, stored_paths, dtype))

    def new_tensor(self, path: str) -> torch.Tensor:
        """Return CPU memory that the tensor named `path` will be read into, in the stored dtype."""
        stored = self.stored(path)
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self.read_into(path, tensor)
        return tensor

    def has_in_place(self, target: Tree) -> bool:
        """Return whether an object that is updated in place is inside `target`."""
        codec = self._codec_of(target)
        if codec is not None and codec.is_in_place:
            return True
        children: Iterable[Tree] = ()
        if isinstance(target, Mapping):
            children = target.values()
        elif isinstance(target, (list, tuple)):
            children = target
        return any(self.has_in_place(child) for child in children)

    def _codec_of(self, target: Tree) -> Codec[Any] | None:
        for codec in self._codecs:
            if codec.matches(target):
                return codec
        return None


def restore_all(restores: Mapping[K, Restore]) -> dict[K, Tree]:
    """Return the restored values by key."""
    return {key: restore() for key, restore in restores.items()}


def kind_of(node: Node) -> str:
    """Return the kind of a node: the key of its codec in the table.

    Effects: pure.

    Examples:
        >>> kind_of({"!": "tensor"}), kind_of({"lr": 0.1}), kind_of([1, 2]), kind_of(0.1)
        ('tensor', 'dict', 'list', 'plain')
    """
    if isinstance(node, dict):
        return node.get("!", "dict")
    if isinstance(node, list):
        return "list"
    return "plain"


def mismatch(
    path: str, got: str, fix: str = "load into the state that was saved, or into a part of it"
) -> CheckpointError:
    """Return the error for a node that does not fit the value of the state at `path`."""
    return CheckpointError(
        "the checkpoint does not fit the state", got=f"`{path or 'state'}`: {got}", fix=fix
    )
