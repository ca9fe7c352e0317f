"""`prepare`, `save_state` and `load_state`: what a script prepares, and the state made of it."""

from __future__ import annotations

import libcst as cst

from faccel.migration.creation import Creation
from faccel.migration.facts import PREPARE, Facts
from faccel.migration.report import Report
from faccel.migration.syntax import arguments, prepare_pairs, text_of

_ORDER = ("model", "optimizer", "loader", "scheduler", "")


class StateRewriter:
    """Rewrites the calls that prepare, save and load the objects of a script.

    Args:
        facts: About the script.
        report: Counts.
        creation: The arguments of `Accelerator`.
    """

    def __init__(self, facts: Facts, report: Report, creation: Creation) -> None:
        self._facts = facts
        self._report = report
        self._creation = creation
        # The models of the `prepare` that is being rewritten.
        self._together: list[str] = []

    def prepare(self, target: cst.BaseExpression, call: cst.Call, ctx: str) -> str | None:
        """Return the lines for `target = accelerator.prepare(...)`; None for other forms."""
        assert isinstance(call.func, cst.Attribute)
        pairs = prepare_pairs(target, call)
        if not pairs:
            return None
        self._refuse_options(call)
        lines: list[str] = []
        method = call.func.attr.value
        names = [text_of(name) for name, _ in pairs]
        self._together = [name for name in names if self._kind(method, name) == "model"]
        for name in names:
            if not self._kind(method, name):
                what = f"what `{name}` is: `faccel.wrap` takes models, `faccel.shard` loaders"
                self._report.refuse(what, "docs/training-loop.md#models-and-optimizers")
        # Models first: an optimizer is connected to the wrapped one.
        for kind in _ORDER:
            for name, value in pairs:
                if self._kind(method, text_of(name)) == kind:
                    lines += self._prepared(kind, text_of(name), text_of(value), ctx)
        self._report.convert()
        return "\n".join(lines) + "\n" if lines else ""

    def _kind(self, method: str, code: str) -> str:
        return PREPARE[method] or self._facts.kinds.get(code, "")

    def _refuse_options(self, call: cst.Call) -> None:
        for arg in call.args:
            # A frozen model is not communicated, as with `evaluation_mode=True`.
            if arg.keyword is not None and arg.keyword.value != "evaluation_mode":
                self._report.refuse(f"`{arg.keyword.value}` of `prepare`", "docs/training-loop.md")

    def _prepared(self, kind: str, name: str, value: str, ctx: str) -> list[str]:
        if kind == "model":
            return [f"{name} = faccel.wrap({value}, {ctx}{self._creation.plan_argument()})"]
        if kind == "loader":
            options = self._creation.loader_arguments()
            return [f"{name} = faccel.shard({value}, {ctx}{options})"]
        if kind == "optimizer":
            return self._optimizer(name, value, ctx)
        if not kind:
            return [f"{name} = {ctx}.prepare({value})"]  # raises, and has a note
        return [] if name == value else [f"{name} = {value}"]

    def _optimizer(self, name: str, value: str, ctx: str) -> list[str]:
        lines: list[str] = []
        models = self._facts.models_of(name) or self._facts.models_of(value)
        # Another branch may prepare further models with the same optimizer.
        together = [model for model in models if model in self._together]
        models = together or models
        if len(self._together) == 1:
            models = models or self._together
        if not models:
            self._report.refuse(f"the model of `{name}` is unknown", "docs/training-loop.md")
            models = ["model"]
        for model in models:
            lines.append(f"{name} = faccel.wrap_optimizer({value}, {model}, {ctx})")
            value = name
        return lines

    def prepared_expression(self, method: str, call: cst.Call, ctx: str) -> str | None:
        """Return the expression for `prepare(x)` inside of another expression."""
        if len(call.args) != 1 or call.args[0].star:
            return None
        value = text_of(call.args[0].value)
        kind = PREPARE[method] or self._facts.kinds.get(value, "")
        if kind == "model":
            return f"faccel.wrap({value}, {ctx}{self._creation.plan_argument()})"
        if kind == "loader":
            return f"faccel.shard({value}, {ctx}{self._creation.loader_arguments()})"
        return None

    def save(self, call: cst.Call, ctx: str, scaler: str, *, on_main: bool) -> str | None:
        """Return the line for `save_state(folder)`; None without a folder.

        With `on_main` the line runs on the main process only.
        """
        options = arguments(call, ("output_dir", "safe_serialization"))
        state = self._state(ctx, scaler)
        if "output_dir" not in options or not state:
            return None
        folder = text_of(options["output_dir"].value)
        self._report.convert()
        if on_main:
            self._report.note(
                "every rank must call `save`: move it out of `if ctx.is_main`; "
                "see docs/checkpoints.md#what-a-state-may-contain"
            )
        # Accelerate replaces what the folder has.
        return (
            f"faccel.save(\n    {state},\n    {folder},\n    {ctx},\n    step=0,\n"
            "    overwrite=True,\n)\n"
        )

    def load(self, call: cst.Call, ctx: str, scaler: str) -> str | None:
        """Return the lines for `load_state(folder)`; None without a folder."""
        options = arguments(call, ("input_dir", "load_kwargs"))
        state = self._state(ctx, scaler)
        if "input_dir" not in options or not state:
            return None
        folder = text_of(options["input_dir"].value)
        name = "state" if "state" not in self._facts.names else "faccel_state"
        self._report.convert()
        return (
            f"{name} = faccel.load(\n    {state},\n    {folder},\n    {ctx},\n)\n"
            f'{scaler} = {name}["scaler"]\n'
            f'faccel.set_rng_state({name}["rng"])\n'
        )

    def _state(self, ctx: str, scaler: str) -> str:
        """Return the code of the state: what is prepared and registered; "" if that is unknown."""
        entries: dict[str, str] = {}
        for kind in ("model", "optimizer", "scheduler"):
            for code in self._facts.of_kind(kind):
                entries[_key(code)] = code
        if not entries:
            return ""
        for code in self._facts.registered:
            entries[_key(code)] = code
        entries["scaler"] = scaler
        entries["rng"] = f"faccel.rng_state({ctx})"
        lines = [f'        "{key}": {code},' for key, code in entries.items()]
        return "{\n" + "\n".join(lines) + "\n    }"


def _key(code: str) -> str:
    """Return the key of an expression in the state: `self.net.model` is `net_model`."""
    key = code.removeprefix("self.")
    return "".join(char if char.isalnum() else "_" for char in key)
