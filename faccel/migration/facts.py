"""What has to be known about a script before it is rewritten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs
import libcst as cst

from faccel.migration.rules import DISTINCTIVE
from faccel.migration.syntax import arguments, callee_name, elements_of, nodes_of, text_of

# `PartialState` has the members of an accelerator that concern processes.
CONSTRUCTORS = ("Accelerator", "AcceleratorState", "PartialState")
# What prepares objects, and their kind; "" for those that prepare objects of several kinds.
PREPARE = {
    "prepare": "",
    "prepare_data_loader": "loader",
    "prepare_model": "model",
    "prepare_optimizer": "optimizer",
    "prepare_scheduler": "scheduler",
}


@attrs.define(eq=False)
class Facts:
    """The accelerators, prepared objects and names of one script.

    Args:
        names: All variables.
        attribute_names: All attributes.
        imported: Local names of what is imported from accelerate, and its name there.
        imported_elsewhere: Local names of what is imported from other modules.
        accelerators: Names of variables that hold an accelerator.
        accelerator_attributes: Names of attributes that do, as in `self.accelerator`.
        functions: The functions and methods, by name.
        assigned: The values that are assigned to an expression, by its code.
        unpacked: Those of them that are assigned to several names at once.
        kinds: `"model"`, `"optimizer"`, `"loader"`, `"scheduler"` or "" for unknown, by code.
        prepared: Code of what is prepared, in order.
        registered: Code of what is registered for checkpoints.
        members: The members of accelerators that the script uses.
        creation: The call that makes the accelerator, and its arguments.
        is_created: Whether the script makes the accelerator.
        loggers: The variables with a logger of accelerate.
        logger_name: Code of the name of the logger that is made before the context; "" for none.
        batch_sizes: The first batch size of functions that search one, by their names.
        repeated: The functions that run several times, as far as the script shows.
        counts: How often each name occurs.
        ctx: Name of the context in the new script; likewise the following.
    """

    names: set[str]
    attribute_names: set[str] = attrs.field(factory=set)
    imported: dict[str, str] = attrs.field(factory=dict)
    imported_elsewhere: set[str] = attrs.field(factory=set)
    accelerators: set[str] = attrs.field(factory=set)
    accelerator_attributes: set[str] = attrs.field(factory=set)
    functions: dict[str, cst.FunctionDef] = attrs.field(factory=dict)
    assigned: dict[str, list[cst.BaseExpression]] = attrs.field(factory=dict)
    unpacked: set[cst.BaseExpression] = attrs.field(factory=set)
    kinds: dict[str, str] = attrs.field(factory=dict)
    prepared: list[str] = attrs.field(factory=list)
    registered: list[str] = attrs.field(factory=list)
    members: set[str] = attrs.field(factory=set)
    creation: Mapping[str, cst.Arg] = attrs.field(factory=dict)
    is_created: bool = False
    loggers: set[str] = attrs.field(factory=set)
    logger_name: str = ""
    batch_sizes: dict[str, str] = attrs.field(factory=dict)
    repeated: set[str] = attrs.field(factory=set)
    counts: Mapping[str, int] = attrs.field(factory=dict)
    ctx: str = "ctx"
    scaler: str = "scaler"
    info: str = "info"
    micro: str = "micro"
    record: str = "record"
    trackers: str = "trackers"
    trigger: str = "trigger"

    def accelerate_name(self, node: cst.CSTNode) -> str:
        """Return the name in accelerate of an imported function or class; "" for others."""
        code = text_of(node)
        if code in self.imported:
            return self.imported[code]
        root, _, last = code.rpartition(".")
        if root and root.partition(".")[0] in self.imported:
            return last if self.imported[root.partition(".")[0]] == "*module" else ""
        return ""

    def is_accelerator(self, node: cst.CSTNode) -> bool:
        """Return whether an expression holds an accelerator."""
        if isinstance(node, cst.Name):
            return node.value in self.accelerators
        if isinstance(node, cst.Attribute):
            # `accelerator.state` has the members that concern processes, too.
            is_state = node.attr.value == "state" and self.is_accelerator(node.value)
            return is_state or node.attr.value in self.accelerator_attributes
        # `PartialState().is_main_process`
        if isinstance(node, cst.Call) and not node.args:
            return self.accelerate_name(node.func) in CONSTRUCTORS
        return False

    def may_be_accelerator(self, node: cst.Attribute) -> bool:
        """Return whether a member that hardly anything else has shows an accelerator."""
        root = text_of(node.value).partition(".")[0]
        is_object = text_of(node.value) not in ("self", "cls", "super()")
        # `utils.is_main_process()` is a function of another module.
        is_module = root in self.imported or root in self.imported_elsewhere
        uses_accelerate = bool(self.imported or self.accelerators)
        return uses_accelerate and node.attr.value in DISTINCTIVE and is_object and not is_module

    def member(self, node: cst.CSTNode) -> str:
        """Return the member that an attribute of an accelerator names; "" for other nodes."""
        if isinstance(node, cst.Attribute) and self.is_accelerator(node.value):
            return node.attr.value
        return ""

    def member_call(self, node: cst.CSTNode) -> str:
        """Return the member that a call of an accelerator's method names; "" for other nodes."""
        return self.member(node.func) if isinstance(node, cst.Call) else ""

    def context_of(self, receiver: cst.CSTNode) -> str:
        """Return the code of the context that replaces an accelerator."""
        if isinstance(receiver, cst.Attribute) and self.member(receiver) == "state":
            return self.context_of(receiver.value)
        if isinstance(receiver, cst.Attribute):
            return f"{text_of(receiver.value)}.{self.ctx}"
        if isinstance(receiver, cst.Call):
            return "faccel.init()"
        return self.ctx

    def sibling(self, receiver: cst.CSTNode, name: str) -> str:
        """Return the code of a value that is stored beside the accelerator: `self.scaler`."""
        if isinstance(receiver, cst.Attribute):
            return f"{text_of(receiver.value)}.{name}"
        return name

    def of_kind(self, kind: str) -> list[str]:
        """Return the code of the prepared objects of a kind."""
        return [code for code in self.prepared if self.kinds[code] == kind]

    def is_used_up(self, target: cst.BaseExpression, call: cst.Call) -> bool:
        """Return whether a variable has a record that only the constructor reads."""
        name = self.accelerate_name(call.func)
        is_record = name.endswith(("Kwargs", "Plugin", "Configuration"))
        return is_record and isinstance(target, cst.Name) and self.counts[target.value] == 2

    def has_kind(self, code: str, kind: str) -> bool:
        """Return whether an expression is a prepared object of a kind."""
        return self.kinds.get(code) == kind

    @property
    def accumulates(self) -> bool:
        """Whether a backward divides its loss by a number other than 1, as far as is known."""
        if "accumulate" in self.members or not self.is_created:
            return True
        return self.has_steps

    @property
    def has_steps(self) -> bool:
        """Whether an update may have several micro-batches, by the arguments of the constructor."""
        if "gradient_accumulation_plugin" in self.creation:
            return True
        if any(name.startswith("*") for name in self.creation):
            return True
        if any(code.endswith(".gradient_accumulation_steps") for code in self.assigned):
            return True
        steps = self.creation.get("gradient_accumulation_steps")
        return steps is not None and text_of(steps.value) != "1"

    def models_of(self, optimizer: str) -> list[str]:
        """Return the models whose parameters an optimizer has, by the code that makes it."""
        models = self.of_kind("model")
        if len(models) <= 1:
            return models
        used = self._names_used_by(optimizer)
        matches = [model for model in models if model in used]
        return matches

    def optimizer_of(self, scheduler: str) -> str:
        """Return the optimizer that a scheduler was made for; "" if the code does not show it."""
        used = self._names_used_by(scheduler, depth=1)
        for optimizer in self.of_kind("optimizer"):
            if optimizer in used:
                return optimizer
        return ""

    def _names_used_by(self, code: str, depth: int = 4) -> set[str]:
        """Return what an assigned value is made from, through other variables."""
        used: set[str] = set()
        for value in self.assigned.get(code, ()):
            # `prepare` gets objects that have nothing to do with each other.
            if self.member_call(value) in PREPARE:
                continue
            for node in nodes_of(value):
                if isinstance(node, cst.Name | cst.Attribute):
                    used.add(text_of(node))
        if depth > 1:
            for name in tuple(used):
                used |= self._names_used_by(name, depth - 1) if name != code else set()
        return used


