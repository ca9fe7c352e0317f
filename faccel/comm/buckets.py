"""Named tensors summed over the data ranks, many in one all-reduce."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from faccel.context import DistContext
from faccel.errors import ConfigError
from faccel.protocols import DATA


class _Summed(torch.autograd.Function):
    """The sum over the data ranks as an operation of torch's: it can be differentiated and vmapped.

    A cotangent is summed, too: each rank's result depends on every rank's argument.
    """

    @staticmethod
    def forward(x: torch.Tensor, ctx: DistContext) -> torch.Tensor:
        return ctx.comm.all_reduce(x.contiguous(), "sum", DATA)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.world = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return _Summed.apply(grad_outputs[0], ctx.world), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _Summed.apply(*args), in_dims[0]


def check_cap(bucket_cap_mb: float) -> None:
    """Refuse a size of buckets that is not positive."""
    if not bucket_cap_mb > 0:
        raise ConfigError("`bucket_cap_mb` must be positive", saw=str(bucket_cap_mb), fix="leave it out for 25 MB")


def summed_buckets(
    named: Mapping[str, torch.Tensor], ctx: DistContext, *, bucket_cap_mb: float, call: str, is_traced: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the sums over the data ranks bucket by bucket, as views of what was reduced. Collective.

    Args:
        named: Dense tensors on the device of `ctx`, with the same names in the same order on every rank.
        ctx: The world.
        bucket_cap_mb: Size of the buckets in which tensors of one dtype travel, in MB; a larger tensor has its own.
        call: For which call of the user's, for debug mode.
        is_traced: Whether a transform of torch's looks on: then the sum is an operation that it can see.
    """
    for names in _packed(named, bucket_cap_mb * 2**20):
        members = {name: named[name] for name in names}
        flat = torch.cat([each.reshape(-1) for each in members.values()])
        if is_traced:
            total: Any = _Summed.apply(flat, ctx)
        else:
            ctx.comm.announce(call, members)
            total = ctx.comm.all_reduce(flat, "sum", DATA)
        parts = total.split([each.numel() for each in members.values()])
        yield {name: part.view(members[name].shape) for name, part in zip(members, parts, strict=True)}


def _packed(named: Mapping[str, torch.Tensor], max_bytes: float) -> list[list[str]]:
    """Return the names of each bucket: neighbours of one dtype, as many as fit."""
    buckets: list[list[str]] = []
    for dtype in sorted({each.dtype for each in named.values()}, key=str):
        room = -1.0
        for name, each in named.items():
            if each.dtype != dtype:
                continue
            if each.nbytes > room:
                buckets.append([])
                room = max_bytes
            buckets[-1].append(name)
            room -= each.nbytes
    return buckets
