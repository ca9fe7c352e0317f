"""Compilation of the units of a model, or of all of it, in place, under the user's names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from faccel.errors import ModelError
from faccel.parallel.recompilations import start_counting
from faccel.plan import Compile, Plan
from faccel.tree import Tree


def apply_compile(module: nn.Module, units: Mapping[str, nn.Module], plan: Plan) -> None:
    """Compile the units or the whole model, in place. Updates the modules.

    The compilation itself happens in the first forward, which raises a `ModelError` if the compiler
    has compiled nothing.
    """
    if plan.compile is None:
        return
    start_counting()
    arguments = _arguments(plan.compile)
    options = plan.activation_checkpoint
    if options is not None and options.memory_budget is not None:
        arguments["backend"] = _inductor_with_budget(options.memory_budget)
    targets = _targets(module, units, plan.compile.what)
    if not targets:
        return  # a stage of a pipeline without units; the other stages have some
    # By class: one graph serves all units of a class.
    frames: dict[type[nn.Module], FunctionType] = {}
    for target in targets.values():
        if not _is_skipped(target):
            target.compile(**arguments)
            continue
        # A new code object for each class: the number of graphs for one is limited.
        frame = FunctionType(_forward.__code__.replace(), globals())
        frame = frames.setdefault(type(target), frame)
        # In place of `forward`, not of `__call__`: the hooks of FSDP2 must stay outside of the
        # graph. A method, so that a deep copy of the module computes with its own parameters.
        target.forward = MethodType(torch.compile(frame, **arguments), target)
    _FirstForward(plan.compile.what, targets).watch(module)


def _arguments(options: Compile) -> dict[str, Any]:
    """Return the arguments of `torch.compile`."""
    arguments = attrs.asdict(options, recurse=False)
    del arguments["what"]
    if options.options is not None:
        arguments["options"] = dict(options.options)
    return arguments


def _targets(
    module: nn.Module, units: Mapping[str, nn.Module], compiled: str
) -> dict[str, nn.Module]:
    """Return the modules to compile, by name."""
    if compiled == "units":
        return dict(units)
    # The hooks of FSDP2 break the graph of the whole model at each unit. Dynamo then begins a new
    # one at the unit's `forward`, unless it skips that.
    skipped = {name: unit for name, unit in units.items() if _is_skipped(unit)}
    return {type(module).__name__: module, **skipped}


def _is_skipped(module: nn.Module) -> bool:
    """Whether Dynamo compiles nothing if it begins with `forward` of the module.

    It skips the functions of PyTorch's files, such as `forward` of `nn.TransformerEncoderLayer`,
    unless another function calls them: it inlines them there.
    """
    from torch._dynamo import trace_rules  # takes a second to import

    return "forward" not in vars(module) and trace_rules.check(type(module).forward)


def _forward(module: nn.Module, *args: Tree, **kwargs: Tree) -> Tree:
    """Call `forward` from a function that Dynamo does not skip."""
    return type(module).forward(module, *args, **kwargs)


@attrs.frozen(eq=False)
class _FirstForward:
    """Raises after the first forward of a model if the compiler has compiled nothing.

    Args:
        compiled: What the plan compiles.
        targets: The compiled modules by name.
        handles: Of the hooks that call this record.
        num_graphs: The number of graphs of the process before the forward; empty outside of it.
    """

    compiled: str
    targets: Mapping[str, nn.Module]
    handles: list[RemovableHandle] = attrs.field(factory=list)
    num_graphs: list[int] = attrs.field(factory=list)

    def watch(self, module: nn.Module) -> None:
        """Register hooks of `module`, which the first forward removes."""
        # Dynamo must not trace the hooks themselves.
        before: Any = torch.compiler.disable(self._before_forward)
        after: Any = torch.compiler.disable(self._after_forward)
        self.handles.append(module.register_forward_pre_hook(before))
        self.handles.append(module.register_forward_hook(after))

    def _before_forward(self, module: nn.Module, args: Tree) -> None:
        # A forward that has raised has left its number.
        self.num_graphs[:] = [_num_graphs()]

    def _after_forward(self, module: nn.Module, args: Tree, output: Tree) -> None:
        if _is_turned_off():
            return
        for handle in self.handles:
            handle.remove()
        is_compiled = _num_graphs() > self.num_graphs[0]
        # An earlier model of the same classes may have compiled the graphs.
        if is_compiled or any(map(_has_graph, self.targets.values())):
            return
        names = [f"`{name}` ({type(target).__name__})" for name, target in self.targets.items()]
        if len(names) > 3:
            names[2:] = [f"{len(names) - 2} more"]
        raise ModelError(
            f'`compile="{self.compiled}"` has compiled nothing in the first forward',
            got=f"0 graphs of {', '.join(names)}",
            fix="write `compile=None`, or run with `TORCH_LOGS=+dynamo`, which logs why each "
            "function is skipped",
        )


def _num_graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _has_graph(module: nn.Module) -> bool:
    """Whether Dynamo has a graph that begins in `forward` of the class."""
    from torch._dynamo import eval_frame

    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None:
        return False
    entries = eval_frame._debug_get_cache_entry_list(code)  # pyright: ignore[reportPrivateUsage]
    for entry in entries:
        # Code without a graph is stored, too: that of a function which only calls skipped ones.
        for name in entry.code.co_names:
            if name.startswith("__compiled_fn"):
                return True
    return False


def _is_turned_off() -> bool:
    """Whether the user has turned the compiler off, or a mode under which it does not run is on."""
    from torch._dynamo import config, eval_frame

    # `TORCHDYNAMO_DISABLE=1`; `torch.compiler.set_stance`; `FlopCounterMode` and the like.
    is_default = eval_frame._stance.stance == "default"  # pyright: ignore[reportPrivateUsage]
    num_modes = torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportPrivateUsage]
    return config.disable or not is_default or num_modes > 0


def _inductor_with_budget(memory_budget: float) -> Callable[..., Tree]:
    """Return Inductor as a backend that partitions graphs under a memory budget.

    The budget is a global option of torch, without an argument of `torch.compile`. It is set while
    one of our graphs is partitioned, so that no other compilation sees it.
    """

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Tree:
        import torch._functorch.config as functorch_config
        from torch._dynamo.backends.registry import lookup_backend

        with functorch_config.patch(activation_memory_budget=memory_budget):
            return lookup_backend("inductor")(graph, inputs)

    return compile_graph
