"""Lines that call a method of an accelerator, and become other lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import libcst as cst

from faccel.migration.creation import Creation
from faccel.migration.facts import PREPARE, Facts
from faccel.migration.report import Report
from faccel.migration.state import StateRewriter
from faccel.migration.syntax import (
    arguments,
    call_code,
    simple_call,
    statements_of,
    text_of,
)

_STEPS = ("global_step", "completed_steps", "overall_step", "total_steps", "step", "epoch")
_Rewrite = Callable[[cst.BaseExpression | None, cst.Call, str], str | None]


class LineRewriter:
    """Rewrites lines such as `accelerator.log({...}, step=step)`.

    Args:
        facts: About the script.
        report: Counts.
        state: For what is prepared, saved and loaded.
        creation: The arguments of `Accelerator`.
    """

    def __init__(
        self, facts: Facts, report: Report, state: StateRewriter, creation: Creation
    ) -> None:
        self._facts = facts
        self._report = report
        self._state = state
        self._creation = creation
        # How many `if accelerator.is_main_process:` are around the line.
        self.on_main = 0
        self._receiver: cst.BaseExpression = cst.Name("accelerator")
        self._rewrites: dict[str, _Rewrite] = {
            "clear": self._free_memory,
            "clip_grad_norm_": self._clip,
            "clip_grad_value_": self._clip,
            "end_training": self._end_training,
            "free_memory": self._free_memory,
            "init_trackers": self._init_trackers,
            "load_state": self._load_state,
            "log": self._log,
            "register_for_checkpointing": self._register,
            "save_state": self._save_state,
            "set_trigger": self._set_trigger,
            "unscale_gradients": self._unscale,
        }

    def takes(self, line: tuple[cst.BaseExpression | None, cst.Call]) -> bool:
        """Return whether a call is replaced together with the line that it is in."""
        member = self._facts.member_call(line[1])
        is_prepare = member in PREPARE and line[0] is not None
        is_broadcast = self._facts.accelerate_name(line[1].func) == "broadcast_object_list"
        return member in self._rewrites or is_prepare or is_broadcast

    def rewrite(
        self, original: cst.SimpleStatementLine, updated: cst.SimpleStatementLine, context: str
    ) -> str | None:
        """Return the new code of a line; None if it stays. `context` exists there, or is ""."""
        line, new = simple_call(original), simple_call(updated)
        if line is None or new is None:
            return self._assignment(original, updated)
        member = self._facts.member_call(line[1])
        if not member:
            if self._facts.accelerate_name(line[1].func) == "broadcast_object_list" and context:
                return self._broadcast(line[0], new[1], context)
            return self._of_loader(line[0], line[1])
        assert isinstance(line[1].func, cst.Attribute)
        self._receiver = line[1].func.value
        ctx = self._facts.context_of(self._receiver)
        code: str | None = None
        if member in PREPARE and line[0] is not None:
            # The arguments as they were: the kinds are stored by their code.
            code = self._state.prepare(line[0], line[1], ctx)
        elif member in self._rewrites:
            code = self._rewrites[member](line[0], new[1], ctx)
        else:
            return None
        if code is None:
            docs = "docs/coming-from-accelerate.md"
            self._report.refuse(f"this form of `{member}`", docs)
        return code

    def _assignment(
        self, original: cst.SimpleStatementLine, updated: cst.SimpleStatementLine
    ) -> str | None:
        """Rewrite `accelerator.gradient_accumulation_steps = n`: a context is immutable."""
        line, new = original.body[0], updated.body[0]
        if not isinstance(line, cst.Assign) or not isinstance(new, cst.Assign):
            return None
        target = line.targets[0].target
        member = self._facts.member(target)
        if not member:
            return None
        assert isinstance(target, cst.Attribute)
        ctx = self._facts.context_of(target.value)
        if member == "gradient_accumulation_steps":
            self._report.convert()
            return f"{ctx} = faccel.init({ctx}.config, grad_accum={text_of(new.value)})\n"
        if member == "native_amp" and text_of(new.value) == "False":
            self._report.convert()
            return f'{ctx} = faccel.init({ctx}.config, mixed_precision="no")\n'
        self._report.refuse(f"an assignment to `{member}`", "docs/training-loop.md#the-context")
        return None

    def _broadcast(self, target: cst.BaseExpression | None, call: cst.Call, ctx: str) -> str:
        """Accelerate writes into the list; faccel returns a new one."""
        options = arguments(call, ("object_list", "from_process"))
        name = text_of(options["object_list"].value)
        args = [name, ctx]
        if "from_process" in options:
            args.append(f"src={text_of(options['from_process'].value)}")
        self._report.convert()
        into = f"{name}[:]" if target is None else text_of(target)
        return f"{into} = {call_code('faccel.broadcast_objects', args)}\n"

    def _of_loader(self, target: cst.BaseExpression | None, call: cst.Call) -> str | None:
        """Remove `loader.set_epoch(epoch)`: the loop reads `loader.at(epoch)`."""
        if target is not None and self._facts.is_used_up(target, call):
            return ""  # a record of arguments that `faccel.init` has
        receiver, _, method = text_of(call.func).rpartition(".")
        for name in (receiver, receiver.removesuffix(".sampler")):
            if method == "set_epoch" and self._facts.has_kind(name, "loader"):
                self._report.convert()
                return ""
        return None

    def expression(self, call: cst.Call, member: str, ctx: str) -> str | None:
        """Return the code of a call inside of another expression; None if it stays."""
        if member == "split_between_processes":
            return self._split(call, ctx)
        if member == "gather_for_metrics":
            options = arguments(call, ("input_data", "use_gather_object"))
            if "use_gather_object" in options:
                return None
            self._report.convert()
            self._report.note(
                "outside of a loop over a prepared loader no rows are dropped: pass "
                "`num_valid=batch.num_valid`; see docs/data.md#the-last-step"
            )
            return f"faccel.gather({text_of(options['input_data'].value)}, {ctx})"
        if member in PREPARE:
            code = self._state.prepared_expression(member, call, ctx)
            return code
        return None

    def _split(self, call: cst.Call, ctx: str) -> str:
        options = arguments(call, ("inputs", "apply_padding"))
        args = [text_of(options["inputs"].value), ctx]
        if "apply_padding" in options:
            args.append(f"pad={text_of(options['apply_padding'].value)}")
        self._report.convert()
        # `faccel.split` is a function; the block that it is in stays as it is.
        return f"contextlib.nullcontext({call_code('faccel.split', args)})"

    def rewrite_trigger(self, original: cst.If, updated: cst.If) -> cst.If:
        """Rewrite `if accelerator.check_trigger():`, which resets the flag."""
        test = original.test
        if self._facts.member_call(test) != "check_trigger":
            return updated
        assert isinstance(test, cst.Call)
        assert isinstance(test.func, cst.Attribute)
        ctx = self._facts.context_of(test.func.value)
        flag = self._facts.sibling(test.func.value, self._facts.trigger)
        self._report.convert()
        reset = statements_of(f"{flag} = False\n")[0]
        body = updated.body.with_changes(body=[reset, *updated.body.body])
        code = f"faccel.agree({ctx}, trigger={flag}).trigger"
        return updated.with_changes(test=cst.parse_expression(code), body=body)

    def _set_trigger(self, target: object, call: cst.Call, ctx: str) -> str:
        self._report.convert()
        return f"{self._sibling('trigger')} = True\n"

    def _sibling(self, name: str) -> str:
        return self._facts.sibling(self._receiver, getattr(self._facts, name))

    def _save_state(
        self, target: cst.BaseExpression | None, call: cst.Call, ctx: str
    ) -> str | None:
        return self._state.save(call, ctx, self._sibling("scaler"), on_main=self.on_main > 0)

    def _load_state(
        self, target: cst.BaseExpression | None, call: cst.Call, ctx: str
    ) -> str | None:
        return self._state.load(call, ctx, self._sibling("scaler"))

    def _register(self, target: object, call: cst.Call, ctx: str) -> str:
        self._report.convert()
        return ""  # the state of `save` and `load` has what is registered

    def _clip(self, target: cst.BaseExpression | None, call: cst.Call, ctx: str) -> str:
        """A norm that is not that of one optimizer: PyTorch's function, after `unscale`."""
        assert isinstance(call.func, cst.Attribute)
        lines = self._unscale_lines(self._facts.of_kind("optimizer"), ctx)
        args = "".join(text_of(arg) for arg in call.args)
        clip = f"torch.nn.utils.{call.func.attr.value}({args})\n"
        if target is not None:
            clip = f"{text_of(target)} = {clip}"
        self._report.convert()
        self._report.note(
            "with sharded parameters, clip in `optimizer_step`; "
            "see docs/training-loop.md#gradients-between-backward-and-step"
        )
        return lines + clip

    def _unscale(self, target: object, call: cst.Call, ctx: str) -> str:
        optimizers = [text_of(arg.value) for arg in call.args]
        self._report.convert()
        return self._unscale_lines(optimizers or self._facts.of_kind("optimizer"), ctx)

    def _unscale_lines(self, optimizers: Sequence[str], ctx: str) -> str:
        scaler = self._sibling("scaler")
        lines = ""
        for optimizer in optimizers:
            lines += f"{scaler} = faccel.unscale({optimizer}, {scaler}, {ctx})\n"
        return lines

    def _free_memory(self, target: cst.BaseExpression | None, call: cst.Call, ctx: str) -> str:
        self._report.convert()
        lines: list[str] = []
        if target is not None:
            count = len(target.elements) if isinstance(target, cst.Tuple | cst.List) else 1
            lines.append(f"{text_of(target)} = {', '.join(['None'] * count)}\n")
        lines.append(f"faccel.parallel.free_memory({ctx})\n")
        return "".join(lines)

    # --- trackers

    def _init_trackers(self, target: object, call: cst.Call, ctx: str) -> str:
        options = arguments(call, ("project_name", "config", "init_kwargs"))
        args = [text_of(options["project_name"].value), ctx]
        args.append(f"trackers={self._creation.tracker_names()}")
        if "config" in options:
            args.append(f"config={text_of(options['config'].value)}")
        if "init_kwargs" in options:
            # Both have the arguments of each tracker by its name.
            args.append(f"options={text_of(options['init_kwargs'].value)}")
        self._report.convert()
        call_text = call_code("faccel.tracking.init_trackers", args)
        return f"{self._sibling('trackers')} = {call_text}\n"

    def _log(self, target: object, call: cst.Call, ctx: str) -> str | None:
        if "init_trackers" not in self._facts.members:
            return None
        options = arguments(call, ("values", "step", "log_kwargs"))
        if "step" in options:
            step = text_of(options["step"].value)
        else:
            step = next((name for name in _STEPS if name in self._facts.assigned), "")
            self._report.note("`log` needs `step=`; see docs/logging.md")
        if not step or "values" not in options:
            return None
        if "log_kwargs" in options:
            self._report.refuse("`log_kwargs`", "docs/logging.md")
        self._report.convert()
        args = [text_of(options["values"].value), self._sibling("trackers"), f"step={step}"]
        return call_code("faccel.tracking.log", args) + "\n"

    def _end_training(self, target: object, call: cst.Call, ctx: str) -> str:
        self._report.convert()
        lines = ""
        if "init_trackers" in self._facts.members:
            lines = f"faccel.tracking.finish({self._sibling('trackers')})\n"
        return f"{lines}faccel.shutdown({ctx})\n"
