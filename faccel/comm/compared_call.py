"""One rank's call of a collective, which `simulate` and debug mode compare with the others'.

Operation, shapes and dtypes do not identify a collective: FSDP2 gathers many units of one shape,
and ranks that gather different ones compute with each other's parameters. So a call also has a
*subject*, what it communicates in the user's words, and the line of the user's code.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from faccel.call_site import call_site
from faccel.comm.pack import describe
from faccel.tree import Tree, flatten, paths

if TYPE_CHECKING:
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

# All ranks have the same role in these, so that each calls them from the same line. In the others
# one rank has another role, and `if rank == 0: broadcast(x) else: broadcast(y)` is usual.
_FROM_ONE_LINE = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
_FSDP_FILE = os.path.join("torch", "distributed", "fsdp", "_fully_shard", "_fsdp_param_group.py")
_MODULE_FILE = os.path.join("torch", "nn", "modules", "module.py")
_JOIN_FILE = os.path.join("torch", "distributed", "algorithms", "join.py")


@attrs.frozen
class ComparedCall:
    """A call of a collective by one rank.

    Args:
        op: Operation, shapes and dtypes: `"all_gather(float32[8])"`.
        subject: What is communicated, such as a unit of a model; empty if that is unknown, which
            differs from no other subject.
        site: The user's line.
        is_from_one_line: Whether all ranks must make this call from the same line.
    """

    op: str
    subject: str
    site: str
    is_from_one_line: bool

    def __str__(self) -> str:
        return f"{self.op} at {self.site}"

    def shown(self, other: ComparedCall) -> str:
        """Return the text for an error in which it differs from `other`."""
        # Operations that differ explain enough.
        if not self.subject or self.op != other.op:
            return str(self)
        return f"{self.op} of {self.subject} at {self.site}"

    def differs_from(self, other: ComparedCall) -> bool:
        """Return whether two ranks that make these calls together would mix up their data."""
        if self.op != other.op:
            return True
        if self.subject and other.subject and self.subject != other.subject:
            return True
        return self.is_from_one_line and other.is_from_one_line and self.site != other.site


def compared_call(op: str, detail: str) -> ComparedCall:
    """Return the call that this thread is making, with the subject that its frames show.

    Effects: pure. Takes microseconds per frame: it is for simulations and debug mode.

    Args:
        op: Name of the collective.
        detail: What must agree besides the operation, as text.
    """
    signature = op
    if detail:
        signature = f"{op}({detail})"
    subject = getattr(_current, "subject", "") or _subject()
    # The line stands for an unknown subject. A rank that has left a `Join` makes the calls of
    # the others in its `__exit__`.
    is_from_one_line = op in _FROM_ONE_LINE and not subject and not _is_joining()
    return ComparedCall(signature, subject, call_site(), is_from_one_line)


# One per thread: the ranks of `simulate` are threads of one process.
_current = threading.local()


@contextmanager
def subject_of_calls(subject: str) -> Generator[None]:
    """Let the calls of this thread in the body communicate `subject`."""
    previous = getattr(_current, "subject", "")
    _current.subject = subject
    try:
        yield
    finally:
        _current.subject = previous


def labelled(call: str, x: Tree) -> str:
    """Return the subject of a public call: its name, and the names of the leaves of its argument.

    Effects: pure.

    Examples:
        >>> labelled("gather", {"a": torch.zeros(2)})
        "gather of x['a']"
    """
    # Without shapes and dtypes: the operation has them, or the call compares them itself.
    return f"{call} of {', '.join(paths(x, 'x'))}"


def described_call(call: str, x: Tree) -> str:
    """Return the name of a public call, and names, shapes and dtypes of the leaves of its argument.

    Effects: pure.

    Examples:
        >>> described_call("gather", {"a": torch.zeros(2)})
        "gather of x['a']: float32[2]"
    """
    leaves: list[str] = []
    for name, leaf in zip(paths(x, "x"), flatten(x)[0], strict=True):
        leaves.append(f"{name}: {describe([leaf])}")
    return f"{call} of {', '.join(leaves)}"


# Tables of weak keys, because nothing may be set on the user's modules, nor keep them alive.
_MODULE_NAMES: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_MODELS_OF_PARAMETERS = WeakTensorKeyDictionary()


def name_model(model: nn.Module, number: int) -> None:
    """Give the units and parameters of a model names, by which ranks compare what they communicate.

    Effects: pure. Only tables of this module change.

    Args:
        model: A model that was wrapped.
        number: How many models this rank has wrapped, from 1.
    """
    class_name = type(model).__name__.removeprefix("FSDP")  # `fully_shard` changes the class
    model_name = f"model {number} ({class_name})"
    for name, module in model.named_modules():
        if name:
            _MODULE_NAMES[module] = f"`{name}` of {model_name}"
        else:
            _MODULE_NAMES[module] = model_name
    for param in model.parameters():
        _MODELS_OF_PARAMETERS[param] = model_name


def _subject() -> str:
    """Return the unit of a model for which this thread communicates; empty if there is none."""
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        code = frame.f_code
        if _is_method(code, _FSDP_FILE):
            return _fsdp_unit(frame.f_locals["self"])
        if code.co_name == "_call_impl" and code.co_filename.endswith(_MODULE_FILE):
            return _module_name(frame.f_locals["self"])
        frame = frame.f_back
    # DDP's reducer has no frames: C++ calls it in the node that accumulates a gradient. Which
    # parameter completes a bucket may differ between ranks, but not its model.
    node = torch._C._current_autograd_node()  # pyright: ignore
    param: torch.Tensor | None = getattr(node, "variable", None)
    if param is None:
        return ""
    return str(_MODELS_OF_PARAMETERS.get(param, ""))


def _is_method(code: CodeType, file: str) -> bool:
    return code.co_filename.endswith(file) and code.co_varnames[:1] == ("self",)


def _is_joining() -> bool:
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if frame.f_code.co_filename.endswith(_JOIN_FILE):
            return True
        frame = frame.f_back
    return False


def _fsdp_unit(unit: FSDPParamGroup) -> str:
    names: list[str] = []
    for module in unit.modules:
        # Modules that the user has sharded without `wrap` have the name that FSDP2 gives them.
        name = unit._module_fqn  # pyright: ignore[reportPrivateUsage]
        if name is None or module in _MODULE_NAMES:
            name = _module_name(module)
        names.append(name)
    # A module with parameters of several kinds has several groups.
    index: int = getattr(unit, "_param_group_index", 0)
    if index:
        names.append(f"group {index}")
    return ", ".join(names)


def _module_name(module: nn.Module) -> str:
    # A module that was added after `wrap` has its class only.
    return _MODULE_NAMES.get(module) or f"a {type(module).__name__}"
