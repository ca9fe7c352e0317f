"""Reads the facts about a script: where its accelerator goes, and what it prepares."""

from __future__ import annotations

from collections import Counter

import libcst as cst

from faccel.migration.facts import (
    PREPARE,
    Facts,
    arguments_of_function,
    makes_accelerator,
    results_of_function,
)
from faccel.migration.kinds import Uses, kind_of, pass_kinds, read_parameters, read_uses
from faccel.migration.rules import is_member
from faccel.migration.syntax import (
    arguments,
    assignments,
    callee_name,
    children_of,
    is_single,
    names_in,
    nodes_of,
    prepare_pairs,
    text_of,
    variables_of,
)


def read_facts(module: cst.Module) -> Facts:
    """Return the facts about a script.

    Effects: pure.
    """
    nodes = list(nodes_of(module))
    facts = Facts(set(variables_of(module, into_functions=True)))
    facts.attribute_names = {node.attr.value for node in nodes if isinstance(node, cst.Attribute)}
    facts.counts = Counter(node.value for node in nodes if isinstance(node, cst.Name))
    for node in nodes:
        _read_definitions(node, facts)
    # Until nothing is added: an accelerator passes through functions and attributes.
    size = -1
    while size != len(facts.accelerators) + len(facts.accelerator_attributes):
        size = len(facts.accelerators) + len(facts.accelerator_attributes)
        for node in nodes:
            _read_accelerators(node, facts)
    uses = read_uses(nodes, facts)
    for node in nodes:
        _read_uses(node, facts, uses)
    # Until nothing is added: a function may pass its parameters to one that is defined before it.
    size = -1
    while size != len(facts.kinds):
        size = len(facts.kinds)
        for node in nodes:
            pass_kinds(node, facts)
            # In a module of functions, the objects are prepared elsewhere.
            if not facts.prepared and isinstance(node, cst.FunctionDef):
                read_parameters(node, facts)
    facts.repeated = _repeated_functions(module, facts)
    _choose_names(facts)
    return facts


def _repeated_functions(module: cst.Module, facts: Facts) -> set[str]:
    """Return the functions that are called in a loop, twice, or by such a function."""
    callers: dict[str, list[str]] = {}
    for caller, function in [("", module), *facts.functions.items()]:
        for name in _calls(function, facts):
            callers.setdefault(name, []).append(caller)
    repeated = {name for name, names in callers.items() if len(names) > 1}
    size = -1
    while size != len(repeated):
        size = len(repeated)
        repeated.update(name for name, names in callers.items() if repeated.intersection(names))
    return repeated


def _calls(node: cst.CSTNode, facts: Facts, count: int = 1) -> list[str]:
    """Return the functions of the script that a scope calls; those in loops twice."""
    names: list[str] = []
    for child in children_of(node):
        if isinstance(child, cst.FunctionDef | cst.ClassDef | cst.Lambda):
            continue
        name = callee_name(child)
        if name in facts.functions:
            names += [name] * count
        in_loop = isinstance(child, cst.For | cst.While | cst.CompFor)
        names += _calls(child, facts, 2 if in_loop else count)
    return names


def _read_definitions(node: cst.CSTNode, facts: Facts) -> None:
    """Read functions, classes, imports and assigned values."""
    if isinstance(node, cst.FunctionDef):
        _read_function(node, facts)
    elif isinstance(node, cst.ClassDef):
        _read_class(node, facts)
    elif isinstance(node, cst.ImportFrom | cst.Import):
        _read_import(node, facts)
    for target, value in assignments(node):
        facts.assigned.setdefault(text_of(target), []).append(value)
        if facts.accelerate_name(getattr(value, "func", value)) == "get_logger":
            facts.loggers.add(text_of(target))
        if isinstance(node, cst.Assign) and value is node.value and not is_single(node):
            facts.unpacked.add(value)


def _read_function(node: cst.FunctionDef, facts: Facts) -> None:
    facts.functions.setdefault(node.name.value, node)
    start = starting_batch_size(node, facts)
    if start is not None:
        facts.batch_sizes[node.name.value] = start


def _read_class(node: cst.ClassDef, facts: Facts) -> None:
    for statement in node.body.body:
        # A class is called by its name, with the parameters of `__init__`.
        if isinstance(statement, cst.FunctionDef) and statement.name.value == "__init__":
            facts.functions[node.name.value] = statement


