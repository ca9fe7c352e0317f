"""What a prepared object is: a model, an optimizer, a loader or a scheduler.

A script may give its objects any name. What it does with them shows more than their names: a
loader is iterated over, and a model is called.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import attrs
import libcst as cst

from faccel.migration.facts import (
    PREPARE,
    Facts,
    arguments_of_function,
    results_of_function,
)
from faccel.migration.syntax import assignments, callee_name, text_of

# Kinds by the name of an object, and by the class or function that made it.
_BY_NAME = (
    ("loader", re.compile(r"loader|_dl$|^dl$|^dl_|dataset|_data$")),
    ("scheduler", re.compile(r"sched")),
    ("optimizer", re.compile(r"optim|^opt$|_opt$|^opt_")),
    ("model", re.compile(r"model|net$|^net|encoder|decoder|generator|discriminator")),
)
_BY_ORIGIN = (
    ("loader", re.compile(r"loader|^get_data")),
    ("scheduler", re.compile(r"sched|lr$|_warmup$|annealing|plateau")),
    ("optimizer", re.compile(r"optim|^adam|adamw|^sgd$|adafactor|rmsprop|^lion|adagrad")),
    ("model", re.compile(r"model|net$|from_pretrained|from_config|sequential|^linear$")),
)
# Members that objects of one kind have, of those that a script may prepare.
_MEMBERS = {
    "add_param_group": "optimizer",
    "batch_sampler": "loader",
    "batch_size": "loader",
    "dataset": "loader",
    "get_last_lr": "scheduler",
    "named_parameters": "model",
    "param_groups": "optimizer",
    "parameters": "model",
    "requires_grad_": "model",
    "save_pretrained": "model",
    "set_epoch": "loader",
}
# Functions whose first argument is a loader, if it is something that is prepared.
_ITERATE = ("cycle", "enumerate", "islice", "iter", "len", "next", "tqdm", "zip")


@attrs.define(eq=False)
class Uses:
    """What a script does with its objects.

    Args:
        direct: The kinds that the uses of an expression show, by its code.
        others: Other expressions that hold the same object, by code.
        methods: The methods `step` and `zero_grad` that are called, by code.
    """

    direct: dict[str, set[str]] = attrs.field(factory=dict)
    others: dict[str, set[str]] = attrs.field(factory=dict)
    methods: dict[str, set[str]] = attrs.field(factory=dict)

    def kinds_of(self, codes: Iterable[str]) -> set[str]:
        """Return the kinds that the uses of these expressions show, under any of their names."""
        stack = list(codes)
        visited: set[str] = set()
        kinds: set[str] = set()
        methods: set[str] = set()
        while stack:
            code = stack.pop()
            if code in visited:
                continue
            visited.add(code)
            kinds |= self.direct.get(code, set())
            methods |= self.methods.get(code, set())
            stack += self.others.get(code, ())
        # A model has `zero_grad`, and a scheduler has `step`; an optimizer has both.
        if methods == {"step", "zero_grad"}:
            kinds.add("optimizer")
        return kinds


def read_uses(nodes: Sequence[cst.CSTNode], facts: Facts) -> Uses:
    """Return what a script does with its objects.

    Effects: pure.
    """
    uses = Uses()
    for node in nodes:
        for target, value in assignments(node):
            _connect(text_of(target), value, uses)
        for target, value in results_of_function(node, facts):
            _connect(text_of(target), value, uses)
        if isinstance(node, cst.Attribute):
            _read_member(node, uses)
        if isinstance(node, cst.For | cst.CompFor):
            _show(node.iter, "loader", uses)
        if isinstance(node, cst.Call):
            _read_call(node, facts, uses)
    return uses


def _connect(name: str, value: cst.BaseExpression, uses: Uses) -> None:
    """Note that two expressions hold the same object."""
    if not isinstance(value, cst.Name | cst.Attribute):
        return
    uses.others.setdefault(name, set()).add(text_of(value))
    uses.others.setdefault(text_of(value), set()).add(name)


def _show(node: cst.BaseExpression, kind: str, uses: Uses) -> None:
    if not isinstance(node, cst.Call | cst.BaseNumber | cst.BaseString):
        uses.direct.setdefault(text_of(node), set()).add(kind)


def _read_member(node: cst.Attribute, uses: Uses) -> None:
    name = node.attr.value
    if name in _MEMBERS:
        _show(node.value, _MEMBERS[name], uses)
    if name in ("step", "zero_grad"):
        uses.methods.setdefault(text_of(node.value), set()).add(name)


def _read_call(node: cst.Call, facts: Facts, uses: Uses) -> None:
    for param, arg in arguments_of_function(node, facts):
        _connect(param, arg.value, uses)
    name = callee_name(node)
    if name in _ITERATE and node.args:
        last = None if name == "zip" else 1
        for arg in node.args[:last]:
            _show(arg.value, "loader", uses)
    elif name not in facts.functions and _owner(node.func) in ("", "self", "cls"):
        # `net(x)`, `self.net(x)`: functions and methods of the script are no models.
        _show(node.func, "model", uses)


def _owner(node: cst.BaseExpression) -> str:
    return text_of(node.value) if isinstance(node, cst.Attribute) else ""


def kind_of(codes: Sequence[str], facts: Facts, uses: Uses) -> str:
    """Return the kind of an object that is prepared; "" if the script does not show it.

    Effects: pure.

    Args:
        codes: The expressions that hold it: the target, and the argument of `prepare`.
        facts: About the script.
        uses: What it does with its objects.
    """
    shown = uses.kinds_of(codes)
    if len(shown) == 1:
        return shown.pop()
    # Uses that contradict each other are those of two objects with one name.
    for code in codes:
        kind = _kind_of_name(code) or _kind_of_origin(code, facts)
        if kind:
            return kind
    return ""


def _kind_of_name(code: str) -> str:
    name = code.rpartition(".")[2].lower()
    for kind, pattern in _BY_NAME:
        if pattern.search(name):
            return kind
    return ""


def _kind_of_origin(code: str, facts: Facts) -> str:
    for value in facts.assigned.get(code, ()):
        origin = callee_name(value).lower()
        # A function that returns several objects shows the kind of none of them, except for
        # `train, test = get_loaders()`.
        is_several = value in facts.unpacked and not origin.endswith("loaders")
        if origin in PREPARE or is_several:
            continue
        for kind, pattern in _BY_ORIGIN:
            if pattern.search(origin):
                return kind
    return ""


def read_parameters(node: cst.FunctionDef, facts: Facts) -> None:
    """Read what a function with an accelerator gets, by the names of its parameters.

    Effects: adds to `facts.kinds`.
    """
    names = [param.name.value for param in node.params.params]
    if not facts.accelerators.intersection(names):
        return
    for name in names:
        kind = _kind_of_name(name)
        if kind not in ("", "model"):
            facts.kinds.setdefault(name, kind)


def pass_kinds(node: cst.CSTNode, facts: Facts) -> None:
    """A prepared object has other names in functions that get it and after those that return it.

    Effects: adds to `facts.kinds`.
    """
    if isinstance(node, cst.Call):
        for param, arg in arguments_of_function(node, facts):
            _pass_kind(text_of(arg.value), param, facts.kinds)
    for target, value in assignments(node):
        _pass_kind(text_of(value), text_of(target), facts.kinds)
    for target, value in results_of_function(node, facts):
        _pass_kind(text_of(value), text_of(target), facts.kinds)


def _pass_kind(code: str, name: str, kinds: dict[str, str]) -> None:
    kind = kinds.get(code)
    if kind:
        kinds.setdefault(name, kind)
