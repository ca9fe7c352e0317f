"""Sharing the parameters of a model one by one (ZeRO-3), so that no rank but the first ever holds all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from faccel.backends.deepspeed.availability import import_deepspeed, setup_environment
from faccel.backends.deepspeed.settings import dtype_of
from faccel.context import DistContext
from faccel.parallel.materialize import InitialValues, tie_parameters
from faccel.parallel.sync_states import broadcast_from_rank_0
from faccel.protocols import DATA


def join_world(ctx: DistContext) -> None:
    """Make the process group that DeepSpeed asks for in a world of one process, too; it ends with the context."""
    if dist.is_initialized():
        return
    backend = "gloo" if ctx.device.type == "cpu" else None
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    ctx.lifetime.on_close(lambda: dist.destroy_process_group() if dist.is_initialized() else None)


def spread(
    module: nn.Module, values: InitialValues, settings: Mapping[str, Any], ctx: DistContext
) -> None:
    """Give each rank its part of rank 0's values, for a model that is on meta on some ranks.

    Updates `module`: its parameters are new ones; collective.
    """
    with setup_environment(ctx):
        deepspeed = import_deepspeed(ctx)
        join_world(ctx)
        deepspeed.init_distributed()
        init = deepspeed.zero.Init(config_dict_or_path=dict(settings), mem_efficient_linear=False)
        for name, p in list(module.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            new = nn.Parameter(
                _whole(name, p, values, dtype_of(ctx), ctx), requires_grad=p.requires_grad
            )
            setattr(module.get_submodule(parent), leaf, new)
            init._convert_to_zero_parameters([new])  # takes rank 0's, keeps its part
    for name, buffer in list(module.named_buffers()):
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, _whole(name, buffer, values, buffer.dtype, ctx))
    tie_parameters(module, values.ties)
    broadcast_from_rank_0(dict(module.named_buffers()), ctx, DATA)


def _whole(
    name: str, like: torch.Tensor, values: InitialValues, dtype: torch.dtype, ctx: DistContext
) -> torch.Tensor:
    """Return the value on rank 0, memory for it elsewhere."""
    dtype = dtype if like.is_floating_point() else like.dtype
    mine = values.full.get(name)
    empty = torch.empty(like.shape, dtype=dtype, device=ctx.device)
    return empty if mine is None else empty.copy_(mine)
