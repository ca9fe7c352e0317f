"""ZeRO-3 for a module on the meta device: parameters are sharded one by one.

Only rank 0 stores all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from faccel.backends.deepspeed.availability import import_deepspeed, setup_environment
from faccel.backends.deepspeed.settings import Json, dtype_of
from faccel.backends.default_group import ensure_process_group
from faccel.context import DistContext
from faccel.mesh import DATA
from faccel.parallel.materialize import InitialValues, tie_parameters
from faccel.parallel.sync_states import broadcast_from_rank_0


def shard_parameters(
    module: nn.Module, values: InitialValues, settings: Mapping[str, Json], ctx: DistContext
) -> None:
    """Replace each parameter by this rank's shard of rank 0's value.

    Effects: updates module; collective.

    Args:
        module: The user's module, on the meta device on some ranks.
        values: Rank 0's values.
        settings: The settings of DeepSpeed.
        ctx: The context.
    """
    with setup_environment(ctx):
        deepspeed = import_deepspeed(ctx)
        ensure_process_group(ctx)
        deepspeed.init_distributed()
        # `zero.Init` is a context for constructors, and `zero.Init(module=...)` needs all values at
        # once. Its private method converts the parameters of an existing model one by one.
        # `mem_efficient_linear` replaces `torch.nn.functional.linear` in the whole process.
        init = deepspeed.zero.Init(config_dict_or_path=dict(settings), mem_efficient_linear=False)
        for name, param in list(module.named_parameters()):
            full = _full_tensor(name, param, values, dtype_of(ctx), ctx)
            sharded = nn.Parameter(full, requires_grad=param.requires_grad)
            _replace(module, name, sharded)
            # broadcasts rank 0's value and keeps the shard, before the next one is allocated
            init._convert_to_zero_parameters([sharded])
    for name, buffer in list(module.named_buffers()):
        _replace(module, name, _full_tensor(name, buffer, values, buffer.dtype, ctx))
    # The loop made one parameter for each first name; the other names still have a meta tensor.
    tie_parameters(module, values.ties)
    # `zero.Init` has broadcast parameters only.
    broadcast_from_rank_0(dict(module.named_buffers()), ctx, DATA)


def _replace(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(parent), attribute, tensor)


def _full_tensor(
    name: str, like: torch.Tensor, values: InitialValues, dtype: torch.dtype, ctx: DistContext
) -> torch.Tensor:
    """Return the initial value on rank 0, and empty memory for it on the other ranks."""
    # Only floating point parameters are cast to the dtype of `mixed_precision`.
    if not like.is_floating_point():
        dtype = like.dtype
    tensor = torch.empty(like.shape, dtype=dtype, device=ctx.device)
    value = values.full.get(name)
    if value is not None:
        tensor.copy_(value)
    return tensor
