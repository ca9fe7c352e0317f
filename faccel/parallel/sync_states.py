"""Making the models of several ranks one: the same structure, and rank 0's values."""

from __future__ import annotations

import zlib

import torch
from torch import nn

from faccel.call_site import describe_ranks
from faccel.comm.objects import gather_objects
from faccel.comm.tensors import broadcast
from faccel.context import DistContext
from faccel.errors import ModelError


def check_same_structure(module: nn.Module, ctx: DistContext, axis: str) -> None:
    """Raise on every rank of the axis where ranks have built different models. Collective."""
    own = [
        (name, tuple(p.shape), str(p.dtype), p.requires_grad)
        for name, p in module.named_parameters()
    ]
    digests = gather_objects(zlib.crc32(repr(own).encode()), ctx, axis=axis)
    if len(set(digests)) > 1:
        numbers = {
            rank: f"model {sorted(set(digests)).index(digest)}"
            for rank, digest in enumerate(digests)
        }
        raise ModelError(
            "ranks have built different models",
            got=f"{describe_ranks(numbers)}; this rank's has {len(own)} parameters, the first `{own[0][0]}` {list(own[0][1])}",
            fix="build the same model, with the same parameters frozen, on every rank",
        )


def broadcast_from_rank_0(values: dict[str, torch.Tensor], ctx: DistContext, axis: str) -> None:
    """Overwrite `values` with those of the axis's rank 0. Collective."""
    with torch.no_grad():
        for name, value in broadcast(values, ctx, axis=axis).items():
            values[name].copy_(value)
