"""Named tensors summed over the data ranks, many in one all-reduce."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from faccel.context import DistContext
from faccel.errors import ConfigError
from faccel.protocols import DATA

BUCKET_CAP_MB = 25.0


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
        raise ConfigError(
            "`bucket_cap_mb` must be positive", got=str(bucket_cap_mb), fix="leave it out for 25 MB"
        )


def check_replicas(ctx: DistContext, alternative: str) -> None:
    """Raise unless every rank has a full copy of the model.

    Args:
        ctx: The context whose mesh is checked.
        alternative: What else to do on this mesh, the last part of the fix; starts with a verb.
    """
    if not ctx.is_replicated:
        raise ConfigError(
            "the mesh must have replicas only, because every rank needs a full copy of the model",
            got=str(ctx.mesh.spec),
            fix=f"use `mesh=faccel.MeshSpec(dp_replicate={ctx.world_size})`, or {alternative}",
        )


def summed_buckets(
    named: dict[str, torch.Tensor],
    ctx: DistContext,
    *,
    bucket_cap_mb: float,
    call: str,
    is_traced: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the sums over the data ranks bucket by bucket, as views of what was reduced. Collective.

    Args:
        named: Dense tensors on the device of `ctx`, with the same names in the same order on every rank. It is emptied
            on the way, so that what nobody else holds is freed as soon as it has been packed.
        ctx: The world.
        bucket_cap_mb: Size of the buckets in which tensors of one dtype travel, in MB; a larger tensor has its own.
        call: For which call of the user's, for debug mode.
        is_traced: Whether a transform of torch's looks on: then the sum is an operation that it can see.
    """
    for names in packed(named, bucket_cap_mb):
        shapes = {name: named[name].shape for name in names}
        flat = torch.cat([named.pop(name).reshape(-1) for name in names])
        if is_traced:
            total: Any = _Summed.apply(flat, ctx)
        else:
            ctx.comm.set_call_label(call, _cut(flat, shapes))
            total = ctx.comm.all_reduce(flat, "sum", DATA)
        yield _cut(total, shapes)


def _cut(flat: torch.Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Return the tensors that lie one behind the other in `flat`, as views."""
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {
        name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)
    }


def packed(named: Mapping[str, torch.Tensor], bucket_cap_mb: float) -> list[list[str]]:
    """Return the names of each bucket: neighbours of one dtype, as many as fit."""
    max_bytes = bucket_cap_mb * 2**20
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
