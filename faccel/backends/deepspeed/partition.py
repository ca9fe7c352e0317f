"""Where each rank's part of a parameter lies in the flat memory of a ZeRO optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn

from faccel.context import DistContext
from faccel.flat_shard import FlatShard
from faccel.protocols import DATA


@attrs.frozen(eq=False)
class Place:
    """This rank's part of a parameter.

    Args:
        shape: Of the whole parameter.
        flat: `float32[...]`, in which master weights of many parameters lie, and which the optimizer knows.
        at: Where the part begins in it.
        first: Which element of the parameter it begins with.
        count: How many elements it has, possibly none.
        owner: The parameter.
    """

    shape: torch.Size
    flat: torch.Tensor
    at: int
    first: int
    count: int
    owner: nn.Parameter

    def shard(self, flat: torch.Tensor, ctx: DistContext) -> FlatShard:
        """Return the part as a tensor, in memory that is laid out as `flat` is."""
        part = flat.detach()[self.at : self.at + self.count]

        def add_up(x: torch.Tensor) -> torch.Tensor:
            return ctx.comm.all_reduce(x.to(ctx.device), "sum", DATA)

        return FlatShard(self.shape, part, self.first, add_up, self.owner)


def places_of(module: nn.Module, zero: Any, ctx: DistContext) -> dict[int, Place]:
    """Return where the parameters lie that are not whole on every rank, by identity."""
    if hasattr(zero, "bit16_groups"):
        return {
            id(p): _of_states(p, flat)
            for group, flat in zip(
                zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
            )
            for p in group
        }
    return {id(p): _of_parameters(p, zero, ctx) for p in module.parameters()}


def _of_states(p: Any, flat: torch.Tensor) -> Place:
    """Of ZeRO-1 and 2, which cut the parameters of a group, one behind the other, into a piece for each rank."""
    mapping = p._hp_mapping
    if mapping is None:
        return Place(p.shape, flat, 0, 0, 0, p)
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Place(p.shape, flat, there.start, here.start, here.numel, p)


def _of_parameters(p: Any, zero: Any, ctx: DistContext) -> Place:
    """Of ZeRO-3, which cuts each parameter into equal pieces; frozen ones have no master weights."""
    size = p.ds_tensor.numel()
    first = min(size * ctx.data_rank, p.ds_numel)
    flat, at = p.ds_tensor, 0
    number = getattr(zero, "grad_position", {}).get(p.ds_id)
    if number is not None:
        group, at, _ = number
        flat = zero.fp32_partitioned_groups_flat[group]
    return Place(p.ds_shape, flat, at, first, min(size, p.ds_numel - first), p)


def write_back(zero: Any) -> None:
    """Give the model the master weights that have been written. Updates the model; collective."""
    with torch.no_grad():
        if hasattr(zero, "update_lp_params"):  # ZeRO-1 and 2
            zero.update_lp_params()
            return
        if hasattr(
            zero, "fp16_groups"
        ):  # ZeRO-3; what its step does when the optimizer has moved them
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()
        else:  # ZeRO-3 without an optimizer
            zero.partition_all_parameters()


def shards_of(
    module: nn.Module, places: Mapping[int, Place], ctx: DistContext
) -> dict[str, FlatShard]:
    """Return this rank's parts of the parameters under each of their names."""
    named = module.named_parameters(remove_duplicate=False)
    return {
        name: places[id(p)].shard(places[id(p)].flat, ctx) for name, p in named if id(p) in places
    }
