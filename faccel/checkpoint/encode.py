"""A state as plain JSON values and named tensors, and back: nothing in it is code, so that loading executes none."""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import attrs
import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from faccel.context import DistContext
from faccel.data.order import Cursor
from faccel.errors import CheckpointError
from faccel.random.generators import Generators
from faccel.random.hashing import mix
from faccel.random.seeding import RngState
from faccel.training.model import WrappedModel
from faccel.training.precision import ScalerState
from faccel.tree import is_sharded, is_tensordict

Node = Any
"""What stands in the manifest: None, a bool, int, finite float, str, a list of nodes, a dict of them by text, or a dict
whose key `"!"` names another kind."""

OWN_RECORDS: dict[str, Any] = {"Cursor": Cursor, "ScalerState": ScalerState}
_NOT_STORED = {"ScalerState": ("stepped",)}
_SAFE = " .:,;@+=()[]-_"
_PLAIN = (type(None), bool, int, str)
MAPPINGS: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "Counter": Counter,
    "OrderedDict": OrderedDict,
    "dict": dict,
}


def join(path: str, key: object) -> str:
    """Return the name of what lies under `key`; no two keys of one parent share it."""
    text = quote(key, safe=_SAFE) if isinstance(key, str) else f"#{quote(repr(key), safe=_SAFE)}"
    if text in ("", "__metadata__"):  # the second one is what safetensors keeps its own under
        text = f"%{text}"
    return f"{path}/{text}" if path else text


def item(path: str, number: int) -> str:
    """Return the name of an item of a sequence."""
    return f"{path}/{number}" if path else str(number)


def fields_of(record: Any) -> dict[str, Any] | None:
    """Return the fields of an attrs record, dataclass or named tuple by name; None for anything else."""
    kind: Any = type(record)
    if attrs.has(kind):
        return {a.name: getattr(record, a.name) for a in attrs.fields(kind) if a.init}
    if hasattr(kind, "__dataclass_fields__"):
        return {
            name: getattr(record, name)
            for name, field in kind.__dataclass_fields__.items()
            if field.init
        }
    if isinstance(record, tuple) and hasattr(record, "_fields"):
        return record._asdict()  # type: ignore[attr-defined]
    return None


def is_stateful(value: Any) -> bool:
    """Whether `value` gives its state away and takes it back itself."""
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def parameter_names(state: Any, path: str = "") -> dict[int, str]:
    """Return the name of each parameter of each model in `state`, by identity: an optimizer's state is kept by it."""
    if isinstance(state, (WrappedModel, nn.Module)):
        names = {id(param): name for name, param in state.named_parameters()}
        if isinstance(state, WrappedModel):
            # Two pipeline stages that have a tied parameter store its state under one name.
            names |= state.parallelism.tied_copies(state.engine)
        return {key: join(path, name) for key, name in names.items()}
    if isinstance(state, Mapping):
        children: Iterator[tuple[Any, Any]] = iter(state.items())
    elif isinstance(state, (list, tuple)):
        children = iter(enumerate(state))
    else:
        return {}
    named = item if isinstance(state, (list, tuple)) else join
    return {
        i: name
        for key, child in children
        for i, name in parameter_names(child, named(path, key)).items()
    }


def optimizer_names(opt: Optimizer, names: Mapping[int, str]) -> dict[int, str]:
    """Return the name of each parameter by torch's number of it; the number itself where no model has it."""
    found: dict[int, str] = {}
    seen: set[int] = set()
    start = 0
    for group in opt.param_groups:
        for i, p in enumerate(group["params"], start):
            if id(p) not in seen:
                seen.add(id(p))
                found[i] = names.get(id(p), str(i))
        start += len(group["params"])
    return found


