"""Names in a checkpoint: of tensors, and of the parameters of optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from urllib.parse import quote, unquote

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from faccel.errors import CheckpointError, short_repr, short_text
from faccel.offloaded_tensor import OffloadedTensor
from faccel.training.model import WrappedModel
from faccel.training.module_names import user_name
from faccel.tree import Tree, local_tensor

# A state is encoded, checked and restored by recursion, with about three calls per level. Python
# allows 1000 calls, of which the program may use some.
MAX_DEPTH = 100
_SAFE_CHARACTERS = " .:,;@+=()[]-_"


def child_name(parent: str, key: object) -> str:
    """Return the name of the value under `key` of a mapping or a record.

    Effects: pure. Two different keys of one parent have different names.

    Examples:
        >>> child_name("model", "layers.0.weight"), child_name("x", "a/b"), child_name("x", 1)
        ('model/layers.0.weight', 'x/a%2Fb', 'x/#1')
    """
    if isinstance(key, np.generic):  # stored as the Python number that it equals
        key = key.item()
    prefix, text = "", key
    if not isinstance(text, str):  # `#` marks it: 1 and "1" are different keys
        prefix, text = "#", repr(key)
    try:
        name = prefix + quote(text, safe=_SAFE_CHARACTERS)
    except UnicodeEncodeError:
        raise CheckpointError(
            f"a key below `{parent or 'state'}` is no text that UTF-8 can encode",
            got=short_repr(key),
            fix="use `os.fsencode(key).hex()` as the key",
        ) from None
    if name in ("", "__metadata__"):  # safetensors reserves `__metadata__` in the header of a file
        name = f"%{name}"
    return _join(parent, name)


def dotted(path: str) -> str:
    """Return the name of an entry for users, from its path in the checkpoint.

    Effects: pure.

    Examples:
        >>> dotted("model/head.weight"), dotted("nets/#1/a%2Fb")
        ('model.head.weight', 'nets.1.a/b')
    """
    keys = [unquote(key.removeprefix("#")) for key in path.split("/")]
    return ".".join(keys)


def name_difference(stored: Set[str], expected: Set[str]) -> str:
    """Describe how the names in the checkpoint differ from those in the state.

    Effects: pure.

    Examples:
        >>> name_difference({"a", "b"}, {"b", "c"})
        '`a` only in the checkpoint, `c` only in the state'
    """
    differences: list[str] = []
    if stored - expected:
        differences.append(f"{first_names(stored - expected)} only in the checkpoint")
    if expected - stored:
        differences.append(f"{first_names(expected - stored)} only in the state")
    return ", ".join(differences)


def first_names(names: Set[str], limit: int = 3) -> str:
    """Return the first names in alphabetical order, and how many more there are.

    Effects: pure.
    """
    listed = sorted(names)
    text = ", ".join(f"`{short_text(name)}`" for name in listed[:limit])
    if len(listed) > limit:
        text += f" and {len(listed) - limit} more"
    return text


def item_name(parent: str, index: int) -> str:
    """Return the name of an item of a sequence.

    Effects: pure.
    """
    return _join(parent, str(index))


def _join(parent: str, name: str) -> str:
    return f"{parent}/{name}" if parent else name


def user_path(path: str) -> str:
    """Return the path of a parameter in the state without the names of `torch.compile`.

    Effects: pure.

    Examples:
        >>> user_path("model/_orig_mod.weight")
        'model/weight'
    """
    parent, _, name = path.rpartition("/")
    return _join(parent, user_name(name))


def named_children(state: Tree, path: str) -> Iterable[tuple[str, Tree]]:
    """Return the children of a mapping, list or tuple with their names; otherwise nothing.

    Effects: pure.
    """
    if isinstance(state, Mapping):
        return [(child_name(path, key), child) for key, child in state.items()]
    if isinstance(state, (list, tuple)):
        return [(item_name(path, index), child) for index, child in enumerate(state)]
    return ()


def check_nesting(value: Tree, path: str, ancestors: Sequence[Tree]) -> None:
    """Raise if a value is one of the values that contain it, or is nested too deeply.

    Effects: pure.

    Raises:
        CheckpointError: A traversal would not end, or `load` could not read it.
    """
    for ancestor in ancestors:
        # plain values may be one object several times, as `None` is
        if ancestor is value and isinstance(value, (Mapping, list, tuple)):
            raise CheckpointError(
                f"`{path}` contains itself",
                got=f"a {type(value).__name__} that is inside of itself",
                fix="leave it out, or store a copy of what it refers to",
            )
    if len(ancestors) > MAX_DEPTH:
        raise CheckpointError(
            f"`{short_text(path)}` is nested too deeply",
            got=f"more than {MAX_DEPTH} levels",
            fix="store it as a flat list or dict",
        )


def parameter_names(state: Tree, path: str = "", ancestors: Sequence[Tree] = ()) -> dict[int, str]:
    """Return the name of each parameter of each model in `state`, by `id(param)`.

    Effects: pure. Optimizer states are stored under these names, so that they do not depend on the
    order of parameters.

    Args:
        state: The state.
        path: Its name.
        ancestors: The values that contain it.

    Raises:
        CheckpointError: A container is inside of itself, or nested too deeply.
    """
    names: dict[int, str] = {}
    if not isinstance(state, (WrappedModel, nn.Module)):
        check_nesting(state, path, ancestors)
        for child_path, child in named_children(state, path):
            names |= parameter_names(child, child_path, (*ancestors, state))
        return names
    for name, param in state.named_parameters():
        names[id(param)] = child_name(path, user_name(name))
    if isinstance(state, WrappedModel):
        # Two pipeline stages that have a tied parameter store its state under one name.
        for key, name in state.parallelism.tied_copies(state.engine).items():
            names[key] = child_name(path, user_name(name))
    return names


def parameters_by_name(state: Tree, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
    """Return the parameters of all models in `state` by name, in the layout of this rank.

    Effects: pure.
    """
    params: dict[str, torch.Tensor] = {}
    if isinstance(state, (WrappedModel, nn.Module)):
        # An engine may flatten parameters: then the tensors of `state_dict` have the layout.
        layouts: Mapping[str, torch.Tensor] = {}
        if isinstance(state, WrappedModel):
            layouts = state.state_dict()
        for name, param in state.named_parameters():
            params[names[id(param)]] = layouts.get(name, param)
        return params
    for _, child in named_children(state, ""):
        params |= parameters_by_name(child, names)
    return params


def optimizer_parameter_names(opt: Optimizer, names: Mapping[int, str]) -> dict[int, str]:
    """Return the name of each parameter of an optimizer by its index in `opt.state_dict()`.

    Effects: pure. A parameter that no model of the state has is named by its index.

    Args:
        opt: The optimizer.
        names: The result of `parameter_names`.
    """
    by_index: dict[int, str] = {}
    seen: set[int] = set()
    start = 0
    for group in opt.param_groups:
        for index, param in enumerate(group["params"], start):
            if id(param) in seen:  # `state_dict` has a repeated parameter once
                continue
            seen.add(id(param))
            by_index[index] = names.get(id(param), str(index))
        start += len(group["params"])
    return by_index


def trainable_entries(
    model: WrappedModel | nn.Module, state: Mapping[str, Tree]
) -> dict[str, Tree]:
    """Return the entries of `state`, a model's tensors by user's names, without frozen parameters.

    Effects: pure. Parameters that require gradients, buffers and extra states stay.
    """
    entries = dict(state)
    for name, param in all_names(model):
        if not param.requires_grad:
            entries.pop(name, None)
    for name in quantization_entries(model, entries):
        del entries[name]
    return entries


def quantization_entries(
    model: WrappedModel | nn.Module, state: Mapping[str, Tree]
) -> dict[str, str]:
    """Return names of `state` that are scales of a quantized parameter, with what they belong to.

    Effects: pure. bitsandbytes adds scales to the state of a layer `fc`, neither as parameters nor
    as buffers. Of 8 bits, `fc.SCB` belongs to `fc`; of 4 bits, `fc.weight.absmax` to `fc.weight`.
    """
    quantized: set[str] = set()
    registered: set[str] = set()
    for name, param in all_names(model):
        registered.add(name)
        if _is_quantized(param):
            quantized.add(name)
    registered |= {
        user_name(name) for name, _ in module_of(model).named_buffers(remove_duplicate=False)
    }
    layers = {name.rpartition(".")[0] for name in quantized}
    entries: dict[str, str] = {}
    for name in state:
        parent, _, key = name.rpartition(".")
        if name in registered or key == "_extra_state":
            continue
        # `fc.weight.quant_state.bitsandbytes__nf4` belongs to `fc.weight`, two levels above.
        grandparent = parent.rpartition(".")[0]
        if parent in quantized or parent in layers:
            entries[name] = parent
        elif grandparent in quantized:
            entries[name] = grandparent
    return entries


def module_of(model: WrappedModel | nn.Module) -> nn.Module:
    """Return the user's module."""
    if isinstance(model, WrappedModel):
        return model.module
    return model


def all_names(model: WrappedModel | nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Yield each parameter under each name that it has in the state of the model."""
    if isinstance(model, WrappedModel):
        # In a pipeline of Megatron-core, the names of the module count the layers of one stage.
        state_io = model.parallelism.state
        if state_io is not None and state_io.named_parameters is not None:
            yield from model.named_parameters()
            return
    # `state_dict` has every name of a tied parameter.
    for name, param in module_of(model).named_parameters(remove_duplicate=False):
        yield user_name(name), param


def _is_quantized(param: torch.Tensor) -> bool:
    """Return whether a parameter is of a class of a quantization library, and frozen.

    Its layer has scales. A layer with ordinary parameters may have a state of the user's.
    """
    if param.requires_grad or isinstance(param, OffloadedTensor):
        return False
    # Under FSDP2 and tensor parallel, an ordinary parameter is a DTensor.
    return type(local_tensor(param)) not in (torch.Tensor, nn.Parameter)
