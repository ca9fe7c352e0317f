"""The first pass: loops over loaders, accumulation, backward and updates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import cast

import attrs
import libcst as cst

from faccel.migration.facts import Facts
from faccel.migration.micro_batches import NOTE, has_windows, may_count_others
from faccel.migration.report import Report
from faccel.migration.syntax import (
    arguments,
    callee_name,
    children_of,
    comment_lines,
    nodes_of,
    replaced,
    simple_call,
    statements_of,
    text_of,
    with_leading,
)
from faccel.migration.updates import Body, UpdateRewriter

# Functions around a loader in the head of a loop: `enumerate(tqdm(loader))`.
_WRAPPERS = ("enumerate", "iter", "tqdm", "track", "progress", "islice", "prog_bar")
# A loss is one number, without rows that could be padding.
_SCALAR = re.compile(r"(^|[._])loss(\.(detach|float|cpu|clone)\(\))*$")
_EPOCH = "the order of each pass is a function of the epoch: write `{loader}.at(epoch)`"


@attrs.define(eq=False)
class _Loop:
    """A loop or function around the current node.

    Args:
        kind: `"windows"`, `"batches"`, `"plain"` (over a loader), `"epochs"`, `"loop"`,
            `"function"`.
        name: Name of the micro-batch, of the record, or of the epoch.
        loader: The loader in the head of the loop, if there is one.
        batch: What the loop assigns each batch to.
    """

    kind: str
    name: str = ""
    loader: cst.BaseExpression | None = None
    batch: cst.BaseExpression | None = None


class LoopRewriter(cst.CSTTransformer):
    """Rewrites the loops of a script.

    Args:
        facts: About the script.
        report: Counts.
    """

    def __init__(self, facts: Facts, report: Report) -> None:
        super().__init__()
        self.facts = facts
        self.report = report
        self._loops: list[_Loop] = [_Loop("function")]
        # The blocks of `if accelerator.sync_gradients:` around the current node.
        self._sync_blocks: list[cst.BaseSuite] = []
        # An accelerator of the current function: `accelerator` or `self.accelerator`.
        self._receivers: list[cst.BaseExpression] = [cst.Name("accelerator")]
        self._functions: list[str] = []
        # How many handlers of exceptions are around the node, in each function.
        self._conditions = [0]
        # Notes for the line that is being rewritten.
        self._line_notes: list[str] = []

    # --- functions and loops

    def visit_Module(self, node: cst.Module) -> None:
        self._receivers = [self._receiver_in(node, cst.Name("accelerator"))]

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        names = [param.name.value for param in node.params.params]
        epochs = [name for name in ("epoch", "epoch_idx", "current_epoch") if name in names]
        epoch = epochs[-1] if epochs else ""
        self._loops.append(_Loop("function", epoch))
        self._receivers.append(self._receiver_in(node.body, self._receivers[-1]))
        self._functions.append(node.name.value)
        self._conditions.append(0)

    def leave_FunctionDef(
        self, original_node: cst.FunctionDef, updated_node: cst.FunctionDef
    ) -> cst.FunctionDef:
        self._loops.pop()
        self._receivers.pop()
        self._functions.pop()
        self._conditions.pop()
        return updated_node

    def _receiver_in(self, node: cst.CSTNode, default: cst.BaseExpression) -> cst.BaseExpression:
        for child in nodes_of(node, into_functions=False):
            if isinstance(child, cst.Attribute) and self.facts.is_accelerator(child.value):
                return child.value
        return default

    def visit_For(self, node: cst.For) -> None:
        self._loops.append(self._loop_of(node))

    def visit_ExceptHandler(self, node: cst.ExceptHandler) -> None:
        self._conditions[-1] += 1

    def leave_ExceptHandler(
        self, original_node: cst.ExceptHandler, updated_node: cst.ExceptHandler
    ) -> cst.ExceptHandler:
        self._conditions[-1] -= 1
        return updated_node

    def visit_While(self, node: cst.While) -> None:
        self._loops.append(_Loop("loop"))

    def leave_While(self, original_node: cst.While, updated_node: cst.While) -> cst.While:
        self._loops.pop()
        return updated_node

    def _loop_of(self, node: cst.For) -> _Loop:
        loader = self._loader_in(node.iter)
        if loader is None:
            calls = [callee_name(child) for child in nodes_of(node.iter)]
            if isinstance(node.target, cst.Name) and ("range" in calls or "trange" in calls):
                return _Loop("epochs", node.target.value)
            return _Loop("loop")
        members = self._members_in(node.body)
        batch = node.target
        heads = {callee_name(child) for child in nodes_of(node.iter)}
        if isinstance(batch, cst.Tuple) and "enumerate" in heads:
            batch = batch.elements[-1].value
        if has_windows(node.body, self.facts):
            return _Loop("windows", self.facts.micro, loader, batch)
        if "gather_for_metrics" in members:
            return _Loop("batches", self.facts.record, loader, batch)
        # A generator passes the batches to a loop elsewhere.
        yields = any(isinstance(child, cst.Yield) for child in nodes_of(node.body))
        trains = "backward" in members or yields
        return _Loop("plain", "trains" if trains else "", loader, batch)

    def _members_in(self, node: cst.CSTNode) -> set[str]:
        """Return the members that a loop uses itself, outside of loops over other loaders."""
        members: set[str] = set()
        for child in children_of(node):
            if isinstance(child, cst.FunctionDef | cst.Lambda):
                continue
            if isinstance(child, cst.For) and self._loader_in(child.iter) is not None:
                continue
            members |= {self.facts.member(child)} | self._members_in(child)
        return members

    def _loader_in(self, node: cst.BaseExpression) -> cst.BaseExpression | None:
        """Return the loader in the head of a loop, None for other loops."""
        while isinstance(node, cst.Call) and node.args and callee_name(node) in _WRAPPERS:
            node = node.args[0].value
        if isinstance(node, cst.Call) and self._skips(node):
            return node
        if self.facts.has_kind(text_of(node), "loader"):
            return node
        return None

    def _skips(self, node: cst.Call) -> bool:
        name = self.facts.member_call(node) or self.facts.accelerate_name(node.func)
        return name == "skip_first_batches"

    def leave_For(self, original_node: cst.For, updated_node: cst.For) -> cst.For:
        loop = self._loops.pop()
        if loop.loader is None:
            return updated_node
        notes: list[str] = []
        if loop.kind == "windows" and may_count_others(original_node.body, self.facts):
            notes.append(self.report.note(NOTE))
        new_loader = self._at_epoch(loop, notes)
        updated_node = with_leading(updated_node, comment_lines(notes))  # type: ignore[assignment]
        if loop.kind == "plain":
            return updated_node.with_changes(iter=_exchange(updated_node.iter, new_loader))
        assert loop.batch is not None
        ctx = self.facts.context_of(self._receivers[-1])
        code = f"faccel.batches({new_loader})"
        if loop.kind == "windows":
            # A generator, so that `break`, `continue` and the count of steps stay as they are.
            windows = f"    for window in faccel.windows({new_loader}, {ctx})\n"
            code = f"(\n    {loop.name}\n{windows}    for {loop.name} in window\n)"
        iterable = _exchange(updated_node.iter, code)
        # The batch is read from the record in the first line of the loop.
        line = statements_of(f"{text_of(loop.batch)} = {loop.name}.data\n")[0]
        body = cast("Sequence[Body]", updated_node.body.body)
        target = updated_node.target.deep_replace(
            _last_element(updated_node.target, loop), cst.Name(loop.name)
        )
        return updated_node.with_changes(
            iter=iterable,
            target=target,
            body=updated_node.body.with_changes(body=[line, *body]),
        )

    def _at_epoch(self, loop: _Loop, notes: list[str]) -> str:
        """Return the code of a loader at the epoch of the loops around it."""
        assert loop.loader is not None
        code = text_of(loop.loader)
        if isinstance(loop.loader, cst.Call):
            return code  # `skip_first_batches`, which `leave_Call` replaces
        if code in self._aliases():
            return code
        epoch = self._epoch()
        if epoch:
            return f"{code}.at({epoch})"
        trains = loop.kind == "windows" or loop.name == "trains"
        if trains and self._is_repeated():
            notes.append(self.report.refuse(_EPOCH.format(loader=code), "docs/data.md"))
            return code
        return f"{code}.at(0)" if trains else code

    def _epoch(self) -> str:
        """Return the variable of the nearest loop over epochs, or the parameter `epoch`."""
        for loop in reversed(self._loops):
            if loop.kind in ("epochs", "function") and loop.name:
                return loop.name
            if loop.kind == "function":
                break
        return ""

    def _is_repeated(self) -> bool:
        """Return whether a loop without an epoch may run again."""
        # In a function that gets the loader or is called in a loop, or inside of another loop.
        is_function = bool(self._functions) and not self.facts.is_created
        is_again = bool(self.facts.repeated.intersection(self._functions))
        return is_function or is_again or self._loops[-1].kind != "function"

    def _aliases(self) -> set[str]:
        """Return the names of loaders that an assignment has put at an epoch already."""
        aliases: set[str] = set()
        for target, values in self.facts.assigned.items():
            for value in values:
                if isinstance(value, cst.Call) and self._skips(value):
                    aliases.add(target)
        return aliases - set(self.facts.prepared)

    # --- lines

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[Body]:
        notes, self._line_notes = self._line_notes, []
        updated_node = with_leading(updated_node, comment_lines(notes))  # type: ignore[assignment]
        line = simple_call(original_node)
        if line is not None and self.facts.member_call(line[1]) == "backward":
            assert isinstance(line[1].func, cst.Attribute)
            code = self._backward(line[1], line[1].func.value)
            return cst.FlattenSentinel(replaced(updated_node, code))
        alias = self._alias(original_node)
        if alias is not None:
            return cst.FlattenSentinel(replaced(updated_node, alias))
        return updated_node

    def _backward(self, call: cst.Call, receiver: cst.BaseExpression) -> str:
        ctx = self.facts.context_of(receiver)
        scaler = self.facts.sibling(receiver, self.facts.scaler)
        args: list[str] = []
        for name, arg in arguments(call, ("loss",)).items():
            code = text_of(arg.value)
            args.append(code if name == "loss" else f"{name}={code}")
        args[1:1] = [scaler, ctx]
        # Accelerate divides every loss, those of a short last window too.
        if self.facts.accumulates:
            args.append(f"scale=1 / {ctx}.config.grad_accum")
        self.report.convert()
        return f"{scaler} = faccel.scaled_backward({', '.join(args)})\n"

    def _alias(self, node: cst.SimpleStatementLine) -> str | None:
        """Return `active = loader.at(epoch)` for `active = loader`, if the other branch skips."""
        assign = node.body[0] if len(node.body) == 1 else None
        if not isinstance(assign, cst.Assign):
            return None
        target, value = text_of(assign.targets[0].target), text_of(assign.value)
        is_alias = target in self._aliases() and self.facts.has_kind(value, "loader")
        if not is_alias or not self._epoch():
            return None
        return f"{target} = {value}.at({self._epoch()})\n"

    # --- accumulation

    def leave_With(self, original_node: cst.With, updated_node: cst.With) -> cst.With:
        items: list[cst.WithItem] = []
        for item in updated_node.items:
            items += self._with_items(item)
        return updated_node.with_changes(items=_with_commas(items))

    def _with_items(self, item: cst.WithItem) -> list[cst.WithItem]:
        call = item.item
        name = self.facts.member_call(call)
        if not isinstance(call, cst.Call) or name != "accumulate":
            return [item]
        if self._micro() == "" or not call.args:
            return [item]  # the second pass adds a note
        self.report.convert()
        items: list[cst.WithItem] = []
        for arg in call.args:
            code = f"faccel.grad_sync({text_of(arg.value)}, on={self._micro()}.sync)"
            items.append(cst.WithItem(cst.parse_expression(code), asname=item.asname))
        return items

    def _micro(self) -> str:
        """Return the name of the micro-batch of the loop around the node, or ""."""
        for loop in reversed(self._loops):
            if loop.kind == "function":
                return ""
            if loop.kind == "windows":
                return loop.name
        return ""

    def leave_Attribute(
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        member = self.facts.member(original_node)
        micro = self._micro()
        if member == "optimizer_step_was_skipped" and micro:
            self.report.convert()
            return cst.parse_expression(f"({micro}.sync and {self.facts.info}.skipped)")
        if member != "sync_gradients":
            return updated_node
        if micro:
            self.report.convert()
            return cst.parse_expression(f"{micro}.sync")
        # Without accumulation each backward is one update.
        if "accumulate" not in self.facts.members and self.facts.is_created:
            self.report.convert()
            return cst.Name("True")
        return updated_node

    def leave_If(
        self, original_node: cst.If, updated_node: cst.If
    ) -> cst.If | cst.FlattenSentinel[Body]:
        is_sync = self.facts.member(original_node.test) == "sync_gradients"
        always = is_sync and text_of(updated_node.test) == "True"
        is_block = isinstance(updated_node.body, cst.IndentedBlock)
        if not always or updated_node.orelse is not None or not is_block:
            return updated_node
        body = list(cast("Sequence[Body]", updated_node.body.body))
        first_lines = [*updated_node.leading_lines, *body[0].leading_lines]
        body[0] = body[0].with_changes(leading_lines=first_lines)
        return cst.FlattenSentinel(body)

    # --- expressions that depend on the loop

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if self._skips(original_node):
            return self._skip(original_node, updated_node)
        if callee_name(original_node) == "iter" and len(original_node.args) == 1:
            return self._iterator(updated_node)
        if self.facts.member_call(original_node) != "gather_for_metrics":
            return updated_node
        loop = self._record_loop()
        options = arguments(updated_node, ("input_data", "use_gather_object"))
        if "use_gather_object" in options or loop is None:
            return updated_node
        assert isinstance(original_node.func, cst.Attribute)
        ctx = self.facts.context_of(original_node.func.value)
        data = text_of(options["input_data"].value)
        self.report.convert()
        if _SCALAR.search(data):
            return cst.parse_expression(f"faccel.gather({data}, {ctx})")
        return cst.parse_expression(f"faccel.gather({data}, {ctx}, num_valid={loop}.num_valid)")

    def _iterator(self, call: cst.Call) -> cst.Call:
        """Replace `iter(loader)`, outside of loops and in those over epochs."""
        code = text_of(call.args[0].value)
        if not self.facts.has_kind(code, "loader") or code in self._aliases():
            return call
        epoch = self._epoch()
        is_late = self._conditions[-1] > 0  # a pass that begins when another one has ended
        if is_late or (not epoch and self._is_repeated()):
            self._line_notes.append(self.report.refuse(_EPOCH.format(loader=code), "docs/data.md"))
            return call
        arg = call.args[0].with_changes(value=cst.parse_expression(f"{code}.at({epoch or 0})"))
        return call.with_changes(args=[arg])

    def _record_loop(self) -> str | None:
        for loop in reversed(self._loops):
            if loop.kind == "function":
                return None
            if loop.kind in ("windows", "batches"):
                return loop.name
        return None

    def _skip(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        options = arguments(updated_node, ("dataloader", "num_batches"))
        epoch = self._epoch() or "0"
        loader, count = options.get("dataloader"), options.get("num_batches")
        if loader is None or count is None:
            return updated_node
        self.report.convert()
        code = f"{text_of(loader.value)}.at({epoch}, step={text_of(count.value)})"
        return cst.parse_expression(code)

    # --- updates

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        body = self._updates().rewrite(cast("Sequence[Body]", updated_node.body))
        if original_node in self._sync_blocks:
            self._sync_blocks.remove(original_node)
        return updated_node.with_changes(body=body)

    def visit_If(self, node: cst.If) -> None:
        members = {self.facts.member(child) for child in nodes_of(node.test)}
        if "sync_gradients" in members and not isinstance(node.test, cst.UnaryOperation):
            self._sync_blocks.append(node.body)

    def leave_Module(self, original_node: cst.Module, updated_node: cst.Module) -> cst.Module:
        return updated_node.with_changes(body=self._updates().rewrite(updated_node.body))

    def _updates(self) -> UpdateRewriter:
        is_gated = bool(self._sync_blocks)
        receiver = self._receivers[-1]
        return UpdateRewriter(self.facts, self.report, self._micro(), is_gated, receiver)


def _exchange(node: cst.BaseExpression, code: str) -> cst.BaseExpression:
    """Return the head of a loop with another loader."""
    if isinstance(node, cst.Call) and node.args and callee_name(node) in _WRAPPERS:
        first = node.args[0]
        # A generator as the only argument needs no further parentheses.
        is_single = len(node.args) == 1 and callee_name(first.value) not in _WRAPPERS
        if is_single and code.startswith("(\n"):
            return cst.parse_expression(f"{text_of(node.func)}{code}")
        value = _exchange(first.value, code)
        return node.with_changes(args=[first.with_changes(value=value), *node.args[1:]])
    return cst.parse_expression(code)


def _last_element(target: cst.BaseExpression, loop: _Loop) -> cst.CSTNode:
    """Return the node of the target that holds the batch."""
    if loop.batch is not None and text_of(target) != text_of(loop.batch):
        assert isinstance(target, cst.Tuple)
        return target.elements[-1].value
    return target


def _with_commas(items: Sequence[cst.WithItem]) -> list[cst.WithItem]:
    comma = cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))
    result = [item.with_changes(comma=comma) for item in items]
    result[-1] = result[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return result
