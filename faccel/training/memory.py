"""Memory of models and tensors that the script has dropped."""

from __future__ import annotations

import gc

from faccel import device_table
from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, effectful


@effectful(AMBIENT)
def empty_cache(ctx: DistContext) -> None:
    """Return memory that PyTorch keeps for later tensors to the device of the context.

    Effects: ambient. Waits for the device. Does nothing on the CPU. Tensors that are in use stay.

    Another process, or a library that allocates memory itself, can use it then. Between steps of
    one script it is slow and frees nothing that PyTorch would not reuse.

    Args:
        ctx: The context. Ranks may call it alone.

    Examples:
        >>> from faccel.testing import fake_context
        >>> empty_cache(fake_context(0, 1))
    """
    require_context(ctx, "faccel.parallel.empty_cache(ctx)")
    device_table.empty_cache(ctx.device)


@effectful(AMBIENT)
def free_memory(ctx: DistContext) -> None:
    """Free what the script has dropped, and return its memory to the device.

    Effects: ambient. Runs Python's garbage collector, and `empty_cache`.

    Write `del model, opt` before: a context refers to its models and optimizers weakly, so that the
    script has the last references. Engines have reference cycles, which wait for the collector.

    Args:
        ctx: The context. Ranks may call it alone.

    Examples:
        >>> import torch, weakref
        >>> from faccel.testing import fake_context
        >>> from faccel.training.model import wrap
        >>> ctx = fake_context(0, 1)
        >>> model = wrap(torch.nn.Linear(2, 1), ctx)
        >>> weight = weakref.ref(model.module.weight)
        >>> del model
        >>> free_memory(ctx)
        >>> weight() is None
        True
    """
    require_context(ctx, "faccel.parallel.free_memory(ctx)")
    # First: the cache has the memory of a tensor only after the tensor is gone.
    gc.collect()
    device_table.empty_cache(ctx.device)
