"""What one update does with the gradients before the optimizer steps."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class UpdateOptions(NamedTuple):
    """How `optimizer_step` treats the gradients before it steps.

    Args:
        clip_norm: The largest norm of the gradients together; None does not measure it.
        clip_value: The largest magnitude of an element; None does not clip elements.
        grad_scale: The loss scale that the gradients are multiplied by; 1 after `unscale`.
        skip_nonfinite: Whether to skip an update in which a gradient is not finite.
        norm_type: The order of the norm; 2 is the Euclidean norm.
        clip_params: The `id` of the parameters that `clip_norm` measures and clips; None is all.
        overflow: What `unscale` found: above 0 skips the update. None without `unscale`.
    """

    clip_norm: float | torch.Tensor | None
    clip_value: float | torch.Tensor | None
    grad_scale: float
    skip_nonfinite: bool
    norm_type: float = 2.0
    clip_params: Collection[int] | None = None
    overflow: torch.Tensor | None = None
