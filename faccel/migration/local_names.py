"""Replaces local names of an accelerator that is an attribute: `accelerator = self.accelerator`."""

from __future__ import annotations

from collections import Counter

import libcst as cst

from faccel.migration.facts import Facts
from faccel.migration.syntax import assignments, is_single, nodes_of, text_of


class LocalNameRemover(cst.CSTTransformer):
    """Writes `self.accelerator` for each local name of it.

    An accelerator has one loss scale. It is stored beside the context, as `self.scaler`; a local
    name would get another one.

    Args:
        facts: About the script.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self._facts = facts
        # The attributes that the local names of each scope stand for.
        self._scopes: list[dict[str, cst.Attribute]] = []

    def visit_Module(self, node: cst.Module) -> None:
        self._scopes.append(self._local_names(node))

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        bound = {target for target, _ in _assigned(node.body)}
        for param in (*node.params.params, *node.params.kwonly_params):
            bound.add(param.name.value)
        outer = self._scopes[-1]
        scope = {name: value for name, value in outer.items() if name not in bound}
        self._scopes.append({**scope, **self._local_names(node.body)})

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        self._scopes.pop()
        return updated_node.with_changes(name=original_node.name)

    def _local_names(self, scope: cst.CSTNode) -> dict[str, cst.Attribute]:
        values = _assigned(scope)
        counts = Counter(name for name, _ in values)
        names: dict[str, cst.Attribute] = {}
        for name, value in values:
            is_attribute = isinstance(value, cst.Attribute) and self._facts.is_accelerator(value)
            # `accelerator.state` is part of an accelerator that has a name already.
            if is_attribute and counts[name] == 1 and not self._facts.member(value):
                assert isinstance(value, cst.Attribute)
                names[name] = value
        return names

    def visit_SimpleStatementLine(self, node: cst.SimpleStatementLine) -> bool:
        return not self._is_definition(node)

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.RemovalSentinel:
        has_comment = "#" in text_of(original_node)
        if self._is_definition(original_node) and not has_comment:
            return cst.RemoveFromParent()
        return updated_node

    def _is_definition(self, node: cst.SimpleStatementLine) -> bool:
        line = node.body[0]
        if len(node.body) > 1 or not isinstance(line, cst.Assign) or not is_single(line):
            return False
        return self._scopes[-1].get(text_of(line.targets[0].target)) is line.value

    def leave_Name(self, original_node: cst.Name, updated_node: cst.Name) -> cst.BaseExpression:
        return self._scopes[-1].get(original_node.value, updated_node)

    # --- names that are no variables

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.Attribute:
        return updated_node.with_changes(attr=original_node.attr)

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
        return updated_node.with_changes(keyword=original_node.keyword)

    def leave_Param(self, original_node: cst.Param, updated_node: cst.Param) -> cst.Param:
        return updated_node.with_changes(name=original_node.name)

    def visit_Import(self, node: cst.Import) -> bool:
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        return False


def _assigned(scope: cst.CSTNode) -> list[tuple[str, cst.BaseExpression]]:
    """Return the names that a scope assigns, with their values."""
    pairs: list[tuple[str, cst.BaseExpression]] = []
    for node in nodes_of(scope, into_functions=False):
        for target, value in assignments(node):
            pairs.append((text_of(target), value))
    return pairs
