"""Splits lines with several statements, so that each call is a line that can be replaced."""

from __future__ import annotations

import libcst as cst

from faccel.migration.facts import Facts
from faccel.migration.syntax import nodes_of, text_of

_UPDATES = ("step", "zero_grad")


class OneLineSplitter(cst.CSTTransformer):
    """Rewrites `opt.step(); opt.zero_grad()` and `if last: opt.step()` to separate lines.

    Lines that do not use the accelerator or a prepared object stay as they are.

    Args:
        facts: About the script.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self._facts = facts

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.SimpleStatementLine]:
        if len(updated_node.body) == 1 or not self._is_replaced(original_node):
            return updated_node
        lines = [_line(statement) for statement in updated_node.body]
        # Comments before and after the line stay there.
        lines[0] = lines[0].with_changes(leading_lines=updated_node.leading_lines)
        after = updated_node.trailing_whitespace
        lines[-1] = lines[-1].with_changes(trailing_whitespace=after)
        return cst.FlattenSentinel(lines)

    def leave_SimpleStatementSuite(
        self, original_node: cst.SimpleStatementSuite, updated_node: cst.SimpleStatementSuite
    ) -> cst.BaseSuite:
        if not self._is_replaced(original_node):
            return updated_node
        lines = [_line(statement) for statement in updated_node.body]
        after = updated_node.trailing_whitespace
        lines[-1] = lines[-1].with_changes(trailing_whitespace=after)
        return cst.IndentedBlock(lines)

    def _is_replaced(self, node: cst.CSTNode) -> bool:
        """Return whether a call in the line is replaced together with its line."""
        for child in nodes_of(node):
            if not isinstance(child, cst.Call) or not isinstance(child.func, cst.Attribute):
                continue
            if self._facts.member(child.func):
                return True
            owner = text_of(child.func.value)
            if child.func.attr.value in _UPDATES and owner in self._facts.kinds:
                return True
        return False


def _line(statement: cst.BaseSmallStatement) -> cst.SimpleStatementLine:
    return cst.SimpleStatementLine([statement.with_changes(semicolon=cst.MaybeSentinel.DEFAULT)])
