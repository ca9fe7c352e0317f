"""Giving the parts of a sharded model rank 0's values, also where other ranks have built it without any (on meta)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import nn

from faccel.comm.objects import gather_objects
from faccel.context import DistContext
from faccel.errors import ModelError
from faccel.parallel.sync_states import broadcast_from_rank_0
from faccel.tree import is_dtensor, local_tensor


@attrs.frozen
class InitialValues:
    """What a model held before it was sharded.

    Args:
        is_meta: Whether some rank has no values: then rank 0's are sent after sharding, when each rank needs a part.
        full: Rank 0's values by name, there and only then.
        ties: Names of one parameter or buffer; taking memory for a model unties them.
    """

    is_meta: bool
    full: dict[str, torch.Tensor] = attrs.field(repr=False)
    ties: Sequence[Sequence[str]]

    @classmethod
    def of(cls, module: nn.Module, ctx: DistContext, holders: str) -> InitialValues:
        """Look at the values; without meta every rank has rank 0's afterwards. Updates `module`, collective."""
        mine = any(t.is_meta for t in _tensors(module).values())
        metas = gather_objects(mine, ctx, axis=holders)
        if not any(metas):
            broadcast_from_rank_0(_tensors(module), ctx, holders)
            return cls(False, {}, ())
        is_first = ctx.comm.rank(holders) == 0
        ties = tied_names(module)
        if is_first and mine:
            _initialise(module)
            tie_parameters(module, ties)
        full = {name: t.detach() for name, t in _tensors(module).items()} if is_first else {}
        return cls(True, full, ties)

    def fill(self, module: nn.Module, ctx: DistContext, holders: str) -> None:
        """Give the sharded model its values. Updates `module`, collective."""
        if not self.is_meta:
            return
        if any(t.is_meta for t in _tensors(module).values()):
            module.to_empty(device=ctx.device)
        else:
            module.to(ctx.device)
        tie_parameters(module, self.ties)
        with torch.no_grad():
            for name, part in _tensors(module).items():
                mine = self.full.get(name)
                whole = torch.empty(part.shape, dtype=part.dtype) if mine is None else mine
                _take(part, ctx.comm.broadcast(whole.to(ctx.device), 0, holders))


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _take(part: Any, whole: torch.Tensor) -> None:
    """Write this rank's part of `whole`."""
    if not is_dtensor(part):
        part.copy_(whole)
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        whole.shape, part.device_mesh, part.placements
    )
    local_tensor(part).copy_(
        whole[tuple(slice(at, at + n) for at, n in zip(offset, shape, strict=True))]
    )


def tied_names(module: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [each for each in names.values() if len(each) > 1]


def tie_parameters(module: nn.Module, ties: Sequence[Sequence[str]]) -> None:
    """Make the parameters of these names one again: the first of each. Updates `module`."""
    for first, *others in ties:
        for other in others:
            parent, _, leaf = other.rpartition(".")
            module.get_submodule(parent)._parameters[leaf] = module.get_parameter(first)  # pyright: ignore


def _initialise(module: nn.Module) -> None:
    """Give a model on meta memory and first values, through its modules' own `reset_parameters`."""
    for name, each in module.named_modules():
        own = [*each.parameters(recurse=False), *each.buffers(recurse=False)]
        if own and not callable(getattr(each, "reset_parameters", None)):
            raise ModelError(
                "a model on meta has no values, and this part of it does not say how it begins",
                got=f"`{name or type(module).__name__}`, a {type(each).__name__} without `reset_parameters`",
                fix="build the model with values on rank 0 (`if ctx.is_main`), and on meta on the others",
            )
    module.to_empty(device="cpu")
    for each in module.modules():
        if callable(reset := getattr(each, "reset_parameters", None)):
            reset()
