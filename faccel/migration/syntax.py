"""Small questions about the syntax of a script."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache

import libcst as cst

# Fields of nodes that hold layout: whitespace, commas, parentheses.
_LAYOUT = re.compile(
    r"whitespace|lpar|rpar|lines|header|footer|comma|semicolon|equal$|dot$|bracket"
)
_EMPTY = cst.Module([])
Statement = cst.SimpleStatementLine | cst.BaseCompoundStatement


def text_of(node: cst.CSTNode) -> str:
    """Return the code of a node.

    Effects: pure.
    """
    return _EMPTY.code_for_node(node)


def callee_name(node: cst.CSTNode) -> str:
    """Return the last name of what a call calls, such as `AdamW`; "" for no call.

    Effects: pure.
    """
    if not isinstance(node, cst.Call):
        return ""
    return text_of(node.func).rpartition(".")[2]


def simple_call(statement: cst.CSTNode) -> tuple[cst.BaseExpression | None, cst.Call] | None:
    """Return `(target, call)` of a line that is `call` or `target = call`; None for others.

    Effects: pure.
    """
    if not isinstance(statement, cst.SimpleStatementLine) or len(statement.body) != 1:
        return None
    line = statement.body[0]
    target: cst.BaseExpression | None = None
    if isinstance(line, cst.Assign) and len(line.targets) == 1:
        target = line.targets[0].target
    elif not isinstance(line, cst.Expr):
        return None
    if isinstance(line.value, cst.Call):
        return target, line.value
    return None


def method_call(statement: cst.CSTNode, name: str) -> tuple[str, cst.Call] | None:
    """Return `(receiver, call)` of a line that is `receiver.name(...)`, without a target.

    Effects: pure.
    """
    line = simple_call(statement)
    if line is None or line[0] is not None:
        return None
    call = line[1]
    if isinstance(call.func, cst.Attribute) and call.func.attr.value == name:
        return text_of(call.func.value), call
    return None


def arguments(call: cst.Call, params: Sequence[str]) -> dict[str, cst.Arg]:
    """Return the arguments of a call by parameter; what has no parameter has the name "*n".

    Effects: pure.
    """
    by_name: dict[str, cst.Arg] = {}
    for index, arg in enumerate(call.args):
        if arg.star:
            by_name[f"*{index}"] = arg
        elif arg.keyword is not None:
            by_name[arg.keyword.value] = arg
        elif index < len(params):
            by_name[params[index]] = arg
        else:
            by_name[f"*{index}"] = arg
    return by_name


def call_code(function: str, args: Sequence[str]) -> str:
    """Return the code of a call; one argument per line if it is long.

    Effects: pure.
    """
    code = f"{function}({', '.join(args)})"
    if len(code) <= 84 and "\n" not in code:
        return code
    return f"{function}(\n    " + ",\n    ".join(args) + ",\n)"


def statements_of(code: str) -> list[cst.SimpleStatementLine | cst.BaseCompoundStatement]:
    """Return the statements of some lines of code.

    Effects: pure.
    """
    return list(cst.parse_module(code).body)


def comment_lines(notes: Sequence[str]) -> list[cst.EmptyLine]:
    """Return notes as lines with a comment.

    Effects: pure.
    """
    lines: list[cst.EmptyLine] = []
    for note in notes:
        wrapped = textwrap.wrap(
            f"# faccel: {note}", 80, subsequent_indent="#   ", break_on_hyphens=False
        )
        lines += [cst.EmptyLine(comment=cst.Comment(line)) for line in wrapped]
    return lines


def with_leading(
    statement: Statement, lines: Sequence[cst.EmptyLine]
) -> cst.SimpleStatementLine | cst.BaseCompoundStatement:
    """Return a statement with more lines before it, after those that it has.

    Effects: pure.
    """
    before: Sequence[cst.EmptyLine] = getattr(statement, "leading_lines", ())
    return statement.with_changes(leading_lines=[*before, *lines])


def replaced(
    old: cst.SimpleStatementLine, code: str, notes: Sequence[str] = ()
) -> list[cst.SimpleStatementLine | cst.BaseCompoundStatement]:
    """Return the statements of `code` with the comments of the line that they replace.

    Effects: pure.
    """
    new = statements_of(code)
    if not new:
        # The comments of a deleted line explain what is deleted; a `pass` keeps the block valid.
        return [with_leading(line, comment_lines(notes)) for line in statements_of("pass")]
    new[0] = new[0].with_changes(leading_lines=[*old.leading_lines, *comment_lines(notes)])
    last = new[-1]
    if isinstance(last, cst.SimpleStatementLine):
        new[-1] = last.with_changes(trailing_whitespace=old.trailing_whitespace)
    return new


@cache
def _fields_of(kind: type[cst.CSTNode]) -> tuple[str, ...]:
    names = kind.__dataclass_fields__
    return tuple(name for name in names if not _LAYOUT.search(name))


def children_of(node: cst.CSTNode) -> list[cst.CSTNode]:
    """Return the nodes directly below a node, without layout.

    `CSTNode.children` builds a copy of the node, which takes ten times as long.

    Effects: pure.
    """
    children: list[cst.CSTNode] = []
    for name in _fields_of(type(node)):
        value = getattr(node, name)
        if isinstance(value, cst.CSTNode):
            children.append(value)
        elif isinstance(value, list | tuple):
            children += [item for item in value if isinstance(item, cst.CSTNode)]
    return children


def names_in(node: cst.CSTNode) -> set[str]:
    """Return all identifiers below a node, attributes included.

    Effects: pure.
    """
    names: set[str] = set()
    for child in nodes_of(node):
        if isinstance(child, cst.Name):
            names.add(child.value)
    return names


def variables_of(node: cst.CSTNode, *, into_functions: bool = False) -> Iterator[str]:
    """Yield the names of variables below a node: no attributes, no keywords of calls.

    Effects: pure.
    """
    if isinstance(node, cst.Name):
        yield node.value
    children: Sequence[cst.CSTNode] = children_of(node)
    if isinstance(node, cst.Attribute | cst.Arg):
        children = [node.value]
    for child in children:
        if into_functions or not isinstance(child, cst.FunctionDef | cst.ClassDef):
            yield from variables_of(child, into_functions=into_functions)


def nodes_of(node: cst.CSTNode, *, into_functions: bool = True) -> Iterator[cst.CSTNode]:
    """Yield a node and all nodes below it.

    Effects: pure.
    """
    stack = [node]
    while stack:
        current = stack.pop()
        yield current
        for child in reversed(children_of(current)):
            is_scope = isinstance(child, cst.FunctionDef | cst.ClassDef | cst.Lambda)
            if into_functions or not is_scope:
                stack.append(child)


def assignments(node: cst.CSTNode) -> Iterator[tuple[cst.BaseExpression, cst.BaseExpression]]:
    """Yield `(target, value)` of an assignment; each target of a tuple, with its own value.

    Effects: pure.
    """
    if isinstance(node, cst.AnnAssign | cst.NamedExpr) and node.value is not None:
        yield node.target, node.value
    # `with Accelerator() as accelerator:`
    if isinstance(node, cst.WithItem) and node.asname is not None:
        yield node.asname.name, node.item
    if isinstance(node, cst.Assign):
        for assign_target in node.targets:
            yield from _unpacked(assign_target.target, node.value)


def _unpacked(
    target: cst.BaseExpression, value: cst.BaseExpression
) -> Iterator[tuple[cst.BaseExpression, cst.BaseExpression]]:
    if not isinstance(target, cst.Tuple | cst.List):
        yield target, value
        return
    values: Sequence[cst.BaseExpression] = [value] * len(target.elements)
    if isinstance(value, cst.Tuple) and len(value.elements) == len(target.elements):
        values = elements_of(value)
    yield from zip(elements_of(target), values, strict=True)


def elements_of(node: cst.BaseExpression) -> list[cst.BaseExpression]:
    """Return the elements of a tuple or list; a list with the expression for others.

    Effects: pure.
    """
    if isinstance(node, cst.Tuple | cst.List):
        return [element.value for element in node.elements]
    return [node]


def is_single(node: cst.Assign) -> bool:
    """Return whether an assignment has one target, which is no tuple.

    Effects: pure.
    """
    return len(node.targets) == 1 and not isinstance(node.targets[0].target, cst.Tuple | cst.List)


def prepare_pairs(
    target: cst.BaseExpression, call: cst.Call
) -> list[tuple[cst.BaseExpression, cst.BaseExpression]]:
    """Return `(target, argument)` for each object that is prepared; none if they do not match.

    Effects: pure.
    """
    args: list[cst.BaseExpression] = []
    for arg in call.args:
        if arg.star:
            return []
        if arg.keyword is None:
            args.append(arg.value)
    targets = elements_of(target)
    if len(targets) != len(args):
        return []
    return list(zip(targets, args, strict=True))
