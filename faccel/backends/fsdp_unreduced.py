"""Gradients that FSDP2 accumulates without reducing them, and how `zero_grad` drops them.

With `set_requires_gradient_sync(False)` FSDP2 accumulates full gradients inside its modules, and
adds them to those of the next backward that reduces. PyTorch's `zero_grad` does not reach them: it
clears `.grad` of the sharded parameters, which is None until gradients are reduced (torch 2.13).

So that `zero_grad` of the model or the optimizer drops them as on one process, `.grad` of a sharded
parameter is a placeholder while a full gradient is accumulated. At the start of the next backward a
placeholder that is missing or was zeroed means that gradients were cleared: the accumulated one is
dropped, too. Any other use of a placeholder, such as a direct `opt.step()`, raises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import attrs
import torch
from torch import nn

from faccel.backends.fsdp_registration import fsdp_groups
from faccel.backends.unreduced_grad import UnreducedGrad


class _FsdpParam(Protocol):
    """The attributes of FSDP2's private `FSDPParam` that are used here."""

    sharded_param: nn.Parameter
    unsharded_accumulated_grad: torch.Tensor | None


@attrs.frozen(eq=False)
class UnreducedGrads:
    """The accumulated gradients of one model.

    Args:
        module: The model that FSDP2 has sharded.
    """

    module: nn.Module
    _placeholders: dict[_FsdpParam, UnreducedGrad] = attrs.field(factory=dict, init=False)
    """The placeholder of each parameter with an accumulated gradient."""

    def add_placeholders(self) -> None:
        """Set the placeholders, after a backward that did not reduce. Updates `.grad`."""
        for fsdp_param in fsdp_params(self.module):
            # A parameter without a gradient gets no placeholder: optimizers must skip it, as usual.
            if fsdp_param in self._placeholders or not _has_accumulated(fsdp_param):
                continue
            param = fsdp_param.sharded_param
            placeholder = UnreducedGrad(param, param.grad)
            param.grad = placeholder
            self._placeholders[fsdp_param] = placeholder

    def before_backward(self, *, reduces: bool) -> None:
        """Drop what was cleared. At the end of a backward that does not reduce, add placeholders.

        Args:
            reduces: Whether this backward reduces gradients.
        """
        # The usual case: all backwards have reduced.
        if reduces and not self._placeholders:
            return
        self.drop_cleared(reduces=reduces)
        if not reduces:
            # After the callback of FSDP2, which its earlier hook of the output has queued: a
            # `zero_grad` may follow before the end of `grad_sync`.
            engine = torch.autograd.Variable._execution_engine  # pyright: ignore
            engine.queue_callback(self.add_placeholders)

    def drop_cleared(self, *, reduces: bool) -> None:
        """Drop the accumulated gradients of parameters whose `.grad` was cleared.

        Updates the model. Before a backward that reduces, it also removes the placeholders: FSDP2
        then stores the reduced gradient instead of adding it to zeros.
        """
        for fsdp_param, placeholder in list(self._placeholders.items()):
            param = fsdp_param.sharded_param
            is_set = param.grad is placeholder
            # By `zero_grad(set_to_none=False)`, or by True.
            is_cleared = param.grad is None or (is_set and not placeholder.is_unreduced)
            if is_cleared:
                drop_accumulated(fsdp_param)
            if reduces and is_set:
                param.grad = placeholder.reduced
            if reduces or is_cleared:
                del self._placeholders[fsdp_param]

    def drop_all(self) -> None:
        """Drop all accumulated gradients. Updates `.grad` and the model."""
        for fsdp_param, placeholder in self._placeholders.items():
            param = fsdp_param.sharded_param
            if param.grad is placeholder:
                param.grad = placeholder.reduced
        self._placeholders.clear()
        for fsdp_param in fsdp_params(self.module):
            drop_accumulated(fsdp_param)


def fsdp_params(module: nn.Module) -> Iterator[_FsdpParam]:
    """Yield FSDP2's records of the parameters of `module`."""
    for group in fsdp_groups(module):
        yield from group.fsdp_params


def unsharded_param(fsdp_param: _FsdpParam) -> nn.Parameter | None:
    """Return the gathered parameter; FSDP2 makes it in the first forward."""
    return getattr(fsdp_param, "_unsharded_param", None)


def _has_accumulated(fsdp_param: _FsdpParam) -> bool:
    # Here where gradients are reduced in another dtype than they are computed in.
    if fsdp_param.unsharded_accumulated_grad is not None:
        return True
    # Else in `.grad` of the gathered parameter, which stays while the gathered data is freed.
    param = unsharded_param(fsdp_param)
    return param is not None and param.grad is not None


def drop_accumulated(fsdp_param: _FsdpParam) -> None:
    """Drop what a backward without reduction has accumulated. Updates `fsdp_param`."""
    # In PyTorch 2.15 a property, which reads `.grad` of the gathered parameter.
    if not isinstance(getattr(type(fsdp_param), "unsharded_accumulated_grad", None), property):
        fsdp_param.unsharded_accumulated_grad = None
    param = unsharded_param(fsdp_param)
    if param is not None:
        param.grad = None