def _read_import(node: cst.ImportFrom | cst.Import, facts: Facts) -> None:
    """Read the names that come from accelerate: modules, or what is imported from them."""
    if isinstance(node.names, cst.ImportStar):
        return
    module = ""
    if isinstance(node, cst.ImportFrom) and node.module is not None:
        module = text_of(node.module)
    for alias in node.names:
        name = text_of(alias.name)
        local = name
        if alias.asname is not None:
            local = text_of(alias.asname.name)
        if module.partition(".")[0] == "accelerate":
            facts.imported[local] = name
        elif isinstance(node, cst.Import) and name.partition(".")[0] == "accelerate":
            facts.imported[local.partition(".")[0]] = "*module"
        else:
            facts.imported_elsewhere.add(local.partition(".")[0])


def starting_batch_size(node: cst.FunctionDef, facts: Facts) -> str | None:
    """Return the code of the first size of `@find_executable_batch_size(...)`, None without it.

    Effects: pure.
    """
    for decorator in node.decorators:
        call = decorator.decorator
        if not isinstance(call, cst.Call):
            continue
        if facts.accelerate_name(call.func) == "find_executable_batch_size":
            start = arguments(call, ("function", "starting_batch_size")).get("starting_batch_size")
            return "128" if start is None else text_of(start.value)
    return None


def _read_accelerators(node: cst.CSTNode, facts: Facts) -> None:
    """Read which variables, attributes and parameters hold an accelerator."""
    if isinstance(node, cst.Attribute):
        _read_member(node, facts)
    if isinstance(node, cst.Param):
        _read_annotation(node, facts)
    for target, value in assignments(node):
        if makes_accelerator(value, facts):
            _add_accelerator(target, facts)
    if isinstance(node, cst.Call):
        _read_arguments(node, facts)
    for target, value in results_of_function(node, facts):
        if facts.is_accelerator(value):
            _add_accelerator(target, facts)


def _read_arguments(node: cst.Call, facts: Facts) -> None:
    for param, arg in arguments_of_function(node, facts):
        if facts.is_accelerator(arg.value):
            facts.accelerators.add(param)


def _read_member(node: cst.Attribute, facts: Facts) -> None:
    """`accelerator.backward(...)` shows what it is, also in a file without the constructor."""
    name = node.attr.value
    owner = text_of(node.value)
    is_named = is_member(name) and owner.rpartition(".")[2] == "accelerator"
    if is_named or (facts.may_be_accelerator(node) and name != "prepare"):
        _add_accelerator(node.value, facts)


def _read_annotation(node: cst.Param, facts: Facts) -> None:
    if node.annotation is None:
        return
    names = names_in(node.annotation.annotation)
    if any(facts.imported.get(name) == "Accelerator" for name in names):
        facts.accelerators.add(node.name.value)


def _add_accelerator(target: cst.BaseExpression, facts: Facts) -> None:
    if isinstance(target, cst.Name):
        facts.accelerators.add(target.value)
    if isinstance(target, cst.Attribute):
        facts.accelerator_attributes.add(target.attr.value)


def _read_uses(node: cst.CSTNode, facts: Facts, uses: Uses) -> None:
    member = facts.member(node)
    if member:
        facts.members.add(member)
    if not isinstance(node, cst.Call):
        if isinstance(node, cst.Assign):
            _read_prepare(node, facts, uses)
        return
    if facts.accelerate_name(node.func) == "Accelerator":
        # A script may create it in two branches, with other arguments.
        params = ("device_placement", "split_batches", "mixed_precision")
        facts.creation = {**facts.creation, **arguments(node, params)}
        facts.is_created = True
    if facts.member_call(node) == "register_for_checkpointing":
        for arg in node.args:
            if not arg.star:
                facts.registered.append(text_of(arg.value))


def _read_prepare(node: cst.Assign, facts: Facts, uses: Uses) -> None:
    value = node.value
    name = facts.member_call(value)
    if name not in PREPARE or len(node.targets) != 1 or not isinstance(value, cst.Call):
        return
    for target, arg in prepare_pairs(node.targets[0].target, value):
        code = text_of(target)
        kind = PREPARE[name] or kind_of((code, text_of(arg)), facts, uses)
        facts.kinds[code] = kind
        if code not in facts.prepared:
            facts.prepared.append(code)


def _choose_names(facts: Facts) -> None:
    """Choose names for the new variables that the script does not use."""
    names = facts.names - facts.accelerators
    if facts.accelerator_attributes:
        # They become attributes, too: `self.scaler`.
        names = names | facts.attribute_names - facts.accelerator_attributes
    choices = {
        "ctx": "faccel_ctx",
        "scaler": "loss_scaler",
        "info": "step_info",
        "micro": "micro_batch",
        "record": "batch_record",
        "trackers": "faccel_trackers",
        "trigger": "is_triggered",
    }
    for name, other in choices.items():
        if name in names - facts.members:
            setattr(facts, name, other)