def trained(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a module's state is not frozen: parameters that require gradients, and buffers."""
    frozen = {
        name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad
    }
    return {name: value for name, value in state.items() if name not in frozen}


class Encoder:
    """Takes a state apart.

    Args:
        state: The whole state, for the names of parameters.
        ctx: Which rank's generators they are.
        trained_only: Whether frozen parameters of models are left out.
    """

    def __init__(self, state: Any, ctx: DistContext, *, trained_only: bool = False) -> None:
        self._trained_only = trained_only
        self.tensors: dict[str, torch.Tensor] = {}
        self._taken: set[str] = set()
        self._is_inside_object = False
        self._names = parameter_names(state)
        self._ctx = ctx

    def encode(self, value: Any, path: str = "") -> Node:
        """Return the node of `value`; its tensors are in `tensors` afterwards, as they are, not copied."""
        if isinstance(value, _PLAIN) and type(value) in _PLAIN:
            return value
        for fits, encode in _ENCODERS:
            if fits(value):
                return encode(self, value, path)
        raise CheckpointError(
            "this cannot be stored without code",
            got=f"`{path}`, a {type(value).__module__}.{type(value).__qualname__}",
            fix="give it `state_dict` and `load_state_dict`, store its tensors and numbers, or leave it out",
        )

    def float(self, value: float, path: str) -> Node:
        return value if math.isfinite(value) else {"!": "float", "v": str(value)}

    def tensor(self, value: torch.Tensor, path: str) -> Node:
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointError(
                "only dense tensors can be stored",
                got=f"`{path}`, {value.layout}",
                fix="call `.to_dense()` on it",
            )
        if path in self._taken:
            raise CheckpointError(
                "two tensors would have one name", got=f"`{path}`", fix="name one of them otherwise"
            )
        self._taken.add(path)
        value = value.detach() if is_sharded(value) else value.detach().resolve_neg()
        is_complex = value.dtype.is_complex
        if self._ctx.data_rank == 0 or is_sharded(
            value
        ):  # of replicas the first one counts, be they equal or not
            self.tensors[path] = torch.view_as_real(value.resolve_conj()) if is_complex else value
        return {"!": "complex" if is_complex else "tensor"}

    def module(self, value: Any, path: str) -> Node:
        state = value.state_dict()
        versions = {
            k: v["version"] for k, v in getattr(state, "_metadata", {}).items() if "version" in v
        }
        own = value.module if isinstance(value, WrappedModel) else value
        kept = trained(own, state) if self._trained_only else dict(state)
        part = {"trained_only": True} if len(kept) < len(state) else {}
        return {"!": "module", "v": self.encode(kept, path), "versions": versions, **part}

    def optimizer(self, value: Optimizer, path: str) -> Node:
        names, packed = optimizer_names(value, self._names), value.state_dict()
        state = {names.get(i, i): each for i, each in packed["state"].items()}
        groups = [
            group | {"params": [names[i] for i in group["params"]]}
            for group in packed["param_groups"]
        ]
        rest = {key: each for key, each in packed.items() if key not in ("state", "param_groups")}
        v = {"state": state, "param_groups": groups, "rest": rest}
        return {"!": "optimizer", "v": self.encode(v, path)}

    def stateful(self, value: Any, path: str) -> Node:
        before, self._is_inside_object = self._is_inside_object, True
        try:
            return {"!": "stateful", "v": self.encode(value.state_dict(), path)}
        finally:
            self._is_inside_object = before

    def rng(self, value: RngState, path: str) -> Node:
        here = join(path, f"rank-{self._ctx.rank:05d}")
        for name, tensor in _tensors_of(value).items():
            self.tensors[join(here, name)] = tensor
        return {"!": "rng", "ranks": self._ctx.world_size, "device": value.device is not None}

    def tensordict(self, value: Any, path: str) -> Node:
        v = {key: self.encode(value.get(key), join(path, key)) for key in value.keys()}  # noqa: SIM118
        return {"!": "tensordict", "batch_size": list(value.batch_size), "v": v}

    def mapping(self, value: Mapping[Any, Any], path: str) -> Node:
        kind = type(value).__name__ if type(value).__name__ in MAPPINGS else "dict"
        nodes = [self.encode(each, join(path, key)) for key, each in value.items()]
        if kind == "dict" and all(type(key) is str and not key.startswith("!") for key in value):
            return dict(zip(value, nodes, strict=True))
        return {"!": kind, "k": [self._key(key, path) for key in value], "v": nodes}

    def _key(self, key: Any, path: str) -> Node:
        key = key.item() if isinstance(key, np.generic) else key
        parts: list[Any] = list(key) if type(key) is tuple else [key]
        if not all(isinstance(each, (*_PLAIN, float, bytes, torch.dtype)) for each in parts):
            got = f"a {type(key).__name__} in `{path}`"
            raise CheckpointError(
                "this cannot be stored as a key", got=got, fix="use numbers, text or tuples of them"
            )
        return self.encode(key, path)

    def record(self, value: Any, path: str) -> Node:
        name = type(value).__name__
        is_own, is_tuple = OWN_RECORDS.get(name) is type(value), isinstance(value, tuple)
        if self._is_inside_object and not is_own and not is_tuple:
            raise CheckpointError(
                "inside of a `state_dict` nothing tells the class of a record when it is loaded",
                got=f"`{path}`, a {name}",
                fix="give its fields away as a dict, in that object's `state_dict`",
            )
        fields = {
            k: v
            for k, v in (fields_of(value) or {}).items()
            if not is_own or k not in _NOT_STORED.get(name, ())
        }
        v = {k: self.encode(each, join(path, k)) for k, each in fields.items()}
        return {"!": "record", "class": name, "own": is_own, "tuple": is_tuple, "v": v}

    def sequence(self, value: Any, path: str) -> Node:
        nodes = [self.encode(each, item(path, i)) for i, each in enumerate(value)]
        kinds = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "Size"}
        return nodes if isinstance(value, list) else {"!": kinds[type(value)], "v": nodes}

    def array(self, value: Any, path: str) -> Node:
        if value.dtype.kind not in "biufc":
            raise CheckpointError(
                "only arrays of numbers can be stored",
                got=f"`{path}`, {value.dtype}",
                fix="use a list",
            )
        node = self.tensor(torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape)), path)
        return {
            "!": "array",
            "v": node,
            "dtype": value.dtype.str,
            "scalar": isinstance(value, np.generic),
        }

    def text(self, value: Any, path: str) -> Node:
        if isinstance(value, bytes):
            return {"!": "bytes", "v": base64.b64encode(value).decode()}
        if isinstance(value, complex):
            return {"!": "complex number", "v": [value.real.hex(), value.imag.hex()]}
        return {
            "!": "dtype" if isinstance(value, torch.dtype) else "device",
            "v": str(value).removeprefix("torch."),
        }


