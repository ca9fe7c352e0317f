"""The imports of the new script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import libcst as cst

from faccel.migration.facts import Facts
from faccel.migration.syntax import children_of, nodes_of, statements_of, text_of, variables_of

Body = cst.SimpleStatementLine | cst.BaseCompoundStatement
# Modules that new calls use, beside faccel.
_MODULES = ("contextlib", "gc", "logging", "torch")


def rewrite_imports(module: cst.Module, facts: Facts) -> cst.Module:
    """Import faccel, and leave out what is no longer used of accelerate.

    Effects: pure.
    """
    used, imported = _used_and_imported(module)
    remover = _Remover(facts, used)
    new = module.visit(remover)
    missing = [name for name in (*_MODULES, "faccel") if name in used - imported]
    body: list[Body] = list(new.body)
    position = remover.position
    if position is None or position > len(body):
        position = _after_imports(body)
    if missing:
        statements = statements_of("".join(f"import {name}\n" for name in missing))
        statements[0] = statements[0].with_changes(leading_lines=remover.leading_lines)
        body[position:position] = statements
    return new.with_changes(body=body)


def _used_and_imported(module: cst.Module) -> tuple[set[str], set[str]]:
    used: set[str] = set()
    imported: set[str] = set()
    for node in _outside_imports(module):
        used.update(variables_of(node, into_functions=True))
    for node in nodes_of(module):
        if isinstance(node, cst.Import):
            for alias in node.names:
                imported.add(text_of(alias.asname.name if alias.asname else alias.name))
    return used, imported


def _outside_imports(module: cst.Module) -> list[cst.CSTNode]:
    """Return the lines and heads of statements that are no imports."""
    nodes: list[cst.CSTNode] = []
    for node in nodes_of(module):
        if isinstance(node, cst.SimpleStatementLine):
            is_import = isinstance(node.body[0], cst.Import | cst.ImportFrom)
            nodes += [] if is_import else [node]
        elif isinstance(node, cst.BaseCompoundStatement):
            # Everything but the block, whose lines are counted above.
            nodes += [child for child in children_of(node) if not isinstance(child, cst.BaseSuite)]
    return nodes


def _after_imports(body: Sequence[Body]) -> int:
    position = 0
    for index, statement in enumerate(body):
        if isinstance(statement, cst.SimpleStatementLine):
            is_import = isinstance(statement.body[0], cst.Import | cst.ImportFrom)
            is_docstring = index == 0 and isinstance(statement.body[0], cst.Expr)
            if is_import or is_docstring:
                position = index + 1
    return position


class _Remover(cst.CSTTransformer):
    """Leaves out imports of accelerate that nothing uses.

    Attributes:
        position: Where the first of them was, among the statements of the module.
        leading_lines: The comments before it.
    """

    def __init__(self, facts: Facts, used: set[str]) -> None:
        super().__init__()
        self._facts = facts
        self._used = used
        self.position: int | None = None
        self.leading_lines: Sequence[cst.EmptyLine] = ()

    def visit_Module(self, node: cst.Module) -> None:
        for index, statement in enumerate(node.body):
            if self.position is None and _imports_accelerate(statement):
                self.position = index
                # A line that stays keeps its comments.
                kept = self._kept(cast("cst.SimpleStatementLine", statement))
                if not kept:
                    self.leading_lines = statement.leading_lines

    def _kept(self, statement: cst.SimpleStatementLine) -> bool:
        line = statement.body[0]
        assert isinstance(line, cst.Import | cst.ImportFrom)
        names = () if isinstance(line.names, cst.ImportStar) else line.names
        return any(self._is_used(alias) for alias in names)

    def _is_used(self, alias: cst.ImportAlias) -> bool:
        local = text_of(alias.asname.name if alias.asname else alias.name)
        return local.partition(".")[0] in self._used

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.RemovalSentinel:
        if not _imports_accelerate(original_node):
            return updated_node
        line = original_node.body[0]
        assert isinstance(line, cst.Import | cst.ImportFrom)
        if isinstance(line.names, cst.ImportStar):
            return updated_node
        names = [alias for alias in line.names if self._is_used(alias)]
        if not names:
            return cst.RemoveFromParent()
        names[-1] = names[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return updated_node.with_changes(body=[line.with_changes(names=names)])


def _imports_accelerate(statement: cst.CSTNode) -> bool:
    if not isinstance(statement, cst.SimpleStatementLine):
        return False
    line = statement.body[0]
    if isinstance(line, cst.ImportFrom):
        return line.module is not None and _root(text_of(line.module)) == "accelerate"
    if isinstance(line, cst.Import):
        return all(_root(text_of(alias.name)) == "accelerate" for alias in line.names)
    return False


def _root(name: str) -> str:
    return name.partition(".")[0]
