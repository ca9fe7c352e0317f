"""The third pass: first values of new variables, the logger, and the imports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import libcst as cst

from faccel.migration.facts import Facts
from faccel.migration.report import Report
from faccel.migration.syntax import (
    assignments,
    children_of,
    comment_lines,
    nodes_of,
    statements_of,
    text_of,
    variables_of,
    with_leading,
)
from faccel.migration.wrap_order import wrap_before_optimizers

Body = cst.SimpleStatementLine | cst.BaseCompoundStatement
_FP16 = (
    "under fp16 the loss scale starts anew at each call: pass `{scaler}` to the function and "
    "return it; see docs/training-loop.md#mixed-precision"
)


class Placement(cst.CSTTransformer):
    """Adds the statements that the new calls need.

    Args:
        facts: About the script.
        report: Counts.
        scaler_arguments: Further arguments of `init_scaler`, as code.
    """

    def __init__(self, facts: Facts, report: Report, scaler_arguments: str) -> None:
        super().__init__()
        self.facts = facts
        self.report = report
        self._init_scaler = f"faccel.init_scaler({{ctx}}{scaler_arguments})"
        # Names that the functions around the node assign or take.
        self._scopes: list[set[str]] = []
        self._has_attributes = True

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        body = cast("Sequence[Body]", updated_node.body)
        return updated_node.with_changes(body=wrap_before_optimizers(body, self.facts.ctx))

    def visit_Module(self, node: cst.Module) -> None:
        self._scopes.append(_bound_names(node))
        # Whether the script stores a context in an attribute, with the values beside it.
        self._has_attributes = not self.facts.accelerator_attributes
        for child in nodes_of(node):
            for target, _ in assignments(child):
                if isinstance(target, cst.Attribute) and target.attr.value == self.facts.ctx:
                    self._has_attributes = True

    def leave_Module(self, original_node: cst.Module, updated_node: cst.Module) -> cst.Module:
        body = wrap_before_optimizers(updated_node.body, self.facts.ctx)
        return updated_node.with_changes(body=self._place(body, is_given=False))

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        names = _bound_names(node.body)
        for param in (*node.params.params, *node.params.kwonly_params):
            names.add(param.name.value)
        self._scopes.append(names)

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        params = (*original_node.params.params, *original_node.params.kwonly_params)
        is_given = self.facts.ctx in {param.name.value for param in params}
        if isinstance(updated_node.body, cst.IndentedBlock):
            body = cast("Sequence[Body]", updated_node.body.body)
            new_body = updated_node.body.with_changes(body=self._place(body, is_given=is_given))
            updated_node = updated_node.with_changes(body=new_body)
        notes = self._unbound(original_node)
        self._scopes.pop()
        if notes:
            updated_node = cast("cst.FunctionDef", with_leading(updated_node, comment_lines(notes)))
        return updated_node

    def _unbound(self, node: cst.FunctionDef) -> list[str]:
        """Return notes for new variables that the function uses and does not have."""
        bound: set[str] = set().union(*self._scopes)
        notes: list[str] = []
        used = set(variables_of(node.body))
        names = {self.facts.ctx, self.facts.trackers}
        code = text_of(node.body)
        if "faccel.save(" in code or "faccel.load(" in code:
            for entry in (*self.facts.prepared, *self.facts.registered):
                names.add(entry.partition(".")[0])
        for name in sorted(names):
            if name in used and name not in bound:
                what = f"`{name}` must be a parameter of this function"
                notes.append(self.report.refuse(what, "docs/training-loop.md#the-context"))
        if not self._has_attributes:
            notes += self._unset_attributes(node.body)
        return notes

    def _unset_attributes(self, body: cst.CSTNode) -> list[str]:
        """Return notes for values beside a context that another class or a decorator stores."""
        notes: list[str] = []
        values = {self.facts.scaler: "faccel.init_scaler({ctx})"}
        values[self.facts.trackers] = "faccel.tracking.Trackers()"
        values[self.facts.trigger] = "False"
        for child in nodes_of(body):
            if not isinstance(child, cst.Attribute) or child.attr.value not in values:
                continue
            owner = text_of(child.value)
            value = values.pop(child.attr.value).format(ctx=f"{owner}.{self.facts.ctx}")
            what = f"`{text_of(child)} = {value}` is missing where `{owner}` is made"
            notes.append(self.report.refuse(what, "docs/training-loop.md#the-context"))
        return notes

    def _place(self, body: Sequence[Body], *, is_given: bool) -> list[Body]:
        """Return the statements of a function or module with what the new calls need."""
        facts = self.facts
        statements = self._after_creation(_seeds_after(list(body), facts.ctx))
        if is_given and self._uses_logger(statements):
            position = 1 if _is_docstring(statements[0]) else 0
            statements[position:position] = statements_of(self._logger_line(facts.ctx))
        scaler = self._init_scaler.format(ctx=facts.ctx)
        values = {facts.scaler: scaler, facts.trigger: "False"}
        if "init_trackers" in facts.members:
            values[facts.trackers] = "faccel.tracking.Trackers()"
        for name, value in values.items():
            # A closure reads the trackers of the function around it.
            if name == facts.trackers and not _binds(statements, name):
                continue
            line = statements_of(f"{name} = {value}\n")[0]
            if name == facts.scaler and is_given and self._may_be_fp16():
                note = self.report.note(_FP16.format(scaler=name))
                line = with_leading(line, comment_lines([note]))
            statements = _before_use(statements, name, line, facts.ctx)
        return statements

    def _may_be_fp16(self) -> bool:
        precision = self.facts.creation.get("mixed_precision")
        if precision is None:
            return not self.facts.is_created
        return text_of(precision.value).strip("\"'") not in ("no", "bf16", "None")

    def _uses_logger(self, statements: Sequence[Body]) -> bool:
        if not self.facts.logger_name:
            return False
        names: set[str] = set()
        for statement in statements:
            names |= set(variables_of(statement, into_functions=True))
        return bool(names & self.facts.loggers)

    def _logger_line(self, ctx: str) -> str:
        name = sorted(self.facts.loggers)[0]
        return f"{name} = faccel.get_logger({self.facts.logger_name}, {ctx})\n"

    def _after_creation(self, body: list[Body]) -> list[Body]:
        """Add what follows the creation of the context: the logger, and attributes beside it."""
        result: list[Body] = []
        for index, statement in enumerate(body):
            result.append(statement)
            is_choice = isinstance(statement, cst.If) and statement.orelse is not None
            is_creation = is_choice and _creates(statement, self.facts.ctx)
            if is_creation and self._uses_logger(body[index + 1 :]):
                result += statements_of(self._logger_line(self.facts.ctx))
            for target, _ in _line_assignments(statement):
                code = text_of(target)
                if code == self.facts.ctx and self._uses_logger(body[index + 1 :]):
                    result += statements_of(self._logger_line(code))
                if isinstance(target, cst.Attribute) and target.attr.value == self.facts.ctx:
                    result += self._attributes(text_of(target.value), code)
        return result

    def _attributes(self, owner: str, ctx: str) -> list[Body]:
        facts = self.facts
        lines = [f"{owner}.{facts.scaler} = {self._init_scaler.format(ctx=ctx)}\n"]
        if "backward" not in facts.members:
            lines = []
        if "init_trackers" in facts.members:
            lines.append(f"{owner}.{facts.trackers} = faccel.tracking.Trackers()\n")
        if "set_trigger" in facts.members:
            lines.append(f"{owner}.{facts.trigger} = False\n")
        return statements_of("".join(lines)) if lines else []


def _line_assignments(
    statement: cst.CSTNode,
) -> Iterator[tuple[cst.BaseExpression, cst.BaseExpression]]:
    if isinstance(statement, cst.SimpleStatementLine):
        for line in statement.body:
            yield from assignments(line)


def _bound_names(node: cst.CSTNode) -> set[str]:
    """Return the names that the statements of a scope assign."""
    names: set[str] = set()
    for child in children_of(node):
        if isinstance(child, cst.FunctionDef | cst.ClassDef):
            names.add(child.name.value)
            continue
        for target, _ in assignments(child):
            names.add(text_of(target))
        names |= _bound_names(child)
    return names


def _binds(statements: Sequence[Body], name: str) -> bool:
    return any(name in _bound_names(cst.Module([statement])) for statement in statements)


def _is_docstring(statement: Body) -> bool:
    if not isinstance(statement, cst.SimpleStatementLine):
        return False
    line = statement.body[0]
    return isinstance(line, cst.Expr) and isinstance(line.value, cst.SimpleString)


def _creates(statement: cst.CSTNode, ctx: str) -> bool:
    """Return whether a statement assigns the context."""
    return ctx in _bound_names(cst.Module([cast("Body", statement)]))


def _seeds_after(body: list[Body], ctx: str) -> list[Body]:
    """Move seeds after the creation of the context that they need."""
    created = [i for i, statement in enumerate(body) if ctx in _line_targets(statement)]
    if not created:
        return body
    early: list[Body] = []
    others: list[Body] = []
    for statement in body[: created[0]]:
        is_seed = "faccel.seed_everything(" in text_of(statement)
        is_line = not isinstance(statement, cst.FunctionDef | cst.ClassDef)
        (early if is_seed and is_line else others).append(statement)
    return [*others, body[created[0]], *early, *body[created[0] + 1 :]]


def _line_targets(statement: Body) -> set[str]:
    return {text_of(target) for target, _ in _line_assignments(statement)}


def _before_use(body: Sequence[Body], name: str, line: Body, ctx: str) -> list[Body]:
    """Insert a line before the first statement that uses a variable, after the context exists."""
    for index, statement in enumerate(body):
        if isinstance(statement, cst.FunctionDef | cst.ClassDef):
            continue
        if name not in variables_of(statement):
            continue
        block = getattr(statement, "body", None)
        if _creates(statement, ctx) and isinstance(block, cst.IndentedBlock):
            inner = _before_use(cast("Sequence[Body]", block.body), name, line, ctx)
            new = statement.with_changes(body=block.with_changes(body=inner))
            return [*body[:index], new, *body[index + 1 :]]
        # An assignment that does not read it is its first value.
        reads = any(name in variables_of(value) for _, value in _line_assignments(statement))
        if name in _line_targets(statement) and not reads:
            return list(body)
        return [*body[:index], line, *body[index:]]
    return list(body)
