"""Lazy namespaces: the module of a public name is imported at the first use (PEP 562)."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence


def lazy(
    package: str,
    names: Mapping[str, Sequence[str]],
    submodules: Sequence[str] = (),
    hints: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for the `__init__.py` of a package.

    Effects: pure.

    Args:
        package: Full name of the package, its `__name__`.
        names: Public names by the full name of the module that defines them.
        submodules: Subpackages and modules that are namespaces themselves; not part of `__all__`.
        hints: For names of other libraries: what to use instead, for the error of an unknown name.

    Examples:
        >>> getattr_, dir_, all_ = lazy("faccel", {"faccel.mesh": ["MeshSpec"]})
        >>> getattr_("MeshSpec").__name__, all_
        ('MeshSpec', ['MeshSpec'])
    """
    module_of: dict[str, str] = {}
    for module, members in names.items():
        for member in members:
            module_of[member] = module

    def getattr_(name: str) -> object:
        if name in module_of:
            value = getattr(importlib.import_module(module_of[name]), name)
        elif name in submodules:
            value = importlib.import_module(f"{package}.{name}")
        else:
            raise _unknown_name(package, name, submodules, hints or {})
        # Stored in the package, so that Python does not call `__getattr__` for this name again.
        setattr(sys.modules[package], name, value)
        return value

    # Names that are not imported yet are listed, too: for tab completion.
    def dir_() -> list[str]:
        return sorted([*module_of, *submodules])

    return getattr_, dir_, sorted(module_of)


def _unknown_name(
    package: str, name: str, submodules: Sequence[str], hints: Mapping[str, str]
) -> AttributeError:
    """Return the error for an unknown attribute, with the nearest public name."""
    message = f"module `{package}` has no attribute `{name}`"
    # Python itself looks up `__path__` and the like, and `from package import module` looks for an
    # attribute before it imports the module: neither should import all namespaces.
    if name.startswith("_") or importlib.util.find_spec(f"{package}.{name}") is not None:
        return AttributeError(message)
    # Imports all namespaces. That is slow, but happens only for an error.
    candidates = _fixes(package, submodules, hints)
    matches = difflib.get_close_matches(name.lower(), candidates, n=1)
    if matches:
        message += f".\nTo fix: use {candidates[matches[0]]}."
    return AttributeError(message)


def _fixes(package: str, submodules: Sequence[str], hints: Mapping[str, str]) -> dict[str, str]:
    """Return what to use for each name in lower case: hints, then the names of all namespaces."""
    # In lower case, because `get_close_matches` treats `a` and `A` as different letters.
    fixes = {name.lower(): fix for name, fix in hints.items()}
    namespaces = [package, *(f"{package}.{submodule}" for submodule in submodules)]
    root = package.partition(".")[0]
    if root not in namespaces:
        namespaces.append(root)
    for namespace in namespaces:
        for name in getattr(importlib.import_module(namespace), "__all__", ()):
            # `setdefault`: a hint has precedence, then the name in the nearest namespace
            fixes.setdefault(name.lower(), f"`{namespace}.{name}`")
    return fixes
