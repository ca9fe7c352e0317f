"""The second pass: all other uses of an accelerator and of functions of accelerate."""

from __future__ import annotations

from collections.abc import Callable

import libcst as cst

from faccel.migration.creation import Creation
from faccel.migration.facts import CONSTRUCTORS, Facts, makes_accelerator
from faccel.migration.lines import LineRewriter
from faccel.migration.report import Report
from faccel.migration.rules import (
    ATTRIBUTES,
    DISTRIBUTED_TYPES,
    DOCS,
    FUNCTIONS,
    METHODS,
    NAMES_WITHOUT_EQUAL,
    WITHOUT_EQUAL,
    CallRule,
)
from faccel.migration.state import StateRewriter
from faccel.migration.syntax import (
    Statement,
    arguments,
    assignments,
    call_code,
    comment_lines,
    nodes_of,
    replaced,
    simple_call,
    text_of,
    with_leading,
)

_NO_COMMA = cst.MaybeSentinel.DEFAULT
# Records of arguments: `creation` reads those that the constructor gets.
# Functions such as `is_xpu_available` read no state of a process.
_STATELESS = ("Kwargs", "Plugin", "Configuration", "Type", "_available")
_LEVELS = ("debug", "info", "warning", "warn", "error", "exception", "critical", "log")


