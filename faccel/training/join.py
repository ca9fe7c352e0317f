"""Training while ranks have different numbers of batches."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from faccel.context import DistContext
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import ConfigError
from faccel.training.model import WrappedModel, unwrap


@effectful(updates("model"), updates("opt"), COLLECTIVE)
def join(
    model: WrappedModel,
    opt: Optimizer,
    ctx: DistContext,
    *,
    scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
) -> AbstractContextManager[None]:
    """Make a context in which ranks may train for different numbers of updates, as on `tail="uneven"`.

    Effects: updates model, updates opt, collective. A rank that has no batch left leaves the context, and takes part in
    the updates of the others with gradients of zero until all have left. Then every rank takes the model, the state of
    `opt` and that of `scheduler` from a rank that stepped to the end, so that training can go on.

    A gradient is the sum over the ranks that still train, divided by the number of *all* data ranks: the last updates
    are smaller. Inside, do nothing else that is collective, such as `reduce` or `save`, and train no other model; one
    backward is one update, without `windows`. Random states, cursors and counts stay each rank's own.

    Args:
        model: From `wrap`.
        opt: From `wrap_optimizer`, the one that steps inside.
        ctx: The world; its mesh has replicas only.
        scheduler: One or several, those that are moved inside.

    Raises:
        ConfigError: The mesh shares parameters between ranks, the precision is fp16, whose loss scales would come to
            differ, or states of optimizers are spread over ranks.
        ModelError: `model` is not wrapped.
        RankFailedError: Another rank left, or failed before its end; names it.

    Examples:
        >>> import torch
        >>> from faccel.training.model import wrap
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(2, 1), ctx)
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with join(model, opt, ctx):
        ...     for x in torch.zeros(3, 2):
        ...         model(x).sum().backward()
        ...         opt.step()
    """
    unwrap(model)
    if ctx.data_world_size > 1 and ctx.config.mixed_precision == "fp16":
        raise ConfigError(
            "ranks that end at different updates would scale their losses differently",
            got='mixed_precision="fp16"',
            fix='use `mixed_precision="bf16"`, or `tail="pad"`',
        )
    schedulers = (scheduler,) if isinstance(scheduler, LRScheduler) else tuple(scheduler or ())
    return _joining(model.parallelism.join(model.engine, (opt, *schedulers), ctx), ctx)


@contextmanager
def _joining(context: AbstractContextManager[None], ctx: DistContext) -> Generator[None]:
    with context, ctx.lifetime.join():
        yield
