"""Gradients of gradients through an FSDP2 model, as in gradient penalties (arXiv:1704.00028).

`torch.autograd.grad(..., create_graph=True)` records a graph that contains gathered parameters.
FSDP2 frees them at the end of that backward, and a second backward through the graph need not pass
the outputs of the model, whose hooks gather parameters and reduce gradients (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import attrs
import torch
from torch import nn

from faccel.backends.fsdp_registration import Registration

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


@attrs.frozen(eq=False)
class SecondOrder:
    """Keeps parameters gathered from a backward that records a graph to the end of the next one.

    Args:
        module: The model that FSDP2 has sharded.
        registration: Which parameters its modules have.
        fsdp_params: FSDP2's records of its parameters.
        after_backward: Called after the second backward.
    """

    module: nn.Module
    registration: Registration
    fsdp_params: list[Any]
    after_backward: Callable[[], None]
    _handles: list[Any] = attrs.field(factory=list, init=False)

    def before_backward(self) -> None:
        """Prepare for a second backward if this one records a graph."""
        # Autograd runs hooks with gradients enabled under `create_graph` only.
        if not torch.is_grad_enabled():
            return
        cast("FSDPModule", self.module).set_reshard_after_backward(False)
        if not self._handles:
            for fsdp_param in self.fsdp_params:
                # A unit that no forward has called has no gathered parameters.
                if hasattr(fsdp_param, "_unsharded_param"):
                    param = fsdp_param.unsharded_param
                    handle = param.register_post_accumulate_grad_hook(self._on_grad)
                    self._handles.append(handle)
        _queue_callback(self._after_first)

    def _after_first(self) -> None:
        # Handles are removed if this backward has also accumulated gradients: it was the last one.
        if self._handles:
            self.registration.after_forward(has_backward=True)

    def _on_grad(self, param: torch.Tensor) -> None:
        if self._handles:
            # At the end of this backward, when all gradients are accumulated.
            _queue_callback(self._finish)
        while self._handles:
            self._handles.pop().remove()

    def _finish(self) -> None:
        """Reduce the gradients, and free the gathered parameters."""
        cast("FSDPModule", self.module).set_reshard_after_backward(True)
        # Private: what FSDP2 does at the end of a backward through the outputs of the model. Where
        # it has been done already, nothing is left to reduce.
        cast("Any", self.module)._get_fsdp_state()._root_post_backward_final_callback()
        self.registration.after_forward(has_backward=False)
        self.after_backward()

    def reset(self) -> None:
        """Expect no second backward any more. Updates the model."""
        while self._handles:
            self._handles.pop().remove()
        cast("FSDPModule", self.module).set_reshard_after_backward(True)


def _queue_callback(callback: Callable[[], None]) -> None:
    engine = torch.autograd.Variable._execution_engine  # pyright: ignore
    engine.queue_callback(callback)
