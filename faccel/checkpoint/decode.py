"""From nodes and named tensors back to a state: what has identity is written in place, every value is new."""

from __future__ import annotations

import base64
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
    join,
    optimizer_names,
    parameter_names,
    rng_of,
    rng_of_another,
)
from faccel.context import DistContext
from faccel.errors import CheckpointError, nearest
from faccel.model import WrappedModel

Finish = Callable[[], Any]
"""Gives a value once all tensors have been read; writes what has identity."""


@attrs.frozen
class Stored:
    """What is stored under a name: a tensor of the whole `shape`, however many ranks wrote it."""

    shape: torch.Size
    dtype: torch.dtype


def _misfit(
    path: str, saw: str, fix: str = "load into the state that was saved, or into a part of it"
) -> CheckpointError:
    return CheckpointError("the checkpoint does not fit the state", saw=f"`{path or 'state'}`: {saw}", fix=fix)


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
        self._names = parameter_names(state)
        self._parameters = {self._names[id(p)]: p for p in _parameters(state)}

    def decode(self, node: Node, into: Any, path: str = "") -> Finish:
        """Return what gives the value of `node`, for the place that `into` has in the state."""
        if isinstance(into, Mapping) and not is_stateful(into) and isinstance(node, dict) and "!" not in node:
            return self._part(node, into, path)
        if not isinstance(node, (dict, list)):
            return lambda: node
        if isinstance(node, list):
            return self._items(node, into, path, list)
        kind = node.get("!")
        decode = _DECODERS.get(kind, Decoder.plain) if kind else Decoder.free_dict
        return decode(self, node, into, path)

    def _part(self, node: dict[str, Node], into: Mapping[Any, Any], path: str) -> Finish:
        """A dict is loaded as far as the state names its keys."""
        parts: dict[Any, Finish] = {}
        for key, each in into.items():
            if key not in node:
                raise _misfit(join(path, key), "not in the checkpoint", f"leave it out, or {nearest(str(key), node)}")
            parts[key] = self.decode(node[key], each, join(path, key))
        return lambda: {key: finish() for key, finish in parts.items()}

    def free_dict(self, node: dict[str, Node], into: Any, path: str) -> Finish:
        parts = {key: self.decode(each, None, join(path, key)) for key, each in node.items()}
        return lambda: {key: finish() for key, finish in parts.items()}

    def _items(self, nodes: list[Node], into: Any, path: str, make: Callable[[list[Any]], Any]) -> Finish:
        has_places = isinstance(into, (list, tuple)) and fields_of(into) is None
        if has_places and len(into) != len(nodes) and any(map(_has_identity, into)):
            raise _misfit(path, f"{len(nodes)} items in the checkpoint, {len(into)} in the state")
        places: Sequence[Any] = into if has_places and len(into) == len(nodes) else [None] * len(nodes)
        parts = [
            self.decode(each, place, join(path, i)) for i, (each, place) in enumerate(zip(nodes, places, strict=True))
        ]
        return lambda: make([finish() for finish in parts])

    def plain(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        kind, v = node["!"], node.get("v")
        if kind in _SEQUENCES:
            return self._items(node["v"], into, path, _SEQUENCES[kind])
        if kind not in _TEXTS:
            raise _misfit(path, f"a kind of value that this version does not know: {kind}", "update faccel")
        return lambda: _TEXTS[kind](v)

    def mapping(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        keys = [self.decode(key, None)() for key in node["k"]]
        places = into if isinstance(into, Mapping) else {}
        parts = [self.decode(each, places.get(key), join(path, key)) for key, each in zip(keys, node["v"], strict=True)]
        make = MAPPINGS[node["!"]]
        return lambda: make({key: finish() for key, finish in zip(keys, parts, strict=True)})

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
                path, f"a model in the checkpoint, {type(into).__name__} in the state", "pass the model itself"
            )
        module = into.module if isinstance(into, WrappedModel) else into
        own = dict(module.state_dict())
        if own.keys() != node["v"].keys():
            raise _misfit(path, _difference(set(node["v"]), set(own)), "build the model that was saved")
        extra = {name: self._parameter(own, node["v"][name], name, join(path, name)) for name in own}

        def load() -> Any:
            module.load_state_dict({name: finish() for name, finish in extra.items()})
            return into

        return load

    def _parameter(self, own: dict[str, Any], node: Node, name: str, path: str) -> Finish:
        """Read a tensor of a model where it is."""
        mine = own[name]
        if not isinstance(mine, torch.Tensor) or node != {"!": "tensor"}:
            return self.decode(node, mine, path)
        stored = self._at(path)
        if (mine.shape, mine.dtype) != (stored.shape, stored.dtype):
            raise _misfit(
                path,
                f"{stored.dtype} {list(stored.shape)} in the checkpoint, {mine.dtype} {list(mine.shape)} in the model",
                "build the model that was saved, in its dtype",
            )
        self.destinations[path] = mine
        return lambda: mine

    def optimizer(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        if not isinstance(into, Optimizer):
            raise _misfit(path, f"an optimizer in the checkpoint, {type(into).__name__} in the state")
        names, v = optimizer_names(into, self._names), node["v"]
        numbers = {name: i for i, name in enumerate(names)}
        saved = [frozenset(group["params"]) for group in v["param_groups"]]
        own = [[names[i] for i in group["params"]] for group in into.state_dict()["param_groups"]]
        if sorted(map(sorted, saved)) != sorted(map(sorted, own)):
            differ = _difference(frozenset[str]().union(*saved), frozenset(names))
            raise _misfit(path, differ, "make the optimizer from the model that is loaded too, in the same groups")
        groups = self.decode(v["param_groups"], None, join(path, "param_groups"))
        rest = self.decode(v["rest"], None, join(path, "rest"))
        here = join(path, "state")
        state = {
            numbers[name]: self.decode(each, _Like(self._parameters.get(name), each), join(here, name))
            for name, each in v["state"].items()
        }

        def load() -> Any:
            options = groups()
            packed = [options[saved.index(frozenset(g))] | {"params": [numbers[name] for name in g]} for g in own]
            into.load_state_dict(
                {"state": {i: finish() for i, finish in state.items()}, "param_groups": packed} | rest()
            )
            return into

        return load

    def stateful(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        if not is_stateful(into):
            saw = f"an object with `state_dict` in the checkpoint, {type(into).__name__} in the state"
            raise _misfit(path, saw, "pass an object with `load_state_dict`")
        finish = self.decode(node["v"], None, path)

        def load() -> Any:
            into.load_state_dict(finish())
            return into

        return load

    def rng(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        rank = self._ctx.rank % node["ranks"]
        kinds = ["torch", "python", "numpy", "pairs"] + ["device"] * (node["device"] and self._ctx.device.type != "cpu")
        here = join(path, f"rank-{rank:05d}")
        tensors = {name: self._new_tensor(join(here, name)) for name in kinds}

        def make() -> Any:
            state = rng_of(tensors)
            return state if self._ctx.rank == rank else rng_of_another(state, self._ctx.rank)

        return make

    def tensordict(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        from tensordict import TensorDict

        parts = {key: self.decode(each, None, join(path, key)) for key, each in node["v"].items()}
        return lambda: TensorDict({key: finish() for key, finish in parts.items()}, batch_size=node["batch_size"])

    def record(self, node: dict[str, Any], into: Any, path: str) -> Finish:
        kind = OWN_RECORDS.get(node["class"], type(into))
        places = fields_of(into) or {}
        if kind.__name__ != node["class"]:
            raise _misfit(path, f"a {node['class']} in the checkpoint, a {kind.__name__} in the state")
        parts = {name: self.decode(each, places.get(name), join(path, name)) for name, each in node["v"].items()}
        aliases = {a.name: a.alias for a in attrs.fields(kind)} if attrs.has(kind) else {}
        return lambda: kind(**{aliases.get(name, name): finish() for name, finish in parts.items()})


class _Like(dict[str, Any]):
    """For each tensor of one parameter's optimizer state the parameter: a tensor of its shape is laid out as it is."""

    def __init__(self, parameter: torch.Tensor | None, node: Node) -> None:
        super().__init__(dict.fromkeys(node, parameter))


def _parameters(state: Any) -> list[nn.Parameter]:
    if isinstance(state, (WrappedModel, nn.Module)):
        return list(state.parameters())
    children = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return [p for child in children for p in _parameters(child)]


def _has_identity(value: Any) -> bool:
    return isinstance(value, (WrappedModel, nn.Module, Optimizer)) or is_stateful(value)


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
    "dtype": lambda v: {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}[f"torch.{v}"],
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
