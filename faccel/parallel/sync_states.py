"""Equal models on several ranks: the same structure, and rank 0's values."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import nn

from faccel.call_site import describe_ranks
from faccel.comm.objects import gather_objects
from faccel.comm.tensors import broadcast
from faccel.context import DistContext
from faccel.errors import ModelError


def check_same_structure(module: nn.Module, ctx: DistContext, axis: str) -> None:
    """Raise on every rank of the axis if ranks have built different models. Collective.

    Raises:
        ModelError: Names, shapes, dtypes or `requires_grad` differ.
    """
    structure = [
        (name, tuple(param.shape), str(param.dtype), param.requires_grad)
        for name, param in module.named_parameters()
    ]
    # A checksum, because the structure of a large model would be megabytes on every rank. Not
    # `hash`, which differs between processes.
    digests = gather_objects(zlib.crc32(repr(structure).encode()), ctx, axis=axis)
    distinct = sorted(set(digests))
    if len(distinct) > 1:
        models = {rank: f"model {distinct.index(digest)}" for rank, digest in enumerate(digests)}
        name, shape, *_ = structure[0]
        raise ModelError(
            "ranks have built different models",
            got=f"{describe_ranks(models)}; this rank's has {len(structure)} parameters, the first "
            f"`{name}` {list(shape)}",
            fix="build the same model, with the same parameters frozen, on every rank",
        )


def broadcast_from_rank_0(values: Mapping[str, torch.Tensor], ctx: DistContext, axis: str) -> None:
    """Overwrite tensors with those of rank 0 of the axis. Updates `values`; collective."""
    # Parameters that require gradients cannot be written in place otherwise.
    with torch.no_grad():
        for name, value in broadcast(dict(values), ctx, axis=axis).items():
            values[name].copy_(value)
