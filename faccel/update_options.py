"""The options of one backward, and of what an update does before the optimizer steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class BackwardOptions(NamedTuple):
    """The options of one `scaled_backward`, as in `torch.autograd.backward`.

    Args:
        retain_graph: Whether the graph stays for another backward; None is `create_graph`.
        create_graph: Whether gradients can be differentiated.
        inputs: The tensors whose gradients are accumulated; None is every leaf of the graph.
    """

    retain_graph: bool | None = None
    create_graph: bool = False
    inputs: Sequence[torch.Tensor] | None = None

    @property
    def keeps_graph(self) -> bool:
        """Whether another backward through the same graph may follow."""
        if self.retain_graph is None:
            return self.create_graph
        return self.retain_graph

    @property
    def is_plain(self) -> bool:
        """Whether this is one backward through the whole graph, which is then freed."""
        return self.inputs is None and not self.create_graph and not self.keeps_graph


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
