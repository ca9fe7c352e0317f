"""Lazy namespaces: a package lists its public names, and imports a name's module at the first use (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy(
    package: str, names: Mapping[str, Sequence[str]], submodules: Sequence[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for the `__init__.py` of a package.

    Effects: pure.

    Args:
        package: Full name of the package, its `__name__`.
        names: Public names by the full name of the module that defines them.
        submodules: Subpackages and modules that are namespaces themselves; not part of `__all__`.

    Examples:
        >>> getattr_, dir_, all_ = lazy("faccel", {"faccel.mesh": ["MeshSpec"]})
        >>> getattr_("MeshSpec").__name__, all_
        ('MeshSpec', ['MeshSpec'])
    """
    module_of = {name: module for module, members in names.items() for name in members}

    def getattr_(name: str) -> Any:
        if name in module_of:
            value = getattr(importlib.import_module(module_of[name]), name)
        elif name in submodules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module `{package}` has no attribute `{name}`")
        setattr(sys.modules[package], name, value)  # the next access does not come here
        return value

    public = sorted(module_of)
    return getattr_, lambda: sorted([*public, *submodules]), public
