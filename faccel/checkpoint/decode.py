"""From nodes and named tensors back to a state: what has identity is written in place, every value is new."""

from __future__ import annotations

import base64
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import attrs
import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from faccel.checkpoint.encode import (
    MAPPINGS,
    OWN_RECORDS,
    Node,
    fields_of,
    is_stateful,
    item,
    join,
    optimizer_names,
    parameter_names,
    rng_of,
    rng_of_another,
    trained,
)
from faccel.context import DistContext
from faccel.errors import CheckpointError, nearest
from faccel.random.seeding import RngState
from faccel.training.model import WrappedModel
from faccel.tree import is_tensordict

Finish = Callable[[], Any]
"""Gives a value once all tensors have been read; writes what has identity."""


@attrs.frozen
class Stored:
    """What is stored under a name: a tensor of the whole `shape`, however many ranks wrote it."""

    shape: torch.Size
    dtype: torch.dtype


def _misfit(
    path: str, got: str, fix: str = "load into the state that was saved, or into a part of it"
) -> CheckpointError:
    return CheckpointError(
        "the checkpoint does not fit the state", got=f"`{path or 'state'}`: {got}", fix=fix
    )


class Decoder:
    """Plans where each tensor is to be read to, and refuses what does not fit before anything is written.

    Args:
        state: What is loaded into.
        stored: What the checkpoint holds.
        ctx: Where new tensors go, and which rank's generators are wanted.
    """

    def __init__(self, state: Any, stored: Mapping[str, Stored], ctx: DistContext) -> None:
        self.destinations: dict[str, torch.Tensor] = {}
        self._stored, self._ctx = stored, ctx
        self._is_part = ctx.mesh.spec.pp > 1  # of a pipeline: each rank has its own stages
        self._names = parameter_names(state)
        self._parameters = _parameters(state, self._names)

    def decode(self, node: Node, into: Any, path: str = "") -> Finish:
        """Return what gives the value of `node`, for the place that `into` has in the state."""
        wanted = _kind_for(into)
        if wanted is not None and (not isinstance(node, dict) or node.get("!") != wanted):
            got = f"no {wanted} in the checkpoint, a {type(into).__name__} in the state"
            raise _misfit(path, got, "load what was saved there, or leave it out")
        if not isinstance(node, (dict, list)):
            return lambda: node
        if isinstance(node, list):
            return self._items(node, into, path, list)
        kind = node.get("!")
        decode = _DECODERS.get(kind, Decoder.plain) if kind else Decoder.free_dict
        return decode(self, node, into, path)

    def free_dict(self, node: dict[str, Node], into: Any, path: str) -> Finish:
        return self._children(dict(node), into, path, dict)

    def mapping(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        keys = [self.decode(key, None)() for key in node["k"]]
        return self._children(
            dict(zip(keys, node["v"], strict=True)), into, path, MAPPINGS[node["!"]]
        )

    def _children(
        self, nodes: dict[Any, Node], into: Any, path: str, make: Callable[[dict[Any, Any]], Any]
    ) -> Finish:
        """A mapping is loaded as far as the state names its keys; where it names none, below the top, whole."""
        places: Mapping[Any, Any] = (
            into if isinstance(into, Mapping) and not is_stateful(into) else {}
        )
        for key in places:
            if key not in nodes:
                fix = f"leave it out, or {nearest(str(key), map(str, nodes))}"
                raise _misfit(join(path, key), "not in the checkpoint", fix)
        chosen = places if places or not path else nodes
        parts = {key: self.decode(nodes[key], places.get(key), join(path, key)) for key in chosen}
        return lambda: make({key: finish() for key, finish in parts.items()})

    def _items(
        self, nodes: list[Node], into: Any, path: str, make: Callable[[list[Any]], Any]
    ) -> Finish:
        places: Sequence[Any] = (
            into if isinstance(into, (list, tuple)) and fields_of(into) is None else []
        )
        if len(places) != len(nodes):
            if any(map(_has_identity_inside, places)):
                raise _misfit(
                    path, f"{len(nodes)} items in the checkpoint, {len(places)} in the state"
                )
            places = [places[0] if places else None] * len(
                nodes
            )  # values of one kind, however many there were
        pairs = enumerate(zip(nodes, places, strict=True))
        parts = [self.decode(each, place, item(path, i)) for i, (each, place) in pairs]
        return lambda: make([finish() for finish in parts])

    def plain(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        kind, v = node["!"], node.get("v")
        if kind in _SEQUENCES:
            return self._items(node["v"], into, path, _SEQUENCES[kind])
        if kind not in _TEXTS:
            raise _misfit(
                path, f"a kind of value that this version does not know: {kind}", "update faccel"
            )
        return lambda: _TEXTS[kind](v)

    def _new_tensor(self, path: str, into: Any = None) -> torch.Tensor:
        stored = self._at(path)
        if isinstance(into, torch.Tensor) and into.shape == stored.shape:
            new = torch.empty_like(into.detach(), dtype=stored.dtype)
        else:
            new = torch.empty(stored.shape, dtype=stored.dtype)
        self.destinations[path] = new
        return new

    def _at(self, path: str) -> Stored:
        if path not in self._stored:
            raise _misfit(path, "its tensor is in no file of the checkpoint", "save it again")
        return self._stored[path]

    def tensor(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        new = self._new_tensor(path, into)
        return lambda: new

    def complex(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        new = self._new_tensor(path)
        return lambda: torch.view_as_complex(new)

    def array(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        finish, dtype = self.decode(node["v"], None, path), np.dtype(node["dtype"])

        def make() -> Any:
            array = finish().numpy().astype(dtype, copy=False)
            return dtype.type(array[()]) if node["scalar"] else array

        return make

    def module(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        if not isinstance(into, (WrappedModel, nn.Module)):
            raise _misfit(
                path,
                f"a model in the checkpoint, {type(into).__name__} in the state",
                "pass the model itself",
            )
        module = into.module if isinstance(into, WrappedModel) else into
        own = dict(into.state_dict())
        needed = (
            trained(module, own) if node.get("trained_only") else own
        )  # frozen ones may stay as they are
        if not (
            needed.keys() <= node["v"].keys() and (self._is_part or node["v"].keys() <= own.keys())
        ):
            raise _misfit(
                path, _difference(set(node["v"]), set(needed)), "build the model that was saved"
            )
        parts = {
            name: self._parameter(own, node["v"][name], name, join(path, name))
            for name in own
            if name in node["v"]
        }
        versions = OrderedDict(
            (name, {"version": version}) for name, version in node.get("versions", {}).items()
        )

        def load() -> Any:
            state: Any = OrderedDict((name, finish()) for name, finish in parts.items())
            state._metadata = versions  # what modules look at that read what older ones wrote
            into.load_state_dict(state, strict=len(state) == len(own))
            return into

        return load

    def _parameter(self, own: dict[str, Any], node: Node, name: str, path: str) -> Finish:
        """Read a tensor of a model where it is."""
        mine = own[name]
        kinds = {"tensor": 0, "complex": 1}
        if not isinstance(mine, torch.Tensor) or node.get("!") not in kinds:
            return self.decode(node, mine, path)
        stored = self._at(path)
        is_complex = mine.dtype.is_complex  # stored as pairs of real numbers
        shape = stored.shape[:-1] if is_complex else stored.shape
        dtype = mine.dtype.to_real() if is_complex else mine.dtype
        if (mine.shape, dtype) != (shape, stored.dtype) or is_complex != bool(kinds[node["!"]]):
            raise _misfit(
                path,
                f"{stored.dtype} {list(stored.shape)} in the checkpoint, {mine.dtype} {list(mine.shape)} in the model",
                "build the model that was saved, in its dtype",
            )
        if any(n > 1 and not step for n, step in zip(mine.shape, mine.stride(), strict=True)):
            raise _misfit(
                path,
                "an expanded tensor, whose elements share memory",
                "register a `.clone()` of it",
            )
        if is_complex:
            return self.decode(node, mine, path)
        self.destinations[path] = mine
        return lambda: mine

    def optimizer(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        if not isinstance(into, Optimizer):
            raise _misfit(
                path, f"an optimizer in the checkpoint, {type(into).__name__} in the state"
            )
        names, v = optimizer_names(into, self._names), node["v"]
        numbers = {name: i for i, name in names.items()}
        saved = [group["params"] for group in v["param_groups"]]
        own = [[names[i] for i in group["params"]] for group in into.state_dict()["param_groups"]]
        if not self._fits(saved, own):
            differ = _difference({name for group in saved for name in group}, set(numbers))
            raise _misfit(
                path,
                differ,
                "make the optimizer from the model that is loaded too, in the same groups",
            )
        groups = self.decode(v["param_groups"], None, join(path, "param_groups"))
        rest = self.decode(v["rest"], None, join(path, "rest"))
        state = self._optimizer_state(v["state"], numbers, join(path, "state"))

        def load() -> Any:
            pairs = zip(own, groups(), strict=True) if self._is_part else _pairs(own, groups())
            packed = [_same_group(group, options, numbers) for group, options in pairs]
            into.load_state_dict({"state": state(), "param_groups": packed} | rest())
            return into

        return load

    def _fits(self, saved: list[list[str]], own: list[list[str]]) -> bool:
        if self._is_part:
            return len(saved) == len(own) and all(
                set(a) <= set(b) for a, b in zip(own, saved, strict=True)
            )
        return sorted(map(sorted, saved)) == sorted(map(sorted, own))

    def _optimizer_state(
        self, node: dict[str, Any], numbers: Mapping[str, int], path: str
    ) -> Finish:
        keys: list[Any] = (
            list(node) if "!" not in node else [self.decode(key, None)() for key in node["k"]]
        )
        nodes: list[Any] = list(node.values()) if "!" not in node else node["v"]
        parts = {
            numbers.get(key, key): self.decode(
                each, _like(self._parameters.get(key), each), join(path, key)
            )
            for key, each in zip(keys, nodes, strict=True)
            if key in numbers or not self._is_part
        }
        return lambda: {key: finish() for key, finish in parts.items()}

    def stateful(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        if not is_stateful(into):
            got = (
                f"an object with `state_dict` in the checkpoint, {type(into).__name__} in the state"
            )
            raise _misfit(path, got, "pass an object with `load_state_dict`")
        finish = self.decode(node["v"], None, path)

        def load() -> Any:
            into.load_state_dict(finish())
            return into

        return load

    def rng(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        rank = self._ctx.rank % node["ranks"]
        kinds = ["torch", "python", "numpy", "pairs"] + ["device"] * (
            node["device"] and self._ctx.device.type != "cpu"
        )
        here = join(path, f"rank-{rank:05d}")
        tensors = {name: self._new_tensor(join(here, name)) for name in kinds}

        def make() -> Any:
            state = rng_of(tensors)
            return state if self._ctx.rank == rank else rng_of_another(state, self._ctx.rank)

        return make

    def tensordict(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        from tensordict import TensorDict

        places = dict(into.items()) if is_tensordict(into) else {}
        parts = {
            key: self.decode(each, places.get(key), join(path, key))
            for key, each in node["v"].items()
        }
        return lambda: TensorDict(
            {key: finish() for key, finish in parts.items()}, batch_size=node["batch_size"]
        )

    def record(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        kind = OWN_RECORDS[node["class"]] if node.get("own") else type(into)
        places = fields_of(into) or {}
        parts = {
            name: self.decode(each, places.get(name), join(path, name))
            for name, each in node["v"].items()
        }
        if kind.__name__ == node["class"]:
            aliases = {a.name: a.alias for a in attrs.fields(kind)} if attrs.has(kind) else {}
            return lambda: kind(
                **{aliases.get(name, name): finish() for name, finish in parts.items()}
            )
        if not node.get("tuple"):
            got = f"a {node['class']} in the checkpoint, a {kind.__name__} in the state"
            raise _misfit(path, got, f"put a {node['class']} there, so that its class is known")
        return lambda: tuple(finish() for finish in parts.values())  # a named tuple is equal to it


def _like(parameter: torch.Tensor | None, node: Node) -> dict[str, Any] | None:
    """For each tensor of one parameter's optimizer state the parameter: one of its shape is laid out as it is."""
    return dict.fromkeys(node, parameter) if isinstance(node, dict) and "!" not in node else None


def _pairs(
    own: list[list[str]], groups: list[dict[str, Any]]
) -> list[tuple[list[str], dict[str, Any]]]:
    """Return each group of the state's with the options of the stored group that has the same parameters."""
    left = list(groups)
    pairs: list[tuple[list[str], dict[str, Any]]] = []
    for names in own:
        options = next(group for group in left if sorted(group["params"]) == sorted(names))
        left.remove(options)
        pairs.append((names, options))
    return pairs


def _same_group(
    names: list[str], options: dict[str, Any], numbers: Mapping[str, int]
) -> dict[str, Any]:
    """Return the options for the parameters in the order that this optimizer has them in."""
    packed = options | {"params": [numbers[name] for name in names]}
    if options.get("param_names"):
        by_name = dict(zip(options["params"], options["param_names"], strict=True))
        packed["param_names"] = [by_name[name] for name in names]
    return packed


def _parameters(state: Any, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    """Return the parameters of all models by their names in the state, as they lie on the ranks."""
    if isinstance(state, (WrappedModel, nn.Module)):
        lying: Mapping[str, Any] = state.state_dict() if isinstance(state, WrappedModel) else {}
        return {names[id(p)]: lying.get(name, p) for name, p in state.named_parameters()}
    children = (
        state.values()
        if isinstance(state, Mapping)
        else state
        if isinstance(state, (list, tuple))
        else ()
    )
    return {name: p for child in children for name, p in _parameters(child, names).items()}


def _kind_for(into: Any) -> str | None:
    """Return the only kind of node that a place can take; None for a value, which may have become any other."""
    if isinstance(into, (WrappedModel, nn.Module)):
        return "module"
    if isinstance(into, Optimizer):
        return "optimizer"
    if isinstance(into, RngState):
        return "rng"
    return "stateful" if is_stateful(into) and not is_tensordict(into) else None


def _has_identity(value: Any) -> bool:
    return isinstance(value, (WrappedModel, nn.Module, Optimizer)) or is_stateful(value)


def _has_identity_inside(value: Any) -> bool:
    if isinstance(value, Mapping) and not is_stateful(value):
        return any(map(_has_identity_inside, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_identity_inside, value))
    return _has_identity(value)


def _difference(stored: Set[str], own: Set[str]) -> str:
    def some(names: Set[str]) -> str:
        listed = sorted(names)
        return ", ".join(f"`{name}`" for name in listed[:3]) + (
            f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        )

    parts = [f"{some(stored - own)} only in the checkpoint"] * bool(stored - own)
    parts += [f"{some(own - stored)} only in the state"] * bool(own - stored)
    return ", ".join(parts) or "other groups of parameters"


_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "Size": torch.Size,
}
_TEXTS: dict[str, Callable[[Any], Any]] = {
    "float": float,
    "bytes": base64.b64decode,
    "complex number": lambda v: complex(*map(float.fromhex, v)),
    "dtype": lambda v: {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}[
        f"torch.{v}"
    ],
    "device": torch.device,
}
_DECODERS: dict[Any, Callable[[Decoder, dict[str, Any], Any, str], Finish]] = {
    "tensor": Decoder.tensor,
    "complex": Decoder.complex,
    "array": Decoder.array,
    "module": Decoder.module,
    "optimizer": Decoder.optimizer,
    "stateful": Decoder.stateful,
    "rng": Decoder.rng,
    "tensordict": Decoder.tensordict,
    "record": Decoder.record,
    **dict.fromkeys(MAPPINGS, Decoder.mapping),
}
