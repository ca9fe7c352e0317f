"""Code that Dynamo does not compile, although a compiled function calls it.

Where a compiled function calls code that has no graph, such as a method of DDP's reducer, Dynamo
ends its graph, and begins new ones in the functions that run until it returns. Functions that only
call a model are marked here: their graphs would have two or three operations each.

As a part of a larger graph these functions are still traced, as on one process; only `untraced`
ones are not.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import TypeVar, cast

# As in `torch._dynamo.eval_frame.skip_code`, whose module takes a second to import.
from torch._C._dynamo import eval_frame

Function = TypeVar("Function", bound=Callable[..., object])
Class = TypeVar("Class", bound=type)


def without_graph(fn: Function) -> Function:
    """Begin no graph in a function; one may begin in the functions that it calls.

    Effects: updates fn.
    """
    _mark(fn, callees=False)
    return fn


def without_graphs(fn: Function) -> Function:
    """Begin no graph in a function, nor in the functions that it calls.

    Effects: updates fn.
    """
    _mark(fn, callees=True)
    return fn


def untraced(fn: Function) -> Function:
    """Run a function as it is, also where the function that calls it has a graph.

    As `torch.compiler.disable`, whose module takes a second to import.

    Effects: updates fn.
    """
    fn._torchdynamo_disable = True  # type: ignore[attr-defined]
    return without_graphs(fn)


def methods_without_graphs(cls: Class) -> Class:
    """Begin no graph in the methods of a class, which C++ calls, nor in what they call.

    Effects: updates cls.
    """
    for method in vars(cls).values():
        if isinstance(method, FunctionType):
            without_graphs(method)
    return cls


def _mark(fn: Callable[..., object], *, callees: bool) -> None:
    """Let Dynamo skip the code of a function; with `callees`, also what it calls."""
    skip = eval_frame._FrameAction.SKIP  # pyright: ignore[reportPrivateUsage]
    in_callees = eval_frame._FrameAction.DEFAULT  # pyright: ignore[reportPrivateUsage]
    if callees:
        in_callees = skip
    strategy = eval_frame._FrameExecStrategy(skip, in_callees)  # pyright: ignore
    eval_frame.set_code_exec_strategy(cast("FunctionType", fn).__code__, strategy)
