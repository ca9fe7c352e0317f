"""The interface between backward, the optimizer step and the gradients of one wrapped model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Protocol

import attrs

from faccel.update_options import BackwardOptions

if TYPE_CHECKING:
    import torch


class GradReducer(Protocol):
    """Averages the gradients of one wrapped model over the data ranks.

    `scaled_backward` and `optimizer_step` call it for every model of their context.
    """

    @property
    def param_ids(self) -> AbstractSet[int]:
        """The `id` of each parameter whose gradient backward averages."""
        ...

    def before_backward(self, loss: torch.Tensor, options: BackwardOptions) -> None:
        """Prepare for a backward of `loss`, which may reach the model or not."""
        ...

    def graph_inputs(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return `inputs` with the parameters of the model as its graph has them."""
        ...

    def after_backward(self, options: BackwardOptions) -> None:
        """Finish what `before_backward` prepared. May be collective."""
        ...

    def after_failed_backward(self) -> None:
        """Drop what a backward that has raised left. Not collective."""
        ...

    def discard(self) -> None:
        """Drop all gradients, and what an unfinished forward or backward left. Not collective.

        Every rank calls it, also one without a failure: they continue from the same state.
        """
        ...

    def check_step(self, opt: torch.optim.Optimizer) -> None:
        """Raise if the gradients of the model may differ between replicas."""
        ...

    def after_step(self, opt: torch.optim.Optimizer) -> None:
        """Record that `opt` has used the present gradients."""
        ...

    def name_of(self, param: torch.Tensor) -> str | None:
        """Return the name of a parameter that the model has now, else None."""
        ...


@attrs.frozen(eq=False)
class OwnedParams:
    """A `GradReducer` for strategies that average gradients in backward by themselves.

    Args:
        module: The user's module.
        param_ids: As in `GradReducer`.
        reset: Drops all gradients, and what an unfinished forward or backward left. None where
            that is only gradients.
    """

    module: torch.nn.Module
    param_ids: AbstractSet[int]
    _reset: Callable[[], None] | None = None

    def before_backward(self, loss: torch.Tensor, options: BackwardOptions) -> None:
        """Do nothing."""

    def graph_inputs(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return `inputs`."""
        return inputs

    def after_backward(self, options: BackwardOptions) -> None:
        """Do nothing."""

    def after_failed_backward(self) -> None:
        """Do nothing."""

    def discard(self) -> None:
        """Drop all gradients, and what an unfinished forward or backward left."""
        if self._reset is not None:
            self._reset()
        for param in self.module.parameters():
            param.grad = None

    def check_step(self, opt: torch.optim.Optimizer) -> None:
        """Do nothing."""

    def after_step(self, opt: torch.optim.Optimizer) -> None:
        """Do nothing."""

    def name_of(self, param: torch.Tensor) -> str | None:
        """Return the name of a parameter that the model has now, else None."""
        return name_of(self.module, param)


def name_of(module: torch.nn.Module, param: torch.Tensor) -> str | None:
    """Return the name of a parameter of `module`, else None."""
    for name, candidate in module.named_parameters():
        if candidate is param:
            return name
    return None
