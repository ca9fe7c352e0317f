"""The statements of one update: clip, step, scheduler and zero_grad become `optimizer_step`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import attrs
import libcst as cst

from faccel.migration.facts import Facts
from faccel.migration.report import Report
from faccel.migration.syntax import (
    arguments,
    call_code,
    comment_lines,
    method_call,
    names_in,
    simple_call,
    statements_of,
    text_of,
    with_leading,
)

Body = cst.SimpleStatementLine | cst.BaseCompoundStatement
_CLIPS = {
    "clip_grad_norm_": ("parameters", "max_norm", "norm_type"),
    "clip_grad_value_": ("parameters", "clip_value"),
}


_PARTIAL = (
    "Accelerate clips the partial gradients of each micro-batch here, without "
    "`if accelerator.sync_gradients:`; now the update is clipped once; see docs/accumulation.md"
)
_SCHEDULE = (
    "as under Accelerate, the scheduler is stepped once per process at each update; "
    "see docs/coming-from-accelerate.md#learning-rates-and-schedulers"
)
_NO_GRADIENTS = (
    "`optimizer_step` sets the gradients to None: read them before it; "
    "see docs/training-loop.md#one-update"
)
_SUMS = (
    "nothing here calls `zero_grad`, so Accelerate adds up the gradients of all updates; "
    "`optimizer_step` sets them to None; see docs/training-loop.md#one-update"
)


@attrs.define(eq=False)
class _Item:
    """A statement of a block.

    Args:
        node: The statement.
        is_gated: Whether Accelerate runs it only in the last micro-batch of an update.
        kind: `"clip"`, `"step"`, `"schedule"`, `"zero"`, or "" for another statement.
        subject: Code of the optimizer or scheduler; for a clip that of the accelerator.
        call: The call.
        target: What the result of a clip is assigned to, or "".
        condition: The condition of a clip, or "".
    """

    node: Body
    is_gated: bool = False
    kind: str = ""
    subject: str = ""
    call: cst.Call | None = None
    target: str = ""
    condition: str = ""


@attrs.frozen(eq=False)
class UpdateRewriter:
    """Rewrites the updates in a block of statements.

    Args:
        facts: About the script.
        report: Counts.
        micro: Name of the micro-batch of the loop around the block, or "".
        is_gated: Whether the block runs only in the last micro-batch of an update.
        receiver: An accelerator that the function uses.
    """

    facts: Facts
    report: Report
    micro: str
    is_gated: bool
    receiver: cst.BaseExpression

    def rewrite(self, body: Sequence[Body]) -> list[Body]:
        """Return the statements of a block with the new calls."""
        items = self._flatten(body)
        if not any(item.kind for item in items):
            return list(body)
        self._join(items)
        return self._grouped(items)

    def _flatten(self, body: Sequence[Body]) -> list[_Item]:
        """Return the statements, those of `if accelerator.sync_gradients:` among them."""
        items: list[_Item] = []
        has_step = any(self._item(statement).kind for statement in body)
        for statement in body:
            if has_step and self.micro and self._is_sync_block(statement):
                assert isinstance(statement, cst.If)
                inner = [self._item(line) for line in statement.body.body]  # type: ignore[arg-type]
                inner[0].node = inner[0].node.with_changes(
                    leading_lines=[
                        *statement.leading_lines,
                        *getattr(inner[0].node, "leading_lines", ()),
                    ]
                )
                for item in inner:
                    item.is_gated = True
                items += inner
            else:
                items.append(self._item(statement))
        return items

    def _is_sync_block(self, statement: Body) -> bool:
        if not isinstance(statement, cst.If) or statement.orelse is not None:
            return False
        is_block = isinstance(statement.body, cst.IndentedBlock)
        return is_block and text_of(statement.test) == f"{self.micro}.sync"

    def _item(self, statement: Body) -> _Item:
        """Return what a statement is."""
        line = simple_call(statement)
        if line is not None and self._is_other_step(*line):
            note = self.report.refuse(f"`{text_of(line[1])}`", "docs/training-loop.md#one-update")
            return _Item(with_leading(statement, comment_lines([note])))
        step = method_call(statement, "step")
        if step is not None and not step[1].args and self.facts.has_kind(step[0], "optimizer"):
            return _Item(statement, True, "step", step[0], step[1])
        if step is not None and self.facts.has_kind(step[0], "scheduler") and self._gates():
            return _Item(statement, True, "schedule", step[0], step[1])
        zero = method_call(statement, "zero_grad")
        if zero is not None and self.facts.has_kind(zero[0], "optimizer"):
            return _Item(statement, True, "zero", zero[0], zero[1])
        return self._clip(statement) or _Item(statement)

    def _is_other_step(self, target: cst.BaseExpression | None, call: cst.Call) -> bool:
        """Return whether a call is `optimizer.step(closure)` or returns something."""
        if not isinstance(call.func, cst.Attribute) or call.func.attr.value != "step":
            return False
        is_optimizer = self.facts.has_kind(text_of(call.func.value), "optimizer")
        return is_optimizer and (bool(call.args) or target is not None)

    def _gates(self) -> bool:
        """Return whether schedulers move with the optimizer, which is Accelerate's default."""
        option = self.facts.creation.get("step_scheduler_with_optimizer")
        return option is None or text_of(option.value) != "False"

    def _clip(self, statement: Body) -> _Item | None:
        condition = ""
        line: Body = statement
        # `if args.max_grad_norm is not None: accelerator.clip_grad_norm_(...)`
        if isinstance(statement, cst.If) and statement.orelse is None:
            condition = _without_sync(statement.test, self.micro)
            body = statement.body.body
            if len(body) != 1 or not isinstance(body[0], cst.SimpleStatementLine):
                return None
            line = body[0]
        call = simple_call(line)
        if call is None or self.facts.member_call(call[1]) not in _CLIPS:
            return None
        assert isinstance(call[1].func, cst.Attribute)
        target = "" if call[0] is None else text_of(call[0])
        receiver = text_of(call[1].func.value)
        return _Item(statement, False, "clip", receiver, call[1], target, condition)

    def _join(self, items: list[_Item]) -> None:
        """Replace the items of each update by one."""
        start = 0
        index = 0
        while index < len(items):
            if items[index].kind != "step":
                index += 1
                continue
            end = _end_of_run(items, index)
            new = self._update(items, start, index, end)
            items[index:end] = new
            start = index = index + len(new)
        for position in reversed(range(len(items))):
            items[position : position + 1] = self._alone(items, position)

    def _update(self, items: list[_Item], start: int, index: int, end: int) -> list[_Item]:
        """Return the update of the run `items[index:end]`, and take the clips before it."""
        run = items[index:end]
        optimizers = [item.subject for item in run if item.kind == "step"]
        clips = self._clips_of(items[start:index], optimizers)
        new: list[_Item] = []
        for optimizer in optimizers:
            schedulers = self._schedulers_of(optimizer, optimizers, run)
            new += self._step(optimizer, clips.get(optimizer, []), schedulers)
        comments: list[cst.EmptyLine] = []
        for clip in chain.from_iterable(clips.values()):
            comments += _comments(clip.node)
            clip.kind = "taken"
            if (
                self.micro
                and not clip.is_gated
                and not self.is_gated
                and not _tests_sync(clip.node, self.micro)
            ):
                comments += comment_lines([self.report.note(_PARTIAL)])
        for item in run:
            comments += _comments(item.node)
        if any(item.kind == "schedule" for item in run) and not self._splits_batches():
            comments += comment_lines(self.report.note_once(_SCHEDULE))
        comments += comment_lines(self._gradient_notes(items[end:], optimizers))
        new[0].node = new[0].node.with_changes(leading_lines=comments)
        # A zero_grad later in the block has nothing left to do.
        for item in items[end:]:
            if item.kind == "zero" and item.subject in optimizers and not self._reads_grad(items):
                item.kind = "taken"
        self.report.convert(len(run))
        return new

    def _gradient_notes(self, items: Sequence[_Item], optimizers: Sequence[str]) -> list[str]:
        """Return notes about gradients that the script uses after an update."""
        notes: list[str] = []
        if self._reads_grad_after(items, optimizers):
            notes.append(self.report.note(_NO_GRADIENTS))
        trains = self.facts.is_created and "backward" in self.facts.members
        if trains and "zero_grad" not in self.facts.attribute_names:
            notes += self.report.note_once(_SUMS)
        return notes

    def _reads_grad_after(self, items: Sequence[_Item], optimizers: Sequence[str]) -> bool:
        """Return whether the statements after an update read gradients before `zero_grad`."""
        for item in items:
            if item.kind == "zero" and item.subject in optimizers:
                return False
            if "grad" in names_in(item.node):
                # After another backward there are gradients again.
                return "backward" not in text_of(item.node)
            if "backward" in text_of(item.node):
                return False
        return False

    def _reads_grad(self, items: Sequence[_Item]) -> bool:
        return any(
            not item.kind and "grad" in names_in(item.node) and "backward" in names_in(item.node)
            for item in items
        )

    def _clips_of(
        self, items: Sequence[_Item], optimizers: Sequence[str]
    ) -> dict[str, list[_Item]]:
        """Return the clips before a step that are those of one optimizer."""
        clips: dict[str, list[_Item]] = {}
        for position, item in enumerate(items):
            if item.kind != "clip" or item.call is None:
                continue
            optimizer = self._owner(item.call, optimizers)
            read_later = any(item.target in names_in(later.node) for later in items[position + 1 :])
            if optimizer and not (item.target and read_later):
                clips.setdefault(optimizer, []).append(item)
        return clips

    def _owner(self, call: cst.Call, optimizers: Sequence[str]) -> str:
        """Return the optimizer whose parameters a call clips; "" for those of several."""
        if len(self.facts.of_kind("optimizer")) <= 1 and len(optimizers) == 1:
            return optimizers[0]
        params = text_of(arguments(call, _CLIPS["clip_grad_norm_"])["parameters"].value)
        for optimizer in optimizers:
            for model in self.facts.models_of(optimizer):
                if params == f"{model}.parameters()":
                    return optimizer
        return ""

    def _schedulers_of(
        self, optimizer: str, optimizers: Sequence[str], run: Sequence[_Item]
    ) -> list[str]:
        schedulers: list[str] = []
        for item in run:
            if item.kind == "schedule":
                owner = self.facts.optimizer_of(item.subject)
                if owner == optimizer or (owner not in optimizers and optimizer == optimizers[-1]):
                    schedulers.append(item.subject)
        return schedulers

    def _step(
        self, optimizer: str, clips: Sequence[_Item], schedulers: Sequence[str]
    ) -> list[_Item]:
        ctx, scaler = self._code("ctx"), self._code("scaler")
        args = [optimizer, scaler, ctx]
        lines: list[str] = []
        for clip in clips:
            args += self._clip_arguments(clip)
            self.report.convert()
            if clip.target:
                lines.append(f"{clip.target} = {self.facts.info}.grad_norm")
        if schedulers:
            args.append(f"scheduler={self._repeated(schedulers)}")
        call = call_code("faccel.optimizer_step", args)
        code = "\n".join([f"{self.facts.info}, {scaler} = {call}", *lines])
        return [_Item(statement, True) for statement in statements_of(code + "\n")]

    def _clip_arguments(self, clip: _Item) -> list[str]:
        assert clip.call is not None
        name = self.facts.member_call(clip.call)
        options = arguments(clip.call, _CLIPS[name])
        limit = text_of(options[_CLIPS[name][1]].value)
        if clip.condition:
            limit = f"{limit} if {clip.condition} else None"
        if name == "clip_grad_value_":
            return [f"clip_value={limit}"]
        args = [f"clip_norm={limit}"]
        if "norm_type" in options:
            args.append(f"norm_type={text_of(options['norm_type'].value)}")
        return args

    def _repeated(self, schedulers: Sequence[str]) -> str:
        """Return a list in which each scheduler is as often as Accelerate steps it."""
        names = ", ".join(schedulers)
        if self._splits_batches():
            return schedulers[0] if len(schedulers) == 1 else f"[{names}]"
        return f"[{names}] * {self._code('ctx')}.world_size"

    def _splits_batches(self) -> bool:
        return "split_batches" in self.facts.creation

    def _alone(self, items: Sequence[_Item], position: int) -> list[_Item]:
        """Return what replaces an item that belongs to no update of this block."""
        item = items[position]
        if item.kind == "taken":
            return []
        if item.kind == "schedule":
            assert item.call is not None
            return [self._separate_schedule(item, item.call, items[:position])]
        return [item]

    def _separate_schedule(self, item: _Item, call: cst.Call, before: Sequence[_Item]) -> _Item:
        """A scheduler that other statements separate from the step of its optimizer."""
        line = f"{item.subject}.step({', '.join(text_of(arg) for arg in call.args)})"
        code = line
        if not self._splits_batches():
            code = f"for _ in range({self._code('ctx')}.world_size):\n    {line}"
        # A skipped update moves no scheduler.
        if any(f"{self.facts.info}, " in text_of(other.node) for other in before):
            code = f"if not {self.facts.info}.skipped:\n    " + code.replace("\n", "\n    ")
        self.report.convert()
        new = statements_of(code + "\n")[0]
        comments = _comments(item.node)
        if not self._splits_batches():
            comments += comment_lines(self.report.note_once(_SCHEDULE))
        return _Item(with_leading(new, comments), True)

    def _grouped(self, items: Sequence[_Item]) -> list[Body]:
        """Return the statements; those that follow each other under one `if micro.sync:`."""
        result: list[Body] = []
        gated: list[Body] = []
        for item in [*items, _Item(cst.SimpleStatementLine([]))]:
            if item.is_gated and self.micro and not self.is_gated:
                gated.append(item.node)
                continue
            if gated:
                result.append(self._gate(gated))
                gated = []
            result.append(item.node)
        return result[:-1]

    def _gate(self, body: Sequence[Body]) -> Body:
        block = statements_of(f"if {self.micro}.sync:\n    pass\n")[0]
        # Empty lines separate the block from what is before it; comments belong to the line.
        lines: list[cst.EmptyLine] = list(getattr(body[0], "leading_lines", ()))
        num_empty = 0
        while num_empty < len(lines) and lines[num_empty].comment is None:
            num_empty += 1
        first = body[0].with_changes(leading_lines=lines[num_empty:])
        return block.with_changes(
            body=cst.IndentedBlock(body=[first, *body[1:]]), leading_lines=lines[:num_empty]
        )

    def _code(self, name: str) -> str:
        if name == "ctx":
            return self.facts.context_of(self.receiver)
        return self.facts.sibling(self.receiver, getattr(self.facts, name))


