"""The modules of a model that a plan names: pure functions of names, classes and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from faccel.errors import ConfigError, ModelError, nearest, short_repr
from faccel.plan import Plan


def matches(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that match a pattern, possibly none. A `*` matches no dot."""
    # `fnmatch` lets `*` match dots; equal depths rule that out.
    depth = pattern.count(".")
    return [name for name in names if name.count(".") == depth and fnmatchcase(name, pattern)]


def matching(pattern: str, names: Iterable[str], kind: str) -> list[str]:
    """Return the names that match a pattern, at least one.

    Args:
        pattern: As in `matches`.
        names: The candidates.
        kind: What they are names of, such as `"module"`, for the message.

    Raises:
        ConfigError: No name matches.
    """
    candidates = list(names)
    matched = matches(pattern, candidates)
    if not candidates:
        raise ConfigError(
            f"the pattern `{pattern}` is for models with several modules",
            got=f"a model without a named {kind}",
            fix=f"remove `{pattern}` from the plan, or put the model into an `nn.Sequential`",
        )
    if not matched:
        raise ConfigError(
            f"the pattern `{pattern}` matches no {kind} of this model",
            got=short_repr(pattern),
            fix=nearest(pattern, candidates),
        )
    return matched


def units_of(module: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Return the sharding units of `module` by name, inner ones first, without the root.

    Raises:
        ConfigError: A pattern of the plan matches nothing.
        ModelError: A parameter or a module belongs to two units.
    """
    # A module that two parents hold has two names, and either can be in the plan.
    modules = dict(module.named_modules(remove_duplicate=False))
    del modules[""]  # the root is sharded last, with what no unit contains
    names = _unit_names(module, plan.units, modules)
    _check_disjoint(module, names)
    # `fully_shard` takes the parameters that no inner module has taken: inner ones come first.
    inner_first = sorted(names, key=_depth, reverse=True)
    return {name: modules[name] for name in inner_first}


def block_names(module: nn.Module, plan: Plan) -> list[str]:
    """Return the modules that are kept together, those with a tied parameter among them.

    Raises:
        ConfigError: A pattern of the plan matches nothing.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    del modules[""]
    if plan.units is None:
        return _default_names(module, modules)
    return _unit_names(module, plan.units, modules)


def _depth(name: str) -> int:
    return name.count(".")


def _unit_names(
    module: nn.Module, units: tuple[str, ...] | int | None, modules: Mapping[str, nn.Module]
) -> list[str]:
    if isinstance(units, int):
        return _names_by_size(modules, units)
    if units is None:
        return _without_tied(module, _default_names(module, modules))
    names: list[str] = []
    for unit in units:
        # A name without a dot can be a class or a child of the root; classes come first.
        matched = _names_of_class(modules, [unit]) or matching(unit, modules, "module")
        for name in matched:
            if name in names:
                raise ConfigError(
                    f"two of `units` match the module `{name}`",
                    got=", ".join(units),
                    fix=f"leave `{unit}` out, or write a pattern that matches fewer modules",
                )
        names += matched
    return names


def _names_of_class(modules: Mapping[str, nn.Module], classes: Sequence[str]) -> list[str]:
    return [name for name, unit in modules.items() if type(unit).__name__ in classes]


def _default_names(module: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules that the model never splits, or else the members of its module lists."""
    # `_no_split_modules` is the attribute of transformers' models that names their block classes.
    classes: Sequence[str] = getattr(module, "_no_split_modules", None) or ()
    return _names_of_class(modules, classes) or _members_of_lists(module)


def _members_of_lists(module: nn.Module) -> list[str]:
    """Return the members of the outermost module lists."""
    # A list of lists, as of experts in blocks, would make units of single layers: only outer ones.
    lists = {name: mod for name, mod in module.named_modules() if isinstance(mod, nn.ModuleList)}
    names: list[str] = []
    for name, module_list in lists.items():
        if any(name.startswith(f"{other}.") for other in lists):
            continue
        # the root itself may be a `ModuleList`
        prefix = f"{name}." if name else ""
        names += [prefix + key for key, _ in module_list.named_children()]
    return names


def _names_by_size(modules: Mapping[str, nn.Module], min_numel: int) -> list[str]:
    """Return the smallest modules with `min_numel` elements that no smaller unit contains."""
    names: list[str] = []
    # Bottom up: a module is a unit if what its units leave to it is large enough.
    for name in sorted(modules, key=_depth, reverse=True):
        inner: set[int] = set()
        for unit in names:
            if unit.startswith(f"{name}."):
                inner.update(map(id, modules[unit].parameters()))
        numel = 0
        for param in modules[name].parameters():
            if id(param) not in inner:
                numel += param.numel()
        if numel >= min_numel:
            names.append(name)
    return names


def _without_tied(module: nn.Module, units: Sequence[str]) -> list[str]:
    """Return the units without those that have a parameter of another one, or of the root."""
    # Such as the embeddings of BERT, whose head has their weight. A unit around them gets it.
    names = list(units)
    while True:
        tied: set[str] = set()
        for owner in _owners(module, names):
            if len(owner) > 1:
                tied.update(owner)
        remaining = [name for name in names if name not in tied]
        if len(remaining) == len(names):
            return names
        names = remaining


def _check_disjoint(module: nn.Module, units: Sequence[str]) -> None:
    """Raise if a tied parameter is in two units, or in one and the root: it would shard twice."""
    for owner in _owners(module, units):
        if len(owner) > 1:
            raise ModelError(
                "a tied parameter is in two units",
                got=", ".join(f"`{name}` in {_described(unit)}" for unit, name in owner.items()),
                fix="choose other `units`, so that all names of a tied parameter are in one unit "
                "or in the root",
            )


def _owners(module: nn.Module, units: Sequence[str]) -> list[dict[str, str]]:
    """Return the units of each parameter, and its name there; the root is the unit ""."""
    # The longest name that is a prefix is the innermost unit.
    innermost_first = sorted(units, key=len, reverse=True)
    owners: dict[int, dict[str, str]] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        unit = _unit_of(name, innermost_first)
        owners.setdefault(id(param), {}).setdefault(unit, name)
    return list(owners.values())


def _unit_of(param_name: str, innermost_first: Sequence[str]) -> str:
    for unit in innermost_first:
        if param_name == unit or param_name.startswith(f"{unit}."):
            return unit
    return ""


def _described(unit: str) -> str:
    return f"unit `{unit}`" if unit else "the root"