_ENCODERS: tuple[tuple[Callable[[Any], bool], Callable[[Encoder, Any, str], Node]], ...] = (
    (lambda v: type(v) is float, Encoder.float),
    (lambda v: isinstance(v, torch.Tensor), Encoder.tensor),
    (lambda v: isinstance(v, (WrappedModel, nn.Module)), Encoder.module),
    (lambda v: isinstance(v, Optimizer), Encoder.optimizer),
    (lambda v: isinstance(v, RngState), Encoder.rng),
    (is_tensordict, Encoder.tensordict),
    (is_stateful, Encoder.stateful),
    (lambda v: fields_of(v) is not None, Encoder.record),
    (lambda v: isinstance(v, Mapping), Encoder.mapping),
    (lambda v: type(v) in (list, tuple, set, frozenset, torch.Size), Encoder.sequence),
    (lambda v: isinstance(v, (np.ndarray, np.generic)), Encoder.array),
    (lambda v: isinstance(v, (bytes, complex, torch.dtype, torch.device)), Encoder.text),
)


def _tensors_of(rng: RngState) -> dict[str, torch.Tensor]:
    """Return the generators as numbers."""
    version, words, pair = rng.python
    kind, keys, place, has_pair, kept = rng.numpy
    if kind != "MT19937":
        raise CheckpointError(
            "numpy's process-wide generator is not its own", got=kind, fix="set it back to MT19937"
        )
    nan = float("nan")
    tensors = {
        "torch": rng.torch,
        "python": torch.tensor([version, *words]),
        "numpy": torch.tensor([*keys.tolist(), place, has_pair]),
        "pairs": torch.tensor([nan if pair is None else pair, kept], dtype=torch.float64),
    }
    return tensors if rng.device is None else tensors | {"device": rng.device}


def rng_of(tensors: Mapping[str, torch.Tensor]) -> RngState:
    """Return the generators of numbers from `_tensors_of`."""
    version, *words = tensors["python"].tolist()
    *keys, place, has_pair = tensors["numpy"].tolist()
    pair, kept = tensors["pairs"].tolist()
    return RngState(
        tensors["torch"],
        ("MT19937", np.array(keys, dtype=np.uint32), place, has_pair, kept),
        (version, tuple(words), None if math.isnan(pair) else pair),
        tensors.get("device"),
    )


def rng_of_another(state: RngState, rank: int) -> RngState:
    """Return generators for a rank that the saved world did not have: its own, and the same on every load."""
    seed = mix(zlib.crc32(state.torch.numpy().tobytes()), rank)
    generators = Generators.seeded(seed)
    return RngState(generators.torch, generators.numpy, generators.python, None)
