"""What one update does with the gradients before the optimizer steps."""

from __future__ import annotations

from typing import NamedTuple


class UpdateOptions(NamedTuple):
    """How `optimizer_step` treats the gradients before it steps.

    Args:
        clip_norm: The largest 2-norm of all gradients together; None does not measure it.
        clip_value: The largest magnitude of an element; None does not clip elements.
        grad_scale: The loss scale that the gradients were multiplied by.
        skip_nonfinite: Whether to skip an update in which a gradient is not finite.
    """

    clip_norm: float | None
    clip_value: float | None
    grad_scale: float
    skip_nonfinite: bool
