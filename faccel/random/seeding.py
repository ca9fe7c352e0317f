"""Random streams: process-wide generators seeded by rule, and generators derived by folding integers into a seed."""

from __future__ import annotations

from typing import Any

import attrs
import torch

from faccel.context import DistContext
from faccel.effects import AMBIENT, effectful
from faccel.random.generators import Generators, seed_all
from faccel.random.hashing import mix


def generator(seed: int, *ints: int) -> torch.Generator:
    """Return a CPU generator whose stream depends on all the integers, and on nothing else.

    Effects: pure.

    Args:
        seed: Any integer.
        *ints: More: an epoch, a step, a rank, ...

    Examples:
        >>> import torch
        >>> draws = [torch.rand((), generator=generator(0, 3, rank)).item() for rank in (0, 1, 0)]
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
    seed_all(number)
    torch.manual_seed(number)  # the devices' too


@attrs.frozen(eq=False)
class RngState:
    """The process-wide generators at one moment, to be saved and set again.

    Args:
        torch: State of torch's CPU generator, uint8.
        numpy: State of numpy's.
        python: State of python's.
        device: State of the device's generator, uint8; None on a CPU.
    """

    torch: torch.Tensor = attrs.field(repr=False)
    numpy: Any = attrs.field(repr=False)
    python: Any = attrs.field(repr=False)
    device: torch.Tensor | None = attrs.field(repr=False)


@effectful(AMBIENT)
def rng_state(ctx: DistContext) -> RngState:
    """Return the state of this rank's process-wide generators.

    Effects: ambient. Reads them.

    Examples:
        >>> from faccel.testing import fake_context
        >>> state = rng_state(fake_context(0, 1))
        >>> first = torch.rand(())
        >>> set_rng_state(state)
        >>> bool(torch.rand(()) == first)
        True
    """
    now = Generators.current()
    kind = ctx.device.type
    device = None if kind == "cpu" else getattr(torch, kind).get_rng_state(ctx.device)
    return RngState(now.torch, now.numpy, now.python, device)


@effectful(AMBIENT)
def set_rng_state(state: RngState) -> None:
    """Make the process-wide generators go on from `state`.

    Effects: ambient. Writes them, and those of the current device where the state has them.

    Examples:
        >>> from faccel.testing import fake_context
        >>> set_rng_state(rng_state(fake_context(0, 1)))
    """
    Generators(state.torch, state.numpy, state.python).restore()
    if state.device is not None:
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        getattr(torch, accelerator.type).set_rng_state(state.device)
