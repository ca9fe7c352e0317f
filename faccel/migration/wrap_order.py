"""Wraps models before their optimizers are built, where that changes nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import libcst as cst

from faccel.migration.syntax import children_of, simple_call, text_of, with_leading

Body = cst.SimpleStatementLine | cst.BaseCompoundStatement
# A wrapped model has the parameters of its module, in the same order.
_SAME_RESULT = ("parameters", "named_parameters")


def wrap_before_optimizers(body: Sequence[Body], ctx: str) -> list[Body]:
    """Move `model = faccel.wrap(model, ctx)` above the lines that read its parameters.

    Sharding replaces parameters, so an optimizer that was built before has the old ones.
    Accelerate exchanges them in the optimizer; here it is built after `wrap`.

    Effects: pure.

    Args:
        body: The statements of a block.
        ctx: Name of the context, which has to exist at the new place.
    """
    statements = list(body)
    for index in range(len(statements)):
        model = _wrapped_model(statements[index])
        start = _first_line_with_parameters(statements, index, model, ctx)
        if start == index:
            continue
        wrap = statements.pop(index)
        comments: Sequence[cst.EmptyLine] = getattr(wrap, "leading_lines", ())
        # The comments describe all that is prepared, and most of it stays.
        following = statements[index] if index < len(statements) else None
        if following is not None:
            others = list(getattr(following, "leading_lines", ()))
            bare = following.with_changes(leading_lines=[])
            statements[index] = with_leading(bare, [*comments, *others])
        first = statements[start]
        before: Sequence[cst.EmptyLine] = getattr(first, "leading_lines", ())
        statements[start] = first.with_changes(leading_lines=[])
        statements.insert(start, wrap.with_changes(leading_lines=before))
    return statements


def _wrapped_model(statement: Body) -> str:
    """Return the model of a line `model = faccel.wrap(model, ...)`, "" for others."""
    line = simple_call(statement)
    if line is None or line[0] is None or text_of(line[1].func) != "faccel.wrap":
        return ""
    name = text_of(line[0])
    return name if text_of(line[1].args[0].value) == name else ""


def _first_line_with_parameters(
    statements: Sequence[Body], index: int, model: str, ctx: str
) -> int:
    """Return the first line before `index` from which on the model is not used otherwise."""
    start = index
    position = index - 1
    while model and position >= 0:
        statement = statements[position]
        if not isinstance(statement, cst.SimpleStatementLine) or _assigns(statement, model, ctx):
            break
        uses = _uses(statement, model)
        if uses and not set(uses) <= set(_SAME_RESULT):
            break
        if uses:
            start = position
        position -= 1
    return start


def _assigns(statement: cst.SimpleStatementLine, model: str, ctx: str) -> bool:
    line = statement.body[0]
    if not isinstance(line, cst.Assign):
        return False
    targets = {text_of(target.target) for target in line.targets}
    return bool(targets & {model, ctx})


def _uses(node: cst.CSTNode, model: str) -> list[str]:
    """Return the attribute of each use of a model; "" where the model itself is used."""
    if isinstance(node, cst.Attribute) and text_of(node.value) == model:
        return [node.attr.value]
    if isinstance(node, cst.Name | cst.Attribute) and text_of(node) == model:
        return [""]
    uses: list[str] = []
    for child in children_of(node):
        uses += _uses(child, model)
    return uses
