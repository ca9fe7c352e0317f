"""Checks that snippets of Accelerate name what Accelerate has, without running them.

Names that are imported from accelerate, attributes of `accelerator` and of objects that a snippet
makes, and the arguments of their calls are compared with the installed package.
"""

import ast
import functools
import importlib
import inspect
import re

import attrs


@attrs.frozen
class Instance:
    """An object of a class, of which only the attributes are looked at."""

    cls: type


UNKNOWN = object()  # a value of the user, or the result of a call


@functools.cache
def _attributes_set_by(cls):
    """Return the names that the methods of a class and of its bases assign to `self`."""
    names = set(getattr(cls, "known_attributes", ()))
    for base in cls.__mro__[:-1]:
        source = inspect.getsource(base)
        names |= set(re.findall(r"self\.(\w+)(?:: [\w\[\], |.]+)? = ", source))
        names |= set(re.findall(r"^    (\w+): ", source, re.M))  # fields of dataclasses
    return names


class _Checker(ast.NodeVisitor):
    def __init__(self, accelerate):
        self.names = {"accelerator": Instance(accelerate.Accelerator)}

    def visit_ImportFrom(self, node):
        if node.module.partition(".")[0] != "accelerate":
            return
        module = importlib.import_module(node.module)
        for alias in node.names:
            self.names[alias.asname or alias.name] = getattr(module, alias.name)

    def visit_Assign(self, node):
        self.generic_visit(node)
        value = self.resolve(node.value)
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id != "accelerator":
                self.names[target.id] = value

    def visit_Attribute(self, node):
        self.generic_visit(node)
        self.resolve(node)

    def visit_Call(self, node):
        self.generic_visit(node)
        function = self.resolve(node.func)
        words = {word.arg: None for word in node.keywords}
        if function is UNKNOWN or None in words:
            return
        if any(isinstance(arg, ast.Starred) for arg in node.args):
            return
        bound = inspect.signature(function)
        parent = node.func.value if isinstance(node.func, ast.Attribute) else None
        is_method = parent is not None and isinstance(self.resolve(parent), Instance)
        bound.bind(*[None] * (len(node.args) + is_method), **words)

    def resolve(self, node):
        """Return what an expression is, as far as it belongs to Accelerate."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, UNKNOWN)
        if isinstance(node, ast.Call):
            function = self.resolve(node.func)
            return Instance(function) if inspect.isclass(function) else UNKNOWN
        if not isinstance(node, ast.Attribute):
            return UNKNOWN
        value = self.resolve(node.value)
        if value is UNKNOWN:
            return UNKNOWN
        if not isinstance(value, Instance):
            return getattr(value, node.attr)
        found = inspect.getattr_static(value.cls, node.attr, UNKNOWN)
        if inspect.isfunction(found):
            return inspect.unwrap(found) if hasattr(found, "__wrapped__") else found
        if found is UNKNOWN and node.attr not in _attributes_set_by(value.cls):
            raise AttributeError(f"{value.cls.__name__} has no attribute {node.attr}")
        return UNKNOWN


def check(source):
    """Raise if a snippet names or calls what Accelerate does not have."""
    _Checker(importlib.import_module("accelerate")).visit(ast.parse(source))


def check_command(words):
    """Raise if a command line of Accelerate has an option that its parser refuses."""
    commands = importlib.import_module("accelerate.commands")
    name, *arguments = words
    modules = {"estimate-memory": "estimate", "merge-weights": "merge", "tpu-config": "tpu"}
    module = importlib.import_module(
        f"{commands.__name__}.{modules.get(name, name).replace('-', '_')}"
    )
    makers = [x for x in vars(module) if re.fullmatch(r"\w*command_parser|get_config_parser", x)]
    if name == "config":
        module = importlib.import_module("accelerate.commands.config")
        makers = ["get_config_parser"]
    makers = [x for x in makers if inspect.isfunction(getattr(module, x))]
    assert len(makers) == 1, makers
    getattr(module, makers[0])().parse_args(arguments)
