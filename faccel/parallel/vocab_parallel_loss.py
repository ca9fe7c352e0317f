"""Cross-entropy of logits whose vocabulary is sharded over the axis `tp`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from faccel.checks import instance_of, one_of
from faccel.context import DistContext, require_context
from faccel.device_table import is_host
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import DataError, ModelError, short_repr
from faccel.protocols import Collectives
from faccel.tree import is_dtensor

_AXIS = "tp"
_REDUCTIONS = ("mean", "sum", "none")


@effectful(COLLECTIVE)
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ctx: DistContext,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross-entropy of each target, without gathering the vocabulary.

    Effects: collective. Reduces three numbers per target over the axis `tp` (Megatron-LM, Shoeybi
    et al. 2019, section 3), none for full logits. Backward communicates nothing.

    Unlike `loss_parallel`, it needs no context around backward, and works in pipelines.

    Args:
        logits: `T[..., vocabulary]`: of a layer in the style `"colwise_loss"`, or full ones.
        targets: `int64[...]`, equal on the ranks of one `tp` group.
        ctx: The context.
        ignore_index: Targets with this value have the loss 0, and `"mean"` does not count them.
        reduction: `"mean"`, `"sum"`, or `"none"` for a loss of the shape of `targets`.

    Returns:
        `T[]` or `T[...]`, in fp32 for 16-bit logits. Equal on the ranks of one `tp` group.

    Raises:
        ConfigError: `reduction` is unknown.
        DataError: `targets` has another shape, or a target is outside of the vocabulary.
        ModelError: The logits are sharded along another dimension than the last, or unevenly.

    Examples:
        >>> from faccel.testing import fake_context
        >>> logits = torch.tensor([[0.0, 0.0], [4.0, 4.0]])
        >>> cross_entropy(logits, torch.tensor([1, -100]), fake_context(0, 1))
        tensor(0.6931)
    """
    require_context(ctx, "faccel.parallel.cross_entropy(logits, targets, ctx)")
    one_of("reduction", reduction, _REDUCTIONS)
    instance_of("logits", logits, Tensor, fix="pass the output of the model")
    instance_of("targets", targets, Tensor, fix="pass `int64[...]`, as in `batch[:, 1:]`")
    if targets.dtype != torch.int64:
        raise DataError(
            "`targets` must be int64", got=str(targets.dtype), fix="write `targets.long()`"
        )
    if not logits.ndim or logits.shape[:-1] != targets.shape:
        raise DataError(
            "`targets` must have the shape of `logits` without its last dimension",
            got=f"logits {list(logits.shape)}, targets {list(targets.shape)}",
            fix="pass `logits: [batch, length, vocabulary]` and `targets: [batch, length]`",
        )
    flat_targets = targets.reshape(-1)
    # Outside of the vocabulary no rank has a logit, and the loss would be wrong without an error.
    # Compared on the host only where it has the targets: a device would have to be waited for.
    if is_host(targets.device):
        _check_targets(flat_targets, logits.shape[-1], ignore_index)
    if is_dtensor(logits):
        losses = _sharded_losses(logits, flat_targets, ctx, ignore_index)
    else:
        # `cross_entropy` computes in fp32 under autocast only.
        flat = _at_least_fp32(logits.reshape(-1, logits.shape[-1]))
        losses = F.cross_entropy(flat, flat_targets, ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return losses.view(targets.shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (flat_targets != ignore_index).sum()


def _at_least_fp32(x: Tensor) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    return x


def _sharded_losses(logits: Any, targets: Tensor, ctx: DistContext, ignore_index: int) -> Tensor:
    """Return `T[n]`, the losses of `targets: int64[n]` from a DTensor of logits."""
    placements = logits.placements
    num_ranks = ctx.comm.size(_AXIS)
    is_by_column = len(placements) == 1 and placements[0].is_shard(logits.ndim - 1)
    if not is_by_column or logits.shape[-1] % num_ranks:
        raise ModelError(
            "the vocabulary of `logits` must be sharded evenly over `tp`",
            got=f"logits {list(logits.shape)} with the placements {placements}",
            fix='give the last layer the style `"colwise_loss"`',
        )
    # Each rank computes the gradient of its shard from all targets: nothing is added up afterwards.
    local = _at_least_fp32(logits.to_local().flatten(0, -2))
    return _ShardedCrossEntropy.apply(local, targets, ctx.comm, ignore_index)  # type: ignore[misc]


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    is_valid = (targets == ignore_index) | ((targets >= 0) & (targets < vocabulary))
    if not is_valid.all():
        raise DataError(
            f"a target must be in range({vocabulary}) or `ignore_index`",
            got=short_repr(targets[~is_valid][0].item()),
            fix=f"check the labels, or pass `ignore_index` (it is {ignore_index})",
        )


class _ShardedCrossEntropy(torch.autograd.Function):
    """`loss = log(sum_j exp(x_j - m)) - (x_t - m)` with `m = max_j x_j`.

    Each rank has the columns `j` of its shard; the maximum, the sum and the target's term are
    reduced over the ranks. The gradient is `softmax(x)_j - [j = t]`, from the columns of the rank.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        node: Any, x: Tensor, targets: Tensor, comm: Collectives, ignore_index: int
    ) -> Tensor:
        num_columns = x.shape[1]
        maximum = comm.all_reduce(x.max(1).values, "max", _AXIS)
        shifted = x - maximum[:, None]
        # Columns of other ranks: any index inside the shard, whose term is then set to 0.
        columns = targets - comm.rank(_AXIS) * num_columns
        is_local = (columns >= 0) & (columns < num_columns)
        columns = columns.clamp(0, num_columns - 1)[:, None]
        target_terms = shifted.gather(1, columns)[:, 0].masked_fill(~is_local, 0)
        exponentials = shifted.exp()
        sums = torch.stack([exponentials.sum(1), target_terms])
        denominator, target_term = comm.all_reduce(sums, "sum", _AXIS)
        is_counted = targets != ignore_index
        node.save_for_backward(
            exponentials.div_(denominator[:, None]), columns, is_local, is_counted
        )
        return (denominator.log() - target_term).masked_fill(~is_counted, 0)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        node: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        softmax, columns, is_local, is_counted = node.saved_tensors
        # A copy: backward may run a second time with `retain_graph`.
        grad_x = softmax.scatter_add(1, columns, -is_local[:, None].to(softmax.dtype))
        return grad_x.mul_(grad.masked_fill(~is_counted, 0)[:, None]), None, None, None