class MemberRewriter(cst.CSTTransformer):
    """Rewrites what the loops have left.

    Args:
        facts: About the script.
        report: Counts.
    """

    def __init__(self, facts: Facts, report: Report) -> None:
        super().__init__()
        self.facts = facts
        self.report = report
        self.creation = Creation(facts, report)
        self.state = StateRewriter(facts, report, self.creation)
        self.lines = LineRewriter(facts, report, self.state, self.creation)
        # Functions of calls and attributes of attributes: their parents replace them.
        self._inner: set[cst.CSTNode] = set()
        # Calls that are replaced with the line or the condition that they are in.
        self._in_lines: set[cst.CSTNode] = set()
        # Whether each function around the node has a context, and whether it is a method.
        self._has_context: list[bool] = []
        self._methods: list[bool] = []
        self._is_module_scope = False

    # --- statements: notes become comments before them

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            self.report.enter()
        return super().on_visit(node)

    def on_leave(  # type: ignore[override]
        self, original_node: cst.CSTNode, updated_node: cst.CSTNode
    ) -> object:
        result = super().on_leave(original_node, updated_node)  # type: ignore[type-var]
        if not isinstance(original_node, cst.SimpleStatementLine | cst.BaseCompoundStatement):
            return result
        comments = comment_lines(self.report.leave())
        # A script that is rewritten again has its notes already.
        before = {text_of(line).strip() for line in getattr(original_node, "leading_lines", ())}
        if all(text_of(line).strip() in before for line in comments):
            return result
        if isinstance(result, cst.RemovalSentinel):
            # A note needs a line that it belongs to.
            return with_leading(cst.SimpleStatementLine([cst.Pass()]), comments)
        if isinstance(result, cst.FlattenSentinel):
            statements: list[Statement] = list(result.nodes)  # type: ignore[arg-type]
            return cst.FlattenSentinel([with_leading(statements[0], comments), *statements[1:]])
        assert isinstance(result, cst.SimpleStatementLine | cst.BaseCompoundStatement)
        return with_leading(result, comments)

    def visit_SimpleStatementLine(self, node: cst.SimpleStatementLine) -> None:
        line = simple_call(node)
        if line is not None and self.lines.takes(line):
            self._in_lines.add(line[1])

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.BaseStatement | cst.FlattenSentinel[cst.BaseStatement] | cst.RemovalSentinel:
        code = self.lines.rewrite(original_node, updated_node, self._context())
        if code is None:
            return updated_node
        if code == "":
            return cst.RemoveFromParent()
        return cst.FlattenSentinel(replaced(updated_node, code))

    def visit_AssignTarget(self, node: cst.AssignTarget) -> None:
        self._inner.add(node.target)  # the line is replaced, or gets the note

    def visit_If_body(self, node: cst.If) -> None:
        self.lines.on_main += self._is_main(node)

    def leave_If_body(self, node: cst.If) -> None:
        self.lines.on_main -= self._is_main(node)

    def _is_main(self, node: cst.If) -> bool:
        names = {self.facts.member(child) for child in nodes_of(node.test)}
        return "is_main_process" in names

    def visit_If(self, node: cst.If) -> None:
        if self.facts.member_call(node.test) == "check_trigger":
            self._in_lines.add(node.test)

    def leave_If(self, original_node: cst.If, updated_node: cst.If) -> cst.If:
        return self.lines.rewrite_trigger(original_node, updated_node)

    # --- functions

    def visit_Module(self, node: cst.Module) -> None:
        for child in nodes_of(node, into_functions=False):
            for target, _ in assignments(child):
                if text_of(target) in self.facts.accelerators:
                    self._is_module_scope = True

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        self._methods.append(any(param.name.value == "self" for param in node.params.params))
        has_param = any(param.name.value in self.facts.accelerators for param in node.params.params)
        makes = any(
            text_of(target) in self.facts.accelerators
            for child in nodes_of(node.body, into_functions=False)
            for target, _ in assignments(child)
        )
        self._has_context.append(has_param or makes or any(self._has_context))

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        self._has_context.pop()
        self._methods.pop()
        if original_node.name.value not in self.facts.batch_sizes:
            return updated_node
        search = "find_executable_batch_size"
        decorators = [line for line in updated_node.decorators if search not in text_of(line)]
        self.report.convert()
        return updated_node.with_changes(decorators=decorators)

    # --- names of the context

    def leave_Name(
        self, original_node: cst.Name, updated_node: cst.Name
    ) -> cst.Name | cst.Attribute:
        if original_node.value in self.facts.accelerators:
            return updated_node.with_changes(value=self.facts.ctx)
        name = self.facts.imported.get(original_node.value, "")
        if original_node in self._inner or not name or name.endswith(_STATELESS):
            return updated_node
        # A class or function that is no call: `isinstance(x, Accelerator)`, `map(gather, xs)`.
        if name == "Accelerator":
            self.report.convert()
            return cst.Attribute(cst.Name("faccel"), cst.Name("DistContext"))
        self.report.refuse(f"`{name}`", NAMES_WITHOUT_EQUAL.get(name, DOCS))
        return updated_node

    def visit_Import(self, node: cst.Import) -> bool:
        return False

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:
        return False

    def visit_Param(self, node: cst.Param) -> None:
        self._inner.add(node.name)

    def visit_Decorator(self, node: cst.Decorator) -> None:
        self._inner.add(node.decorator)

    def visit_Arg(self, node: cst.Arg) -> None:
        if node.keyword is not None:
            self._inner.add(node.keyword)
        if self._saves(node):
            self._inner.add(node.value)

    def _saves(self, node: cst.Arg) -> bool:
        """Return whether an argument is `save_function=accelerator.save`."""
        is_option = node.keyword is not None and node.keyword.value == "save_function"
        return is_option and self.facts.member(node.value) == "save"

    def leave_Arg(self, original_node: cst.Arg, updated_node: cst.Arg) -> cst.Arg:
        # The name of a parameter is no variable; `leave_Call` renames those of this script.
        return updated_node.with_changes(keyword=original_node.keyword)

    # --- attributes

    def visit_Call(self, node: cst.Call) -> None:
        self._inner.add(node.func)

    def visit_Attribute(self, node: cst.Attribute) -> None:
        self._inner.update((node.value, node.attr))

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        node = updated_node.with_changes(attr=original_node.attr)
        if original_node.attr.value in self.facts.accelerator_attributes:
            return node.with_changes(attr=cst.Name(self.facts.ctx))
        member = self.facts.member(original_node)
        if not member and self.facts.may_be_accelerator(original_node):
            owner = text_of(original_node.value)
            self.report.refuse(f"`{original_node.attr.value}` of `{owner}`", DOCS)
        if not member or original_node in self._called_functions(original_node, member):
            return node
        template = ATTRIBUTES.get(member)
        if template is not None:
            self.report.convert()
            return cst.parse_expression(template.format(ctx=self._ctx(original_node)))
        if member == "sync_gradients":
            self.report.refuse("`sync_gradients` outside of the loop", "docs/accumulation.md")
        elif member == "optimizer_step_was_skipped":
            self.report.convert()
            return cst.parse_expression(f"{self.facts.info}.skipped")
        else:
            self._refuse(member)
        return node

    def _called_functions(self, node: cst.Attribute, member: str) -> set[cst.CSTNode]:
        # `accelerator.state.device` replaces `accelerator.state`, which is part of it.
        is_read = member in ATTRIBUTES and member != "gradient_accumulation_steps"
        return set() if is_read and member != "state" else self._inner

    def _ctx(self, node: cst.CSTNode) -> str:
        assert isinstance(node, cst.Attribute)
        return self.facts.context_of(node.value)

    def _refuse(self, member: str) -> None:
        self.report.refuse(f"`{member}`", WITHOUT_EQUAL.get(member, DOCS))

    # --- calls

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        updated_node = self._renamed_keywords(original_node, updated_node)
        name = self.facts.accelerate_name(original_node.func)
        if name in CONSTRUCTORS:
            return cst.parse_expression(self.creation.init_call(updated_node))
        if name == "get_logger":
            return self._logger(updated_node)
        if name in FUNCTIONS:
            return self._function(name, updated_node)
        member = self.facts.member_call(original_node)
        if not member:
            is_line = original_node in self._in_lines and bool(self._context())
            return updated_node if is_line else self._other_call(name, updated_node)
        if original_node in self._in_lines or (member in ATTRIBUTES and member not in METHODS):
            return updated_node
        assert isinstance(original_node.func, cst.Attribute)
        ctx = self.facts.context_of(original_node.func.value)
        if member in METHODS:
            return self._ruled(METHODS[member], updated_node, ctx)
        special: Callable[[cst.Call, str, str], str | None] = self.lines.expression
        code = special(updated_node, member, ctx)
        if code is not None:
            return cst.parse_expression(code)
        self._refuse(member)
        return updated_node

    def _context(self) -> str:
        """Return the code of a context that exists at this place, "" if there is none."""
        if self._is_module_scope or any(self._has_context):
            return self.facts.ctx
        if self._methods and self._methods[-1] and self.facts.accelerator_attributes:
            return f"self.{self.facts.ctx}"
        return ""

    def _function(self, name: str, call: cst.Call) -> cst.BaseExpression:
        """Replace a call of a function that finds the state of the process itself."""
        ctx = self._context()
        if not ctx and name == "set_seed":
            ctx = "faccel.init()"
        if not ctx:
            self.report.refuse(f"`{name}` without an accelerator", "docs/communication.md")
            return call
        return self._ruled(FUNCTIONS[name], call, ctx)

    def _other_call(self, name: str, call: cst.Call) -> cst.BaseExpression:
        """Replace a call of a function that searches a batch size, or of a logger."""
        if name and not name.endswith(_STATELESS) and name != "find_executable_batch_size":
            self.report.refuse(f"`{name}`", NAMES_WITHOUT_EQUAL.get(name, DOCS))
        function = text_of(call.func)
        start = self.facts.batch_sizes.get(function)
        if start is None:
            return self._log_call(call)
        # Accelerate passes the batch size before the other arguments.
        if call.args:
            others = ", ".join(text_of(arg.with_changes(comma=_NO_COMMA)) for arg in call.args)
            function = f"lambda batch_size: {function}(batch_size, {others})"
        args = [function, self._context() or self.facts.ctx, f"start={start}"]
        return cst.parse_expression(call_code("faccel.find_batch_size", args))

    def visit_Comparison(self, node: cst.Comparison) -> None:
        if self._question(node) is not None:
            self._inner.add(node.left)

    def leave_Comparison(
        self, original_node: cst.Comparison, updated_node: cst.Comparison
    ) -> cst.BaseExpression:
        code = self._question(original_node)
        if code is None:
            return updated_node
        self.report.convert()
        return cst.parse_expression(code)

    def _question(self, node: cst.Comparison) -> str | None:
        """Return the code for `accelerator.distributed_type == DistributedType.NO`."""
        if self.facts.member(node.left) != "distributed_type" or len(node.comparisons) != 1:
            return None
        operator = node.comparisons[0].operator
        values = [node.comparisons[0].comparator]
        if isinstance(values[0], cst.Tuple | cst.List | cst.Set):
            values = [element.value for element in values[0].elements]
        questions: list[str] = []
        for value in values:
            name = text_of(value).rpartition("DistributedType.")[2]
            if name not in DISTRIBUTED_TYPES:
                return None
            questions.append(DISTRIBUTED_TYPES[name].format(ctx=self._ctx(node.left)))
        code = " or ".join(questions)
        is_negated = isinstance(operator, cst.NotEqual | cst.NotIn)
        return f"(not ({code}))" if is_negated else f"({code})"

    def _logger(self, call: cst.Call) -> cst.BaseExpression:
        """Replace `get_logger(name)`: at the top of a module there is no context yet."""
        self.report.convert()
        options = arguments(call, ("name", "log_level"))
        name = text_of(options["name"].value)
        if self._has_context and self._has_context[-1]:
            return cst.parse_expression(f"faccel.get_logger({name}, {self._context()})")
        self.facts.logger_name = name
        return cst.parse_expression(f"logging.getLogger({name})")

    def _log_call(self, call: cst.Call) -> cst.Call:
        """Replace `main_process_only=` and `in_order=` of the loggers of accelerate."""
        receiver, _, level = text_of(call.func).rpartition(".")
        if level not in _LEVELS or receiver not in self.facts.loggers:
            return call
        args: list[cst.Arg] = []
        for arg in call.args:
            name = "" if arg.keyword is None else arg.keyword.value
            if name not in ("main_process_only", "in_order"):
                args.append(arg)
            is_everywhere = name == "main_process_only" and text_of(arg.value) == "False"
            # Without a context the logger comes from the standard library.
            if is_everywhere and self._has_context and self._has_context[-1]:
                args.append(_keyword("every_rank", "True"))
        if args:
            args[-1] = args[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return call.with_changes(args=args)

    def _ruled(self, rule: CallRule, call: cst.Call, ctx: str) -> cst.BaseExpression:
        args: list[str] = []
        further: list[str] = []
        for index, (name, arg) in enumerate(arguments(call, rule.params).items()):
            bare: dict[str, object] = {"comma": cst.MaybeSentinel.DEFAULT, "keyword": None}
            bare["equal"] = cst.MaybeSentinel.DEFAULT
            bare["whitespace_after_arg"] = cst.SimpleWhitespace("")
            code = text_of(arg.with_changes(**bare))
            keyword = rule.keywords.get(name)
            is_leading = index < rule.positional and arg.keyword is None
            is_leading = is_leading or name in rule.params[: rule.positional]
            if name.startswith("*") or is_leading or keyword == "":
                args.append(code)
            elif keyword is not None or not rule.params:
                further.append(f"{keyword or name}={code}")
            elif name not in rule.dropped:
                self.report.refuse(f"`{name}={code}`", DOCS)
        context = [rule.context.replace("ctx", ctx) if rule.context == "ctx" else rule.context]
        if rule.context == "ctx=ctx":
            context = [f"ctx={ctx}"]
        extra = [rule.extra] if rule.extra else []
        every = [code for code in [*args, *context, *further, *extra] if code]
        if rule.note:
            self.report.note(rule.note)
        self.report.convert()
        return cst.parse_expression(rule.around.format(call=call_code(rule.function, every)))

    def _renamed_keywords(self, original: cst.Call, call: cst.Call) -> cst.Call:
        """Rename `accelerator=` in calls of functions of this script; note it in other calls."""
        args: list[cst.Arg] = []
        for arg, original_arg in zip(call.args, original.args, strict=True):
            keyword = arg.keyword
            # The default, `torch.save`, is what it calls on the main process.
            if self._saves(original_arg):
                self.report.convert()
                continue
            if keyword is None or not makes_accelerator(original_arg.value, self.facts):
                args.append(arg)
                continue
            name = text_of(call.func).rpartition(".")[2]
            if name in self.facts.functions and keyword.value in self.facts.accelerators:
                args.append(arg.with_changes(keyword=cst.Name(self.facts.ctx)))
            else:
                if not self.facts.accelerate_name(original.func):
                    self.report.note(f"`{name}` must take a `faccel.DistContext`")
                args.append(arg)
        if args and len(args) < len(call.args):
            args[-1] = args[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
        return call.with_changes(args=args)


def _keyword(name: str, value: str) -> cst.Arg:
    equal = cst.AssignEqual(cst.SimpleWhitespace(""), cst.SimpleWhitespace(""))
    return cst.Arg(cst.parse_expression(value), keyword=cst.Name(name), equal=equal)
