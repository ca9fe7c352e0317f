"""What has to be known about a script before it is rewritten."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import attrs
import libcst as cst

from faccel.migration.rules import is_member
from faccel.migration.syntax import arguments, callee_name, names_in, nodes_of, text_of, variables_of

# Kinds of prepared objects, by the class or function that made them, or else by their names.
_BY_ORIGIN = (
    ("loader", re.compile(r"loader|^get_data")),
    ("scheduler", re.compile(r"sched|lr$|_warmup$|annealing")),
    ("optimizer", re.compile(r"optim|^adam|adamw|^sgd$|adafactor|rmsprop|^lion|adagrad")),
)
_BY_NAME = (
    ("loader", re.compile(r"loader|_dl$|^dl$|^dl_|dataset|_data$")),
    ("scheduler", re.compile(r"sched")),
    ("optimizer", re.compile(r"optim|^opt$|_opt$|^opt_")),
)
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
        accelerators: Names of variables that hold an accelerator.
        accelerator_attributes: Names of attributes that do, as in `self.accelerator`.
        functions: The functions and methods, by name.
        assigned: The values that are assigned to an expression, by its code.
        unpacked: Those of them that are assigned to several names at once.
        kinds: `"model"`, `"optimizer"`, `"loader"` or `"scheduler"`, by code.
        prepared: Code of what is prepared, in order.
        registered: Code of what is registered for checkpoints.
        members: The members of accelerators that the script uses.
        creation: The call that makes the accelerator, and its arguments.
        is_created: Whether the script makes the accelerator.
        loggers: The variables with a logger of accelerate.
        logger_name: Code of the name of the logger that is made before the context; "" for none.
        batch_sizes: The first batch size of functions that search one, by their names.
        counts: How often each name occurs.
        ctx: Name of the context in the new script; likewise the following.
    """

    names: set[str]
    attribute_names: set[str] = attrs.field(factory=set)
    imported: dict[str, str] = attrs.field(factory=dict)
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
            return node.attr.value in self.accelerator_attributes
        return False

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
        if isinstance(receiver, cst.Attribute):
            return f"{text_of(receiver.value)}.{self.ctx}"
        return self.ctx

    def sibling(self, receiver: cst.CSTNode, name: str) -> str:
        """Return the code of a value that is stored beside the accelerator: `self.scaler`."""
        if isinstance(receiver, cst.Attribute):
            return f"{text_of(receiver.value)}.{name}"
        return name

    def of_kind(self, kind: str) -> list[str]:
        """Return the code of the prepared objects of a kind."""
        return [code for code in self.prepared if self.kinds[code] == kind]

    @property
    def default_context(self) -> str:
        """The code of the context in a function of accelerate, which names no accelerator."""
        return f"self.{self.ctx}" if not self.accelerators else self.ctx

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
        if "gradient_accumulation_plugin" in self.creation:
            return True
        steps = self.creation.get("gradient_accumulation_steps")
        return steps is not None and text_of(steps.value) != "1"

    def models_of(self, optimizer: str) -> list[str]:
        """Return the models whose parameters an optimizer has, by the code that makes it."""
        models = self.of_kind("model")
        if len(models) <= 1:
            return models
        used = self._names_behind(optimizer)
        matches = [model for model in models if model in used]
        return matches or models[:1]

    def optimizer_of(self, scheduler: str) -> str:
        """Return the optimizer that a scheduler was made for; "" if the code does not show it."""
        used = self._names_behind(scheduler, depth=1)
        for optimizer in self.of_kind("optimizer"):
            if optimizer in used:
                return optimizer
        return ""

    def _names_behind(self, code: str, depth: int = 4) -> set[str]:
        """Return what an assigned value is made from, through other variables."""
        used: set[str] = set()
        for value in self.assigned.get(code, ()):
            for node in nodes_of(value):
                if isinstance(node, cst.Name | cst.Attribute):
                    used.add(text_of(node))
        if depth > 1:
            for name in tuple(used):
                used |= self._names_behind(name, depth - 1) if name != code else set()
        return used


def read_facts(module: cst.Module) -> Facts:
    """Return the facts about a script.

    Effects: pure.
    """
    nodes = list(nodes_of(module))
    facts = Facts(set(variables_of(module, into_functions=True)))
    facts.attribute_names = {node.attr.value for node in nodes if isinstance(node, cst.Attribute)}
    facts.counts = Counter(node.value for node in nodes if isinstance(node, cst.Name))
    for node in nodes:
        _read_definitions(node, facts)
    # Until nothing is added: an accelerator passes through functions and attributes.
    size = -1
    while size != len(facts.accelerators) + len(facts.accelerator_attributes):
        size = len(facts.accelerators) + len(facts.accelerator_attributes)
        for node in nodes:
            _read_accelerators(node, facts)
    for node in nodes:
        _read_uses(node, facts)
    for node in nodes:
        _pass_kinds(node, facts)
    _choose_names(facts)
    return facts