def _comments(node: Body) -> list[cst.EmptyLine]:
    """Return the comments of a statement that is replaced: those before it and after it."""
    comments: list[cst.EmptyLine] = list(getattr(node, "leading_lines", ()))
    lines: list[cst.CSTNode] = [node]
    if isinstance(node, cst.If):
        lines += node.body.body
    for line in lines:
        after = getattr(line, "trailing_whitespace", None)
        if isinstance(after, cst.TrailingWhitespace) and after.comment is not None:
            comments.append(cst.EmptyLine(comment=after.comment))
    return comments


def _tests_sync(node: Body, micro: str) -> bool:
    return isinstance(node, cst.If) and f"{micro}.sync" in text_of(node.test)


def _without_sync(test: cst.BaseExpression, micro: str) -> str:
    """Return a condition without `micro.sync and`, which gates the step anyway."""
    if isinstance(test, cst.BooleanOperation) and isinstance(test.operator, cst.And):
        if text_of(test.left) == f"{micro}.sync":
            return text_of(test.right)
        if text_of(test.right) == f"{micro}.sync":
            return text_of(test.left)
    code = text_of(test)
    return "" if micro and code == f"{micro}.sync" else code


def _end_of_run(items: Sequence[_Item], index: int) -> int:
    """Return the end of the steps, schedulers and zero_grads that follow each other."""
    stepped = {items[index].subject}
    end = index + 1
    while end < len(items):
        item = items[end]
        if item.kind == "step":
            stepped.add(item.subject)
        elif item.kind != "schedule" and not (item.kind == "zero" and item.subject in stepped):
            break
        end += 1
    return end
