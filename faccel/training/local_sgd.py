"""Local SGD: replicas train independently, with averages in between (Stich, 2019)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import attrs
import torch

from faccel.checks import positive
from faccel.comm.buckets import check_cap, check_replicas, summed_buckets
from faccel.comm.tensors import tensor_leaves
from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.training.model import WrappedModel, check_context, unwrap
from faccel.tree import leaf_error


@attrs.frozen
class SyncInfo:
    """The result of one `local_sgd`.

    Args:
        synced: Whether parameters were averaged, so that they are equal on all data ranks now.
        num_bytes: Bytes that this rank sent into all-reduces; 0 on one process.
        fragments: The fragments that `diloco` synchronised, of `DilocoState.num_fragments`; empty
            for `local_sgd`.
    """

    synced: bool
    num_bytes: int
    fragments: tuple[int, ...] = ()


@effectful(COLLECTIVE)
def averaged(
    params: Mapping[str, torch.Tensor], ctx: DistContext, *, bucket_cap_mb: float = 25.0
) -> dict[str, torch.Tensor]:
    """Return the mean of `params` over the data ranks.

    Effects: collective. Every rank must call it, with the same names, shapes and dtypes. One
    all-reduce per bucket.

    Args:
        params: Floating point tensors by name, of this replica.
        ctx: The context; its mesh has replicas only.
        bucket_cap_mb: Size of a bucket in MB. Tensors of one dtype are reduced together in
            buckets; a larger tensor is a bucket by itself.

    Returns:
        The same names, shapes and dtypes, equal on every rank. The tensors are new: they never
        alias `params`, also on one process.

    Raises:
        ConfigError: The mesh shards parameters, or `bucket_cap_mb` is not positive.
        DesyncError: Ranks passed different tensors (on the CPU; see `reduce`).
        TreeError: A value is not a dense floating point tensor; names it.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: averaged({"w": torch.tensor([1.0, ctx.rank])}, ctx), 2)[0]
        {'w': tensor([1.0000, 0.5000])}
    """
    require_context(ctx, "faccel.parallel.averaged(params, ctx)")
    means: dict[str, torch.Tensor] = {}
    for bucket in averaged_buckets(params, ctx, bucket_cap_mb):
        means |= bucket
    # Clones, because a view would keep the memory of its whole bucket alive.
    return {name: means[name].clone() for name in params}


def averaged_buckets(
    params: Mapping[str, torch.Tensor], ctx: DistContext, bucket_cap_mb: float
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the means by bucket, as views of the reduced bucket, in one order on all ranks."""
    check_replicas(ctx, "train without `local_sgd`")
    check_cap(bucket_cap_mb)
    # Sorted, because ranks may have filled the mapping in different orders.
    sorted_params = dict(sorted(params.items()))
    leaves, _ = tensor_leaves(sorted_params, ctx)
    # The mean of integers is no integer: the result could not have their dtype.
    for index, leaf in enumerate(leaves):
        if not (leaf.is_floating_point() or leaf.is_complex()):
            problem = "`averaged` expects floating point tensors"
            raise leaf_error(sorted_params, index, problem, "leave it out")
    by_name = dict(zip(sorted_params, leaves, strict=True))
    for sums in summed_buckets(by_name, ctx, bucket_cap_mb=bucket_cap_mb, call="local_sgd"):
        # In place: the sums belong to no one else.
        yield {name: total.div_(ctx.data_world_size) for name, total in sums.items()}


@effectful(updates("model"), COLLECTIVE)
def local_sgd(
    model: WrappedModel, ctx: DistContext, *, step: int, every: int, bucket_cap_mb: float = 25.0
) -> SyncInfo:
    """Average the parameters of `model` over the data ranks if `step` is a multiple of `every`.

    Effects: updates model, collective. On other steps it communicates and changes nothing. Every
    rank must call it with the same `step` and `every`.

    Run forward, backward and `optimizer_step` inside `grad_sync(model, on=False)`, so that ranks
    train independently between two averages. Frozen parameters, buffers and optimizer states are
    not averaged. Evaluate and save after an average; at other steps ranks have different models.

    Args:
        model: From `wrap`.
        ctx: The context; its mesh has replicas only.
        step: The number of updates made so far; 1 after the first.
        every: The number of updates between two averages. 1 with plain SGD is equivalent to DDP.
        bucket_cap_mb: As in `averaged`.

    Raises:
        ConfigError: The mesh shards parameters, or `step`, `every` or `bucket_cap_mb` is not
            positive.
        ModelError: `model` is not wrapped, or was wrapped with another context.
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
        SyncInfo(synced=True, num_bytes=0, fragments=())
    """
    require_context(ctx, "faccel.parallel.local_sgd(model, ctx)")
    trainable = {
        name: param for name, param in unwrap(model).named_parameters() if param.requires_grad
    }
    check_context(model, ctx)
    check_replicas(ctx, "train without `local_sgd`")
    positive("step", step)
    positive("every", every)
    # Checked on every step, so that a mistake does not wait for the first average.
    if step % every:
        return SyncInfo(synced=False, num_bytes=0)
    # Bucket by bucket, so that memory never holds a second copy of all parameters.
    with torch.no_grad():
        for bucket in averaged_buckets(trainable, ctx, bucket_cap_mb):
            for name, mean in bucket.items():
                trainable[name].copy_(mean)
    num_bytes = 0
    # One process averages with itself, without a collective.
    if ctx.data_world_size > 1:
        num_bytes = sum(param.nbytes for param in trainable.values())
    return SyncInfo(synced=True, num_bytes=num_bytes)