def _read_definitions(node: cst.CSTNode, facts: Facts) -> None:
    if isinstance(node, cst.FunctionDef):
        facts.functions.setdefault(node.name.value, node)
        start = starting_batch_size(node, facts)
        if start is not None:
            facts.batch_sizes[node.name.value] = start
    if isinstance(node, cst.ClassDef):
        for statement in node.body.body:
            # A class is called by its name, with the parameters of `__init__`.
            if isinstance(statement, cst.FunctionDef) and statement.name.value == "__init__":
                facts.functions[node.name.value] = statement
    if isinstance(node, cst.ImportFrom) and node.module is not None:
        _read_import_from(node, text_of(node.module), facts)
    if isinstance(node, cst.Import):
        for alias in node.names:
            if text_of(alias.name).partition(".")[0] == "accelerate":
                name = alias.asname.name if alias.asname else alias.name
                facts.imported[text_of(name).partition(".")[0]] = "*module"
    for target, value in assignments(node):
        facts.assigned.setdefault(text_of(target), []).append(value)
        if facts.accelerate_name(getattr(value, "func", value)) == "get_logger":
            facts.loggers.add(text_of(target))
        if isinstance(node, cst.Assign) and value is node.value and not is_single(node):
            facts.unpacked.add(value)


def is_single(node: cst.Assign) -> bool:
    """Return whether an assignment has one target, which is no tuple.

    Effects: pure.
    """
    return len(node.targets) == 1 and not isinstance(node.targets[0].target, cst.Tuple | cst.List)


def starting_batch_size(node: cst.FunctionDef, facts: Facts) -> str | None:
    """Return the code of the first size of `@find_executable_batch_size(...)`, None without it.

    Effects: pure.
    """
    for decorator in node.decorators:
        call = decorator.decorator
        if not isinstance(call, cst.Call):
            continue
        if facts.accelerate_name(call.func) == "find_executable_batch_size":
            start = arguments(call, ("function", "starting_batch_size")).get("starting_batch_size")
            return "128" if start is None else text_of(start.value)
    return None


def _read_import_from(node: cst.ImportFrom, module: str, facts: Facts) -> None:
    if module.partition(".")[0] != "accelerate" or isinstance(node.names, cst.ImportStar):
        return
    for alias in node.names:
        local = alias.asname.name if alias.asname else alias.name
        facts.imported[text_of(local)] = text_of(alias.name)


def assignments(node: cst.CSTNode) -> Iterator[tuple[cst.BaseExpression, cst.BaseExpression]]:
    """Yield `(target, value)` of an assignment; each target of a tuple, with its own value.

    Effects: pure.
    """
    if isinstance(node, cst.AnnAssign) and node.value is not None:
        yield node.target, node.value
    if not isinstance(node, cst.Assign):
        return
    for assign_target in node.targets:
        target, value = assign_target.target, node.value
        if not isinstance(target, cst.Tuple | cst.List):
            yield target, value
            continue
        values: Sequence[cst.BaseExpression] = [value] * len(target.elements)
        if isinstance(value, cst.Tuple) and len(value.elements) == len(target.elements):
            values = [element.value for element in value.elements]
        for element, element_value in zip(target.elements, values, strict=True):
            yield element.value, element_value


def _read_accelerators(node: cst.CSTNode, facts: Facts) -> None:
    # `accelerator.backward(...)` shows what it is, also in a file without the constructor.
    if isinstance(node, cst.Attribute) and is_member(node.attr.value):
        if text_of(node.value) == "accelerator":
            facts.accelerators.add("accelerator")
        elif isinstance(node.value, cst.Attribute) and node.value.attr.value == "accelerator":
            facts.accelerator_attributes.add("accelerator")
    if isinstance(node, cst.Param) and node.annotation is not None:
        annotation = names_in(node.annotation.annotation)
        if any(facts.imported.get(name) == "Accelerator" for name in annotation):
            facts.accelerators.add(node.name.value)
    for target, value in assignments(node):
        if _makes_accelerator(value, facts):
            _add_accelerator(target, facts)
    if isinstance(node, cst.Call):
        for param, arg in arguments_of_function(node, facts):
            if facts.is_accelerator(arg.value):
                facts.accelerators.add(param)


