"""The hooks of a placed model: parameters are in memory while the forward of their unit runs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from faccel.errors import ModelError
from faccel.inference.set_tensors import set_param
from faccel.inference.window import Window
from faccel.offloaded_tensor import OffloadedTensor
from faccel.tree import Tree, flatten, to_device

_CALL = nn.Module._call_impl.__code__  # pyright: ignore[reportPrivateUsage]


@attrs.frozen(eq=False)
class ParamSlot:
    """One name of a parameter.

    Args:
        owner: The module that has the parameter.
        key: Its name there.
        placeholder: What is there while the parameter is not in memory.
        index: Of the parameter among those of its unit.
    """

    owner: nn.Module
    key: str
    placeholder: nn.Parameter
    index: int


class OffloadHooks:
    """The hooks of a unit that is copied to the device that computes.

    Args:
        name: Of the unit.
        slots: The names of its parameters.
        window: The memory for units in use.
    """

    def __init__(self, name: str, slots: Sequence[ParamSlot], window: Window) -> None:
        self._name, self._slots, self._window = name, slots, window
        self._num_calls = 0

    def load(self, module: nn.Module, args: Tree, kwargs: Tree) -> None:
        """Before forward: put the parameters in their places."""
        _check_no_grad(self._name, (args, kwargs))
        # A unit may call itself; the inner call finds the parameters in their places.
        if self._num_calls == 0:
            self._check_placeholders()
            params = self._window.acquire(self._name)
            for slot in self._slots:
                set_param(slot.owner, slot.key, params[slot.index])
        self._num_calls += 1

    def _check_placeholders(self) -> None:
        """Raise if the user has replaced a parameter: the values of the file would replace it."""
        for slot in self._slots:
            if getattr(slot.owner, slot.key) is not slot.placeholder:
                raise ModelError(
                    f"the parameter `{slot.key}` of the offloaded unit `{self._name}` was replaced",
                    got=f"a {type(getattr(slot.owner, slot.key)).__name__}",
                    fix="call `faccel.inference.materialize(placed)` before you change weights",
                )

    def reset(self) -> None:
        """Take the unit out of use, after a forward that has not reached its end. Updates it."""
        self._num_calls = 0
        for slot in self._slots:
            set_param(slot.owner, slot.key, slot.placeholder)

    def unload(self, module: nn.Module, args: Tree, output: Tree) -> None:
        """After forward, also after an error in it: put the placeholders back."""
        if self._num_calls == 0:  # `load` has failed
            return
        self._num_calls -= 1
        if self._num_calls:
            return
        for slot in self._slots:
            set_param(slot.owner, slot.key, slot.placeholder)
        self._window.release(self._name)


def _check_no_grad(name: str, inputs: Tree) -> None:
    """Raise if backward would read weights that the next unit has overwritten."""
    # A buffer is overwritten by the next unit, and autograd would not notice: the parameters are
    # views of it with other version counters.
    if not torch.is_grad_enabled():
        return
    for leaf in flatten(inputs)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
            raise ModelError(
                f"the unit `{name}` is offloaded, and its input requires a gradient",
                got=f"a tensor of shape {list(leaf.shape)} in grad mode",
                fix="write `with torch.no_grad():` around the call; to train, call "
                "`net = faccel.inference.materialize(placed)` first",
            )


# PyTorch calls the hooks after forward for each `Exception`, but not for Ctrl-C.
class OneCall:
    """Hooks of the model: it runs in one thread at a time, and continues after an interruption.

    Args:
        reset: Called before a forward that follows an interrupted one.
    """

    def __init__(self, reset: Callable[[], None]) -> None:
        self._reset = reset
        self._depth = 0  # a model may call itself
        self._thread = 0

    def begin(self, module: nn.Module, args: Tree, kwargs: Tree) -> None:
        """Before forward: raise if another thread runs the model."""
        # The compiler cannot trace questions about threads.
        if torch.compiler.is_compiling():
            return
        thread = threading.get_ident()
        if self._depth:
            num_running = _num_running(module, self._thread)
            if self._thread != thread and num_running:
                raise ModelError(
                    "a placed model runs in one thread at a time",
                    got="a call while another thread runs the model",
                    fix="put a `threading.Lock` around the calls, or place a model for each thread",
                )
            # This call itself is one of those that run.
            if self._thread != thread or num_running <= 1:
                self._reset()
                self._depth = 0
        self._depth += 1
        self._thread = thread

    def end(self, module: nn.Module, args: Tree, output: Tree) -> None:
        """After forward."""
        if torch.compiler.is_compiling():
            return
        if self._depth and self._thread == threading.get_ident():
            self._depth -= 1


def _num_running(module: nn.Module, thread: int) -> int:
    """Return how many calls of a module are on the stack of a thread."""
    frame = sys._current_frames().get(thread)  # pyright: ignore[reportPrivateUsage]
    count = 0
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            count += 1
        frame = frame.f_back
    return count


class MoveInputs:
    """A hook before forward that moves tensors to the device of a unit."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def move(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments on the device."""
        return _on_device(args, self._device), _on_device(kwargs, self._device)


def _on_device(value: Tree, device: torch.device) -> Tree:
    """Move the tensors of nested values; a key-value cache stays the same object."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (dict, list, tuple)):
        return to_device(value, device)
    return value


class MoveOutputs:
    """Hooks of the model: its outputs are on the device of its first input."""

    def __init__(self) -> None:
        self._devices: list[torch.device | None] = []

    def remember(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before forward: note the device of the first tensor."""
        # None for a call without tensors, whose output stays where it is.
        device = None
        for leaf in flatten((list(args), kwargs))[0]:
            if isinstance(leaf, torch.Tensor):
                device = leaf.device
                break
        self._devices.append(device)

    def move(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After forward: return the output there."""
        # A stack, because a model may call itself.
        device = self._devices.pop()
        if device is None or output is None:  # None after an error
            return output
        return to_device(output, device)


def state_dict_hook(placeholders: Mapping[str, nn.Parameter]) -> Any:
    """Return a hook that replaces offloaded parameters by their values in a state dict.

    Args:
        placeholders: Of one module, by the names of its parameters.
    """

    def read(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key in placeholders:
            value = state.get(prefix + key)
            # `keep_vars=True` asks for the parameters themselves.
            if isinstance(value, OffloadedTensor) and not isinstance(value, nn.Parameter):
                state[prefix + key] = value.read()

    return read
