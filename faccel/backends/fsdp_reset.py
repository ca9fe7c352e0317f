"""Drops what an unfinished forward or backward left in FSDP2."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from faccel.backends.fsdp_registration import fsdp_groups
from faccel.backends.fsdp_unreduced import drop_accumulated, fsdp_params
from faccel.torch_names import reset_fsdp_iteration

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def reset_iteration(engine: nn.Module) -> None:
    """Reshard all parameters, and drop unfinished collectives and gradients that are not reduced.

    Effects: updates engine. Not collective.
    """
    _finish_collectives(engine)
    for root in _roots(engine):
        reset_fsdp_iteration(cast("Any", root)._get_fsdp_state())
    for fsdp_param in fsdp_params(engine):
        drop_accumulated(fsdp_param)
    for param in engine.parameters():
        param.grad = None


def _finish_collectives(engine: nn.Module) -> None:
    """Wait for collectives that have failed: FSDP2's reset would raise their errors."""
    for group in fsdp_groups(engine):
        work = getattr(group._all_gather_result, "all_gather_work", None)
        if work is not None:
            with suppress(RuntimeError):
                work.wait()
        group._all_gather_result = None


def _roots(engine: nn.Module) -> list[FSDPModule]:
    """Return the modules that FSDP2 runs as roots; none before the first forward."""
    roots: list[Any] = []
    for module in engine.modules():
        get_state = getattr(module, "_get_fsdp_state", None)
        if get_state is not None and get_state()._is_root:
            roots.append(module)
    return roots
