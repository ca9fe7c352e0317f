"""Which modules of a model a plan means: pure functions of names, classes and sizes; nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from faccel.errors import ConfigError, ModelError, nearest
from faccel.plan import Plan


def means(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a pattern means, of which there may be none; a `*` does not reach over a dot."""
    depth = pattern.count(".")
    return [name for name in names if name.count(".") == depth and fnmatchcase(name, pattern)]


def matching(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """Return the names that a pattern means.

    Raises:
        ConfigError: There is none.
    """
    known = list(names)
    found = means(pattern, known)
    if not found:
        raise ConfigError(
            f"the pattern `{pattern}` means no {what} of this model", fix=nearest(pattern, known)
        )
    return found


def units_of(module: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Return the sharding units of `module` by name, inner ones first; the root is not among them.

    Raises:
        ConfigError: A name in the plan means nothing.
        ModelError: A parameter or a module belongs to two units.
    """
    named = {name: each for name, each in module.named_modules(remove_duplicate=False) if name}
    chosen = _chosen(module, plan.units, named)
    _check_apart(module, chosen)
    return {name: named[name] for name in sorted(chosen, key=lambda name: -name.count("."))}


def _chosen(
    module: nn.Module, units: tuple[str, ...] | int | None, named: dict[str, nn.Module]
) -> list[str]:
    if isinstance(units, int):
        return _by_size(named, units)
    if units is None:
        own = getattr(module, "_no_split_modules", None) or ()
        classes = {type(each).__name__ for each in named.values()}
        found = [name for name, each in named.items() if type(each).__name__ in own]
        return found if classes & set(own) else _members_of_lists(module)
    found: list[str] = []
    for each in units:
        of_class = [name for name, one in named.items() if type(one).__name__ == each]
        meant = of_class or matching(each, named, "module")
        twice = [name for name in meant if name in found]
        if twice:
            fix = f"leave `{each}` out, or narrow it"
            raise ConfigError(
                f"two of `units` mean the module `{twice[0]}`", got=", ".join(units), fix=fix
            )
        found += meant
    return found


def _members_of_lists(module: nn.Module) -> list[str]:
    lists = [
        (name, each) for name, each in module.named_modules() if isinstance(each, nn.ModuleList)
    ]
    outer = [
        (name, each)
        for name, each in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    return [
        f"{name}.{key}" if name else key for name, each in outer for key, _ in each.named_children()
    ]


def _by_size(named: dict[str, nn.Module], at_least: int) -> list[str]:
    """Return the smallest modules that have enough parameters which no smaller unit has."""
    found: list[str] = []
    for name in sorted(named, key=lambda name: -name.count(".")):
        inner = {
            id(p) for unit in found if unit.startswith(f"{name}.") for p in named[unit].parameters()
        }
        if sum(p.numel() for p in named[name].parameters() if id(p) not in inner) >= at_least:
            found.append(name)
    return found


def _check_apart(module: nn.Module, units: list[str]) -> None:
    """Refuse a parameter that two units have, or a unit and the rest of the model: it would be sharded twice."""
    by_length = sorted(units, key=len, reverse=True)
    owners: dict[int, dict[str, str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        unit = next((u for u in by_length if name == u or name.startswith(f"{u}.")), "")
        owners.setdefault(id(p), {}).setdefault(unit, name)
    for owner in owners.values():
        if len(owner) > 1:
            got = ", ".join(
                f"`{name}` in {f'unit `{unit}`' if unit else 'the root'}"
                for unit, name in owner.items()
            )
            fix = "name other `units`, so that all places of a shared parameter are in one of them or in the root"
            raise ModelError("two units would share a parameter", got=got, fix=fix)
