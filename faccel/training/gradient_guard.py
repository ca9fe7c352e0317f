"""Debug mode: a gradient that is not finite raises before the ranks reduce it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import attrs
import torch

from faccel.call_site import call_site
from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.training.model import WrappedModel
from faccel.tree import local_tensor

_NO_GUARD = nullcontext()


def gradient_guard(ctx: DistContext) -> AbstractContextManager[None]:
    """Return a context in which a backward raises at the first gradient that is not finite.

    After the reduction every rank has the NaN, and its origin is lost. So each rank
    checks what its own backward adds, parameter by parameter, before DDP or FSDP2 get it.

    In debug mode only: it waits for the device once per parameter. Not in fp16, where gradients
    overflow in normal runs, and the loss scale is adapted to it.

    Args:
        ctx: The context. All its wrapped models are checked.

    Raises:
        ModelError: A gradient is not finite; names rank, parameter and call site.
    """
    if not ctx.config.debug or ctx.config.mixed_precision == "fp16":
        return _NO_GUARD
    return _checked_backward(ctx)


@contextmanager
def _checked_backward(ctx: DistContext) -> Generator[None]:
    # Read here: autograd calls hooks from its own threads, which have no line of the user.
    check = _Check(ctx.rank, call_site())
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for model in ctx.lifetime.models():
            assert isinstance(model, WrappedModel)
            for name, param in model.module.named_parameters():
                # A hook of the parameter runs before its gradient is accumulated, and DDP and
                # FSDP2 reduce after that. Under FSDP2 the backend runs it on the full gradient.
                if param.requires_grad:
                    handles.append(param.register_hook(check.hook_of(name)))
        yield
    except RuntimeError:
        # PyTorch's pipeline raises its own error from the error of a hook.
        if check.error is not None:
            raise check.error from None
        raise
    finally:
        for handle in handles:
            handle.remove()


@attrs.define(eq=False)
class _Check:
    """What the hooks of one backward have in common.

    Args:
        rank: This rank.
        site: The user's line that runs backward.
        error: The error that a hook has raised.
    """

    rank: int
    site: str
    error: ModelError | None = None

    def hook_of(self, name: str) -> Callable[[torch.Tensor], None]:
        """Return the hook of the parameter `name`."""

        def check(grad: torch.Tensor) -> None:
            num_elements, num_nonfinite = _count(grad.detach())
            if num_nonfinite:
                self.error = self._error(name, f"{num_nonfinite} of {num_elements}")
                raise self.error

        return check

    def _error(self, name: str, elements: str) -> ModelError:
        return ModelError(
            f"the gradient of `{name}` is not finite on rank {self.rank}",
            got=f"NaN or infinity in {elements} elements, in the backward at {self.site}",
            fix="look at the loss and the batch of this rank; "
            "`with torch.autograd.detect_anomaly():` around forward and backward names the "
            "operation that returned the first NaN",
        )


def _count(grad: torch.Tensor) -> tuple[int, int]:
    """Return the number of elements on this rank, and of those that are not finite."""
    values = local_tensor(grad)
    if values.is_sparse:
        # A view: `_values()` of an uncoalesced gradient works, `values()` raises.
        values = values._values()  # type: ignore[attr-defined]
    return values.numel(), int(values.isfinite().logical_not().sum())
