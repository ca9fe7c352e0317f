"""Random streams: process-wide generators seeded by rule, and generators derived by folding integers into a seed."""

from __future__ import annotations

import random

import numpy as np
import torch

from faccel.context import DistContext
from faccel.effects import AMBIENT, effectful
from faccel.mix import mix


def fold_in(seed: int, *ints: int) -> torch.Generator:
    """Return a CPU generator whose stream depends on all the integers, and on nothing else.

    Effects: pure.

    Args:
        seed: Any integer.
        *ints: More: an epoch, a step, a rank, ...

    Examples:
        >>> import torch
        >>> draws = [torch.rand((), generator=fold_in(0, 3, rank)).item() for rank in (0, 1, 0)]
        >>> draws[0] == draws[2] != draws[1]
        True
    """
    return torch.Generator().manual_seed(mix(seed, *ints))


@effectful(AMBIENT)
def seed_everything(seed: int, ctx: DistContext, *, per_data_rank: bool = False) -> None:
    """Seed the process-wide generators of torch (every device), numpy and python.

    Effects: ambient.

    Call it before the models are built: the same streams on every rank. Call it again with `per_data_rank=True` when
    they are wrapped: from then on ranks that read different data draw different dropout masks, and ranks that share
    data (tensor and pipeline parallel) draw the same.

    Args:
        seed: Any integer.
        ctx: The world.
        per_data_rank: Whether `ctx.data_rank` is folded in.

    Examples:
        >>> import torch
        >>> from faccel.testing import simulate
        >>> def draw(ctx, per_data_rank):
        ...     seed_everything(0, ctx, per_data_rank=per_data_rank)
        ...     return torch.rand(()).item()
        >>> len(set(simulate(draw, 3, False))), len(set(simulate(draw, 3, True)))
        (1, 3)
    """
    number = mix(seed, ctx.data_rank + 1) if per_data_rank else seed % 2**64
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.manual_seed(number)
