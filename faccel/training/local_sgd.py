"""Local SGD: replicas that train on their own and are averaged now and then (Stich, 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs
import torch

from faccel.comm.buckets import check_cap, check_replicas, summed_buckets
from faccel.comm.tensors import tensor_leaves
from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import ConfigError
from faccel.training.model import WrappedModel, unwrap
from faccel.tree import leaf_error


@attrs.frozen
class SyncInfo:
    """What one `local_sgd` did.

    Args:
        synced: Whether parameters were averaged, so that all data ranks hold the same now.
        num_bytes: How much this rank put into all-reduces; 0 on one process.
    """

    synced: bool
    num_bytes: int


@effectful(COLLECTIVE)
def averaged(
    params: Mapping[str, torch.Tensor], ctx: DistContext, *, bucket_cap_mb: float = 25.0
) -> dict[str, torch.Tensor]:
    """Return the mean of every data rank's `params`.

    Effects: collective. Every rank must call it, with the same names, shapes and dtypes. One all-reduce per bucket.

    Args:
        params: Floating point tensors by name: this replica's.
        ctx: The world; its mesh has replicas only.
        bucket_cap_mb: Size of the buckets in which tensors of one dtype travel, in MB; a larger tensor has its own.

    Returns:
        The same names, shapes and dtypes, equal on every rank. Always fresh: `params` are neither written nor aliased,
        even when there is one rank.

    Raises:
        ConfigError: The mesh shares parameters between ranks, or `bucket_cap_mb` is not positive.
        DesyncError: Ranks sent other tensors (on the CPU; see `reduce`).
        TreeError: A value is not a dense floating point tensor; names it.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: averaged({"w": torch.tensor([1.0, ctx.rank])}, ctx), 2)[0]
        {'w': tensor([1.0000, 0.5000])}
    """
    means = {
        name: mean
        for bucket in _buckets(params, ctx, bucket_cap_mb)
        for name, mean in bucket.items()
    }
    return {
        name: means[name].clone() for name in params
    }  # of their own: none keeps a whole bucket alive


def _buckets(
    params: Mapping[str, torch.Tensor], ctx: DistContext, bucket_cap_mb: float
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the means bucket by bucket, as views of what was reduced, in the same order on every rank."""
    check_replicas(ctx, "train without `local_sgd`")
    check_cap(bucket_cap_mb)
    by_name = {
        name: params[name] for name in sorted(params)
    }  # ranks may have filled a mapping in another order
    leaves, _ = tensor_leaves(by_name, ctx)
    for i, leaf in enumerate(leaves):
        if not (leaf.is_floating_point() or leaf.is_complex()):
            raise leaf_error(
                by_name, i, "only floating point tensors have a mean of their dtype", "leave it out"
            )
    named = dict(zip(by_name, leaves, strict=True))
    for sums in summed_buckets(named, ctx, bucket_cap_mb=bucket_cap_mb, call="local_sgd"):
        yield {name: total.div_(ctx.data_world_size) for name, total in sums.items()}


@effectful(updates("model"), COLLECTIVE)
def local_sgd(
    model: WrappedModel, ctx: DistContext, *, step: int, every: int, bucket_cap_mb: float = 25.0
) -> SyncInfo:
    """Average the parameters of `model` over the data ranks where `step` is a multiple of `every`.

    Effects: updates model, collective. On other steps it communicates nothing and changes nothing. Every rank must call
    it with the same `step` and `every`.

    Between two averages each rank trains on its own: put forward and backward into `grad_sync(model, on=False)`.
    Parameters that require no gradient are left out, as are buffers and the states of optimizers, which stay each
    rank's own. Evaluate and save after an average: before it, ranks hold different models.

    Args:
        model: From `wrap`.
        ctx: The world; its mesh has replicas only.
        step: How many updates are done; 1 after the first.
        every: Updates from one average to the next. 1 with plain SGD is what DDP computes.
        bucket_cap_mb: As in `averaged`.

    Raises:
        ConfigError: The mesh shares parameters between ranks, or `step`, `every` or `bucket_cap_mb` is not positive.
        ModelError: `model` is not wrapped.
        DesyncError: As in `averaged`.

    Examples:
        >>> from faccel.training.model import grad_sync, wrap
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(2, 1), ctx)
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for step in range(1, 5):
        ...     with grad_sync(model, on=False):
        ...         model(torch.zeros(3, 2)).sum().backward()
        ...     opt.step()
        ...     info = local_sgd(model, ctx, step=step, every=4)
        >>> info
        SyncInfo(synced=True, num_bytes=0)
    """
    params = {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}
    check_replicas(ctx, "train without `local_sgd`")
    for name, value in (("step", step), ("every", every)):
        if value < 1:
            fix = (
                "count updates that are done, from 1 on"
                if name == "step"
                else "write `every=1` or more"
            )
            raise ConfigError(f"`{name}` must be positive", got=f"{name}={value}", fix=fix)
    if step % every:
        return SyncInfo(synced=False, num_bytes=0)
    with torch.no_grad():
        for bucket in _buckets(params, ctx, bucket_cap_mb):
            for name, mean in bucket.items():
                params[name].copy_(mean)
    is_sent = ctx.data_world_size > 1
    return SyncInfo(synced=True, num_bytes=sum(p.nbytes for p in params.values()) if is_sent else 0)
