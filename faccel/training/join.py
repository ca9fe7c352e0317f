"""Training while ranks have different numbers of batches."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from faccel.context import DistContext, require_context
from faccel.effects import COLLECTIVE, effectful, updates
from faccel.errors import ConfigError
from faccel.training.model import WrappedModel, check_context, check_wrapped


@effectful(updates("model"), updates("opt"), COLLECTIVE)
def join(
    model: WrappedModel,
    opt: Optimizer,
    ctx: DistContext,
    *,
    scheduler: LRScheduler | Sequence[LRScheduler] | None = None,
) -> AbstractContextManager[None]:
    """Return a context in which ranks may make different numbers of updates (`tail="uneven"`).

    Effects: updates model, updates opt, collective. At the end all ranks have the same state.

    A rank without batches leaves the context. It then takes part in the updates of the other ranks
    with zero gradients, until all ranks have left. Afterwards every rank copies the model and the
    states of `opt` and `scheduler` from a rank that made the last update.

    A gradient is the sum over the ranks that still train, divided by the number of *all* data
    ranks: the last updates are smaller. Inside, call nothing else that is collective, such as
    `reduce` or `save`, and train no other model. One backward is one update, without `windows`.
    Random states, cursors and counters are not synchronized.

    Args:
        model: From `wrap`.
        opt: From `wrap_optimizer`, the one that steps inside.
        ctx: The context; its mesh has replicas only.
        scheduler: One scheduler or several, those that step inside.

    Raises:
        ConfigError: The mesh or the engine shards parameters or optimizer states. Or the precision
            is fp16: loss scales of the ranks would differ.
        ModelError: `model` is not wrapped, or was wrapped with another context.
        RankFailedError: Another rank left or failed; names it.

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
    require_context(ctx, "faccel.parallel.join(model, opt, ctx)")
    check_wrapped(model)
    check_context(model, ctx)
    # A rank without batches sees no overflow, and would keep its scale.
    if ctx.data_world_size > 1 and ctx.config.mixed_precision == "fp16":
        raise ConfigError(
            "`join` does not support fp16: ranks that end early would have other loss scales",
            got='mixed_precision="fp16"',
            fix='use `mixed_precision="bf16"`, or `tail="pad"`',
        )
    # Schedulers are states like the optimizer: the ranks that ended early have moved them less.
    if scheduler is None:
        schedulers: Sequence[LRScheduler] = ()
    elif isinstance(scheduler, Sequence):
        schedulers = scheduler
    else:
        schedulers = (scheduler,)
    ctx.comm.begin_call("join")
    return _joining(model.parallelism.join(model.engine, (opt, *schedulers), ctx), ctx)


@contextmanager
def _joining(context: AbstractContextManager[None], ctx: DistContext) -> Generator[None]:
    # The mark allows `scaled_backward` while a loader with an uneven tail is iterated.
    with context, ctx.lifetime.join():
        yield