def makes_accelerator(value: cst.BaseExpression, facts: Facts) -> bool:
    """Return whether the value of an expression is an accelerator.

    Effects: pure.
    """
    if facts.is_accelerator(value):
        return True
    # `Accelerator(...) if args.with_tracking else Accelerator()`
    if isinstance(value, cst.IfExp):
        return makes_accelerator(value.body, facts) or makes_accelerator(value.orelse, facts)
    if not isinstance(value, cst.Call):
        return False
    is_constructor = facts.accelerate_name(value.func) in CONSTRUCTORS
    return is_constructor or _returns_accelerator(callee_name(value), facts)


def _returns_accelerator(name: str, facts: Facts) -> bool:
    """Return whether a function of the script returns an accelerator that it makes or gets."""
    function = facts.functions.get(name)
    if function is None:
        return False
    for node in nodes_of(function.body, into_functions=False):
        if not isinstance(node, cst.Return) or node.value is None:
            continue
        # Not `makes_accelerator`, which would not end for a function that calls itself.
        callee = getattr(node.value, "func", node)
        if facts.is_accelerator(node.value) or facts.accelerate_name(callee) in CONSTRUCTORS:
            return True
    return False


def results_of_function(
    node: cst.CSTNode, facts: Facts
) -> Iterator[tuple[cst.BaseExpression, cst.BaseExpression]]:
    """Yield `(target, result)` for `a, b = f()`, where the function `f` ends with `return x, y`.

    Effects: pure.
    """
    if not isinstance(node, cst.Assign) or len(node.targets) != 1:
        return
    function = facts.functions.get(callee_name(node.value))
    if function is None:
        return
    targets = elements_of(node.targets[0].target)
    results: list[cst.BaseExpression] = []
    for child in nodes_of(function.body, into_functions=False):
        if isinstance(child, cst.Return) and child.value is not None:
            results = elements_of(child.value)
    if len(targets) == len(results):
        yield from zip(targets, results, strict=True)


def arguments_of_function(call: cst.Call, facts: Facts) -> Iterator[tuple[str, cst.Arg]]:
    """Yield `(parameter, argument)` of a call of a function of this script.

    Effects: pure.
    """
    function = facts.functions.get(callee_name(call))
    # A function of another module may have the same name and other parameters.
    owner = text_of(call.func).rpartition(".")[0]
    if function is None or owner not in ("", "self", "cls", "super()"):
        return
    params = [param.name.value for param in function.params.params]
    if params[:1] == ["self"]:
        params = params[1:]
    for param, arg in arguments(call, params).items():
        if not param.startswith("*"):
            yield param, arg
