"""Names of parameters and buffers as the user's module defines them, without those of compilation.

`torch.compile(module)` returns a module that holds the user's as `_orig_mod`. A file with that
name in its keys could not be read by a program that does not compile the model.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from faccel.errors import ModelError

T = TypeVar("T")

_COMPILED = re.compile(r"(^|\.)_orig_mod(?=\.|$)")


def user_name(name: str) -> str:
    """Return the name of a tensor or a module without the parts that `torch.compile` adds.

    Effects: pure.

    Examples:
        >>> user_name("_orig_mod.encoder._orig_mod.weight"), user_name("encoder._orig_mod")
        ('encoder.weight', 'encoder')
    """
    if "_orig_mod" not in name:  # almost always
        return name
    return _COMPILED.sub("", name).removeprefix(".")


def with_user_names(entries: Mapping[str, T]) -> dict[str, T]:
    """Return `entries`, whose keys are names of tensors, under the user's names.

    Effects: pure.

    Raises:
        ModelError: Two entries have one name.
    """
    renamed: dict[str, T] = {}
    for name, entry in entries.items():
        key = user_name(name)
        if key in renamed:
            raise ModelError(
                f"two tensors of the model have the name `{key}`",
                got=f"`{key}` and `{name}`",
                fix="rename the attribute `_orig_mod`, which is torch.compile's",
            )
        renamed[key] = entry
    return renamed


def original_names(names: Iterable[str]) -> dict[str, str]:
    """Return the module's own name of each tensor by the user's name.

    Effects: pure.

    Examples:
        >>> original_names(["_orig_mod.weight"])
        {'weight': '_orig_mod.weight'}
    """
    return with_user_names({name: name for name in names})


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the user's module inside the result of `torch.compile`; any other module itself.

    Effects: pure.
    """
    # A compiled module can only exist after its class was imported, which takes seconds.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None:
        return module
    while isinstance(module, dynamo.OptimizedModule):
        module = module.get_submodule("_orig_mod")
    return module
