"""Checks of a module before it is wrapped or saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, cast

from torch import nn
from torch.nn.parameter import is_lazy

from faccel.context import DistContext
from faccel.errors import ModelError


def check_contains_no_model(module: nn.Module, wrapped_model: type) -> None:
    """Raise if an attribute of a module is a wrapped model, whose parameters it does not have.

    Args:
        module: The user's module.
        wrapped_model: The class of wrapped models.

    Raises:
        ModelError: It is. `nn.Module` registers modules only.
    """
    for name, submodule in module.named_modules():
        for attribute, value in vars(submodule).items():
            for item in _items(value):
                if isinstance(item, wrapped_model):
                    path = f"{name}.{attribute}" if name else attribute
                    raise ModelError(
                        f"`{path}` is a wrapped model inside a module, which does not have its "
                        "parameters",
                        got=f"a {type(submodule).__name__} with a {wrapped_model.__name__}",
                        fix=f"store the module itself as `{attribute}`, and write "
                        "`model = faccel.wrap(module, ctx)` for the outer module only",
                    )


def _items(value: object) -> Iterator[object]:
    """Yield a value, or the items of a list, tuple or dict."""
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value
    else:
        yield value


def check_is_initialized(module: nn.Module) -> None:
    """Raise if a lazy module has not seen its first input, so that shapes are unknown.

    Raises:
        ModelError: A parameter or a buffer has no shape yet.
    """
    for name, param in module.named_parameters():
        if is_lazy(param):
            raise ModelError(
                f"`{name}` of `model` has no shape yet: a lazy module gets it from its first input",
                got=f"an {type(param).__name__}",
                fix="write `with torch.no_grad(): model(batch)` before `faccel.wrap(model, ctx)`, "
                "with any batch",
            )


def check_holds_its_values(module: nn.Module, *, moves: bool) -> None:
    """Raise if Accelerate's hooks hold values of a module, as after `device_map="auto"`.

    The module has such parameters on meta, and `wrap` would give them new initial values.

    Args:
        module: The user's module.
        moves: Whether it is moved to one device, which `device_map` may have found too small.

    Raises:
        ModelError: They do, or the module is on several devices and would be moved to one.
    """
    fix = "load it without `device_map`, or with that of one device; to run a model that is larger "
    fix += "than a device write `faccel.inference.place(model, path, ctx, budget=...)`"
    has_hooks = any(hasattr(submodule, "_hf_hook") for submodule in module.modules())
    if has_hooks and has_meta(module):
        raise ModelError(
            "`model` has been offloaded by Accelerate, whose hooks hold its values",
            got=f"a {type(module).__name__} with parameters on meta",
            fix=fix,
        )
    device_map = getattr(module, "hf_device_map", {})
    devices = sorted(set(map(str, device_map.values())))
    if moves and len(devices) > 1:
        raise ModelError(
            "`model` is on several devices, and `wrap` moves a model to one",
            got=f"`hf_device_map` with {', '.join(devices)}",
            fix=f"{fix}, or `device_placement=False` to keep it where it is",
        )


def check_wrapped_once(module: nn.Module, ctx: DistContext) -> None:
    """Raise if a model of `ctx` has a trainable parameter of `module` already."""
    # Two reducers would average the same gradients, into different buckets.
    for other in ctx.lifetime.models():
        wrapped = {id(param) for param in cast("nn.Module", other).parameters()}
        for name, param in module.named_parameters():
            if id(param) in wrapped and param.requires_grad:
                raise ModelError(
                    "`model` has a parameter that another wrapped model has",
                    got=f"`{name}` of a {type(module).__name__}",
                    fix="use the `WrappedModel` you have; after a change of the module write "
                    "`model = faccel.rewrap(model, ctx)`. Put two models with a tied part into one "
                    "module",
                )


def has_meta(module: nn.Module) -> bool:
    """Return whether a parameter or buffer is on the meta device."""
    # Not `buffers()`: Megatron-core's DDP has a list of this name, and is refused later.
    buffers = dict(module.named_buffers()).values()
    return any(tensor.is_meta for tensor in (*module.parameters(), *buffers))


def method_of(module: nn.Module, method: str) -> Callable[..., Any]:
    """Return a method or a submodule by its name, such as "generate" or "blocks.0".

    Effects: pure.

    Raises:
        ModelError: The module has none of this name.
    """
    try:
        target = attrgetter(method)(module)
    except AttributeError:
        target = None
    if not callable(target):
        raise ModelError(
            f"`{method}` is not a method or submodule of the model",
            got=f"a {type(module).__name__}",
            fix="name one of its methods",
        )
    return target
