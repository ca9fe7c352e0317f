"""Named tensors summed over the data ranks, many in one all-reduce."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from faccel.checks import positive
from faccel.context import DistContext
from faccel.errors import ConfigError
from faccel.mesh import DATA

BUCKET_CAP_MB = 25.0  # MiB, the default of `DistributedDataParallel`


class _AllReduceSum(torch.autograd.Function):
    """The sum over the data ranks as a PyTorch operation that can be differentiated and vmapped.

    `y = sum_r x_r` on every rank, so the gradient of `x_r` is the sum of the ranks' gradients of
    `y`.
    """

    @staticmethod
    def forward(x: torch.Tensor, ctx: DistContext) -> torch.Tensor:
        # A transform may pass a view with other strides; collectives need contiguous tensors.
        return ctx.comm.all_reduce(x.contiguous(), "sum", DATA)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[torch.Tensor, DistContext], output: torch.Tensor
    ) -> None:
        ctx.world = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Applied again instead of a plain all-reduce, so that the second derivative exists, too.
        return _AllReduceSum.apply(grad_outputs[0], ctx.world), None  # type: ignore[return-value]

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int | None, ...], *args: torch.Tensor | DistContext
    ) -> tuple[torch.Tensor, int | None]:
        # The sum is element-wise: one all-reduce of the batched tensor sums each of its slices.
        return _AllReduceSum.apply(*args), in_dims[0]  # type: ignore[return-value]


def check_cap(bucket_cap_mb: float) -> None:
    """Raise unless the size of buckets is positive."""
    positive("bucket_cap_mb", bucket_cap_mb)


def check_replicas(ctx: DistContext, alternative: str) -> None:
    """Raise unless every rank has a full copy of the model.

    Args:
        ctx: The context whose mesh is checked.
        alternative: A fix that keeps the mesh; the message ends with it, so it starts with a verb.
    """
    if not ctx.is_replicated:
        raise ConfigError(
            "the mesh must have replicas only, because every rank needs a full copy of the model",
            got=str(ctx.mesh.spec),
            fix=f"use `mesh=faccel.MeshSpec(dp_replicate={ctx.world_size})`, or {alternative}",
        )


def summed_buckets(
    tensors: dict[str, torch.Tensor],
    ctx: DistContext,
    *,
    bucket_cap_mb: float,
    call: str,
    is_traced: bool = False,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the sums over the data ranks, bucket by bucket, as views of the reduced tensor.

    Effects: updates tensors, collective. Removes every tensor, to free its memory once it is
    packed.

    Args:
        tensors: Dense tensors on the device of `ctx`, with the same names in the same order on
            every rank.
        ctx: The world.
        bucket_cap_mb: Largest size of a bucket, in MiB. Its tensors have one dtype; a larger tensor
            has its own bucket.
        call: Name of the user's call, for debug mode.
        is_traced: Whether a transform of PyTorch records the sum, which must then be an operation.
    """
    for names in assign_buckets(tensors, bucket_cap_mb):
        shapes = {name: tensors[name].shape for name in names}
        # The tensors have no other name here, so that their memory is free when the all-reduce
        # copies `flat`. A loop variable would keep the last one alive.
        flat = torch.cat([tensors.pop(name).reshape(-1) for name in names])
        if is_traced:
            # No label: `all_reduce` does not read it in a compiled graph, so that it would
            # describe a later reduction.
            total: torch.Tensor = _AllReduceSum.apply(flat, ctx)  # type: ignore[assignment]
        else:
            ctx.comm.set_call_label(call, _views(flat, shapes))
            total = ctx.comm.all_reduce(flat, "sum", DATA)
        yield _views(total, shapes)


def _views(flat: torch.Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Return the tensors that are concatenated in `flat`, as views."""
    pieces = flat.split([shape.numel() for shape in shapes.values()])
    views: dict[str, torch.Tensor] = {}
    for name, piece in zip(shapes, pieces, strict=True):
        views[name] = piece.view(shapes[name])
    return views


def assign_buckets(tensors: Mapping[str, torch.Tensor], bucket_cap_mb: float) -> list[list[str]]:
    """Return the names of each bucket: successive tensors of one dtype, as many as fit.

    Effects: pure.

    Examples:
        >>> row = torch.zeros(2**18)  # 1 MiB
        >>> assign_buckets({"a": row, "b": row.bool(), "c": row, "d": row}, bucket_cap_mb=2)
        [['b'], ['a', 'c'], ['d']]
    """
    max_bytes = bucket_cap_mb * 2**20
    buckets: list[list[str]] = []
    # Buckets are matched by position, so every rank needs the same order of dtypes. A set has none,
    # and a dtype has no `<`.
    for dtype in sorted({tensor.dtype for tensor in tensors.values()}, key=str):
        free_bytes = -1.0  # the first tensor of a dtype opens a bucket
        for name, tensor in tensors.items():
            if tensor.dtype != dtype:
                continue
            if tensor.nbytes > free_bytes:
                buckets.append([])
                free_bytes = max_bytes
            # Negative after a tensor above the cap: it stays alone, even before an empty tensor.
            buckets[-1].append(name)
            free_bytes -= tensor.nbytes
    return buckets
