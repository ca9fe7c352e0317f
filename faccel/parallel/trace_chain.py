"""Whether the forward of a model is a chain of modules, found by a symbolic trace.

A trace needs no inputs and no memory, so it works for a model on the meta device, too.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from faccel.errors import short_repr


class _ChainTracer(fx.Tracer):
    """Records calls of the modules of a chain, without looking into them.

    Args:
        chain: Their names.
    """

    def __init__(self, chain: Sequence[str]) -> None:
        super().__init__()
        self._chain = frozenset(chain)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Modules without children that are not in the chain, such as losses, are in the trace, too.
        is_leaf = next(m.children(), None) is None
        return module_qualified_name in self._chain or is_leaf


def why_not_chain(module: nn.Module, chain: Sequence[str]) -> str | None:
    """Return why `module.forward` does not run `chain`, or None if it does.

    Effects: pure.

    Args:
        module: The model.
        chain: Names of its modules. Forward must pass its arguments to the first one, the output of
            each one to the next, and return the output of the last one.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> why_not_chain(net, ["0", "1"])
        >>> why_not_chain(net, ["1", "0"])
        '`1` takes other inputs than the arguments of the model'
    """
    # Optional arguments keep their defaults, because the branches of forward depend on them.
    num_inputs = max(1, _num_required(module))
    if num_inputs not in _FORWARDS:
        return f"forward has {num_inputs} required arguments, and a pipeline takes the batch"
    # A module around it, because a trace of `module` itself would ask for all arguments.
    root_class = type("Root", (nn.Module,), {"forward": _FORWARDS[num_inputs]})
    root = root_class()
    root.model = module
    prefixed = [f"model.{name}" for name in chain]
    try:
        graph = _ChainTracer(prefixed).trace(root)
    except Exception as error:  # of any class: a trace runs the user's code with proxies
        lines = str(error).splitlines() or [type(error).__name__]
        return f"forward cannot be traced ({lines[0][:200]})"
    return _first_difference(module, graph, chain)


# A trace takes the number of inputs from the signature.
_FORWARDS: Mapping[int, Callable[..., Any]] = {
    1: lambda self, a: self.model(a),
    2: lambda self, a, b: self.model(a, b),
    3: lambda self, a, b, c: self.model(a, b, c),
}


def _num_required(module: nn.Module) -> int:
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind in kinds]
    return len(required)


def _first_difference(module: nn.Module, graph: fx.Graph, chain: Sequence[str]) -> str | None:
    calls: dict[str, list[fx.Node]] = {name: [] for name in chain}
    for node in graph.nodes:
        if node.op == "call_module":
            name = str(node.target).removeprefix("model.")
            calls.setdefault(name, []).append(node)
    previous: fx.Node | None = None
    for name in chain:
        nodes = calls[name]
        if len(nodes) != 1:
            return f"forward calls `{name}` {len(nodes)} times"
        reason = _unexpected_input(name, module.get_submodule(name), nodes[0], previous)
        if reason:
            return reason
        (previous,) = nodes
    output = next(node for node in graph.nodes if node.op == "output")
    if output.args[0] is not previous:
        return f"forward returns something else than the output of `{chain[-1]}`"
    return None


def _unexpected_input(
    name: str, module: nn.Module, node: fx.Node, previous: fx.Node | None
) -> str | None:
    """Return why a call is not the next one of the chain, or None if it is."""
    # A stage calls its modules without options.
    for option, value in _constants(module, node).items():
        return f"`{name}` is called with {option}={short_repr(value)}"
    if previous is None:
        if any(input_node.op != "placeholder" for input_node in node.all_input_nodes):
            return f"`{name}` takes other inputs than the arguments of the model"
    elif not _takes_output(node, previous):
        previous_name = str(previous.target).removeprefix("model.")
        return f"`{name}` takes other inputs than the output of `{previous_name}`"
    return None


def _constants(module: nn.Module, node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call that are no tensors, and not the defaults of the module."""
    signature = inspect.signature(module.forward)
    constants: dict[str, Any] = {}
    for name, value in signature.bind(*node.args, **node.kwargs).arguments.items():
        is_plain = isinstance(value, None | bool | int | float | str)
        if is_plain and value != signature.parameters[name].default:
            constants[name] = value
    return constants


def _takes_output(node: fx.Node, previous: fx.Node) -> bool:
    """Whether a call takes what an earlier one has returned: a tensor, or each item of a tuple."""
    if any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return False
    inputs = [arg for arg in node.args if isinstance(arg, fx.Node)]
    if inputs == [previous]:
        return True
    for index, arg in enumerate(inputs):
        if arg.target is not operator.getitem or arg.args != (previous, index):
            return False
    return bool(inputs)
