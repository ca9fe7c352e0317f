"""The shard of each parameter in the flat master weights of a ZeRO optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import nn

from faccel.context import DistContext
from faccel.flat_shard import FlatShard
from faccel.mesh import DATA


@attrs.frozen(eq=False)
class ParamShard:
    """This rank's shard of a parameter.

    Args:
        shape: Shape of the full parameter.
        flat: `float32[...]`, the flat master weights of many parameters; a key of the optimizer's
            state.
        offset: Index of the shard's first element in `flat`.
        start: Flat index of that element in the full parameter.
        count: Number of elements, possibly 0.
        param: The parameter.
    """

    shape: torch.Size
    flat: torch.Tensor
    offset: int
    start: int
    count: int
    param: nn.Parameter

    def view_of(self, flat: torch.Tensor, ctx: DistContext) -> FlatShard:
        """Return the shard as a tensor that aliases `flat`, memory laid out as `self.flat` is."""
        # `flat` is the master weights, or a state of the optimizer of the same layout.
        local_tensor = flat.detach()[self.offset : self.offset + self.count]

        def all_reduce(x: torch.Tensor) -> torch.Tensor:
            # with offload the shard is in host memory, and the collective needs the device
            return ctx.comm.all_reduce(x.to(ctx.device), "sum", DATA)

        return FlatShard(self.shape, local_tensor, self.start, all_reduce, self.param)


def param_shards(module: nn.Module, zero: Any, ctx: DistContext) -> dict[int, ParamShard]:
    """Return the shard of each parameter that DeepSpeed has sharded, by `id` of the parameter.

    Effects: pure.

    Args:
        module: The user's module.
        zero: The optimizer of the engine, `engine.optimizer`.
        ctx: The context.
    """
    shards: dict[int, ParamShard] = {}
    if hasattr(zero, "bit16_groups"):  # ZeRO-1 and ZeRO-2
        groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
        for params, flat in groups:
            for param in params:
                shards[id(param)] = _shard_of_states(param, flat)
    else:
        for param in module.parameters():
            shards[id(param)] = _shard_of_parameter(param, zero, ctx)
    return shards


def _shard_of_states(param: Any, flat: torch.Tensor) -> ParamShard:
    """Return the shard under ZeRO-1 and ZeRO-2.

    Those concatenate the parameters of a group and cut the result into one piece for each rank.
    """
    mapping = param._hp_mapping
    if mapping is None:  # the piece of this rank has no element of this parameter
        return ParamShard(param.shape, flat, 0, 0, 0, param)
    in_param = mapping.lp_fragment_address
    in_flat = mapping.hp_fragment_address
    return ParamShard(param.shape, flat, in_flat.start, in_param.start, in_param.numel, param)


def _shard_of_parameter(param: Any, zero: Any, ctx: DistContext) -> ParamShard:
    """Return the shard under ZeRO-3, which cuts each parameter into equal pieces."""
    size = param.ds_tensor.numel()
    # the last pieces are padded, so their start may be after the end of the parameter
    start = min(size * ctx.data_rank, param.ds_numel)
    count = min(size, param.ds_numel - start)
    flat = param.ds_tensor
    offset = 0
    # a frozen parameter has no master weights
    position = getattr(zero, "grad_position", {}).get(param.ds_id)
    if position is not None:
        group, offset, _ = position
        flat = zero.fp32_partitioned_groups_flat[group]
    return ParamShard(param.ds_shape, flat, offset, start, count, param)


def copy_master_weights_to_model(zero: Any) -> None:
    """Copy master weights that were overwritten into the model's parameters.

    Effects: updates the parameters; collective.
    """
    with torch.no_grad():
        if hasattr(zero, "update_lp_params"):  # ZeRO-1 and ZeRO-2
            # Each rank casts its piece, then an all-gather gives every rank all parameters.
            zero.update_lp_params()
        elif hasattr(zero, "fp16_groups"):  # ZeRO-3: the end of its `step`
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()
        else:  # ZeRO-3 without an optimizer
            zero.partition_all_parameters()


def sharded_state(
    module: nn.Module, shards: Mapping[int, ParamShard], ctx: DistContext
) -> dict[str, FlatShard]:
    """Return this rank's shard of each parameter, under each of the parameter's names.

    Effects: pure. The tensors alias the master weights.
    """
    state: dict[str, FlatShard] = {}
    for name, param in module.named_parameters(remove_duplicate=False):
        shard = shards.get(id(param))
        if shard is not None:
            state[name] = shard.view_of(shard.flat, ctx)
    return state