def _makes_accelerator(value: cst.BaseExpression, facts: Facts) -> bool:
    if facts.is_accelerator(value):
        return True
    if not isinstance(value, cst.Call):
        return False
    if facts.accelerate_name(value.func) == "Accelerator":
        return True
    function = facts.functions.get(callee_name(value))
    if function is None:
        return False
    for node in nodes_of(function.body, into_functions=False):
        if isinstance(node, cst.Return) and node.value is not None:
            made = facts.is_accelerator(node.value)
            if made or facts.accelerate_name(getattr(node.value, "func", node)) == "Accelerator":
                return True
    return False


def _add_accelerator(target: cst.BaseExpression, facts: Facts) -> None:
    if isinstance(target, cst.Name):
        facts.accelerators.add(target.value)
    if isinstance(target, cst.Attribute):
        facts.accelerator_attributes.add(target.attr.value)


def arguments_of_function(call: cst.Call, facts: Facts) -> Iterator[tuple[str, cst.Arg]]:
    """Yield `(parameter, argument)` of a call of a function of this script.

    Effects: pure.
    """
    function = facts.functions.get(callee_name(call))
    if function is None:
        return
    params = [param.name.value for param in function.params.params]
    if params[:1] == ["self"]:
        params = params[1:]
    for param, arg in arguments(call, params).items():
        if not param.startswith("*"):
            yield param, arg


def _read_uses(node: cst.CSTNode, facts: Facts) -> None:
    member = facts.member(node)
    if member:
        facts.members.add(member)
    if not isinstance(node, cst.Call):
        if isinstance(node, cst.Assign):
            _read_prepare(node, facts)
        return
    if facts.accelerate_name(node.func) == "Accelerator":
        # A script may create it in two branches, with other arguments.
        params = ("device_placement", "split_batches", "mixed_precision")
        facts.creation = {**facts.creation, **arguments(node, params)}
        facts.is_created = True
    if facts.member_call(node) == "register_for_checkpointing":
        for arg in node.args:
            if not arg.star:
                facts.registered.append(text_of(arg.value))


def _read_prepare(node: cst.Assign, facts: Facts) -> None:
    value = node.value
    name = facts.member_call(value)
    if name not in PREPARE or len(node.targets) != 1 or not isinstance(value, cst.Call):
        return
    for target, arg in prepare_pairs(node.targets[0].target, value):
        code = text_of(target)
        kind = PREPARE[name] or _kind_of(text_of(arg), facts)
        facts.kinds[code] = kind
        if code not in facts.prepared:
            facts.prepared.append(code)


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
    targets = [target]
    if isinstance(target, cst.Tuple | cst.List):
        targets = [element.value for element in target.elements]
    if len(targets) != len(args):
        return []
    return list(zip(targets, args, strict=True))


def _kind_of(code: str, facts: Facts) -> str:
    name = code.rpartition(".")[2].lower()
    for kind, pattern in _BY_NAME:
        if pattern.search(name):
            return kind
    for value in facts.assigned.get(code, ()):
        origin = callee_name(value).lower()
        # A function that returns several objects shows the kind of none of them.
        if origin in PREPARE or value in facts.unpacked:
            continue
        for kind, pattern in _BY_ORIGIN:
            if pattern.search(origin):
                return kind
    return "model"


def _pass_kinds(node: cst.CSTNode, facts: Facts) -> None:
    """Functions of the script that get a prepared object have it under another name."""
    if isinstance(node, cst.Call):
        for param, arg in arguments_of_function(node, facts):
            kind = facts.kinds.get(text_of(arg.value))
            if kind is not None:
                facts.kinds.setdefault(param, kind)
    for target, value in assignments(node):
        kind = facts.kinds.get(text_of(value))
        if kind is not None:
            facts.kinds.setdefault(text_of(target), kind)


def _choose_names(facts: Facts) -> None:
    """Choose names for the new variables that the script does not use."""
    names = facts.names - facts.accelerators
    if facts.accelerator_attributes:
        # They become attributes, too: `self.scaler`.
        names = names | facts.attribute_names - facts.accelerator_attributes
    choices = {
        "ctx": "faccel_ctx",
        "scaler": "loss_scaler",
        "info": "step_info",
        "micro": "micro_batch",
        "record": "batch_record",
        "trackers": "faccel_trackers",
        "trigger": "is_triggered",
    }
    for name, other in choices.items():
        if name in names - facts.members:
            setattr(facts, name, other)
