"""Random streams: seeding the process-wide generators, and deriving generators from integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch

from faccel.checks import instance_of
from faccel.context import DistContext, require_context
from faccel.device_table import default_generator, is_host, without_stage_warnings
from faccel.effects import AMBIENT, effectful
from faccel.random.generators import Generators, seed_all
from faccel.random.hashing import mix

if TYPE_CHECKING:
    from faccel.random.generators import NumpyState, PythonState


def generator(seed: int, *ints: int) -> torch.Generator:
    """Return a CPU generator whose stream depends on the integers only.

    Effects: pure.

    Args:
        seed: Any integer.
        *ints: Further integers: an epoch, a step, a rank, ...

    Examples:
        >>> import torch
        >>> draws = [torch.rand((), generator=generator(0, 3, rank)).item() for rank in (0, 1, 0)]
        >>> draws[0] == draws[2] != draws[1]
        True
    """
    return torch.Generator().manual_seed(mix(seed, *ints))


@effectful(AMBIENT)
def seed_everything(seed: int, ctx: DistContext, *, per_data_rank: bool = False) -> None:
    """Seed the process-wide generators of torch (on every device), NumPy and Python.

    Effects: ambient. Call it before the models are created: every rank initializes them equally.
    Call it again with `per_data_rank=True` after `wrap`: ranks that read different samples then
    draw different dropout masks. Ranks of one data rank (tensor and pipeline parallel) draw the
    same.

    It does not change the order of the data, which `shard` computes from its own `seed`: pass
    `faccel.init(seed=...)`, `shard(..., seed=...)` or a `generator` to the loader.

    Args:
        seed: Any integer.
        ctx: The context.
        per_data_rank: Whether to fold in `ctx.data_rank`.

    Raises:
        ConfigError: `seed` is not an int.

    Examples:
        >>> import torch
        >>> from faccel.testing import simulate
        >>> def draw(ctx, per_data_rank):
        ...     seed_everything(0, ctx, per_data_rank=per_data_rank)
        ...     return torch.rand(()).item()
        >>> len(set(simulate(draw, 3, False))), len(set(simulate(draw, 3, True)))
        (1, 3)
    """
    instance_of("seed", seed, int, fix="write `faccel.seed_everything(0, ctx)`")
    seed = seed % 2**64  # `torch.manual_seed` raises on larger ones
    if per_data_rank:
        seed = mix(seed, ctx.data_rank + 1)
    seed_all(seed)
    with without_stage_warnings():
        torch.manual_seed(seed)  # of the devices, too


@attrs.frozen(eq=False)
class RngState:
    """The state of the process-wide generators, to be saved and restored.

    Args:
        torch: `uint8[n]`, state of torch's CPU generator.
        numpy: State of NumPy's generator, as `np.random.get_state` returns it.
        python: State of Python's generator, as `random.getstate` returns it.
        device: `uint8[n]`, state of the device's generator; None on a CPU.
    """

    torch: torch.Tensor = attrs.field(repr=False)
    numpy: NumpyState = attrs.field(repr=False)
    python: PythonState = attrs.field(repr=False)
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
    require_context(ctx, "faccel.rng_state(ctx)")
    host = Generators.current()
    device_state = None
    if not is_host(ctx.device):
        device_state = default_generator(ctx.device).get_state()
    return RngState(host.torch, host.numpy, host.python, device_state)


@effectful(AMBIENT)
def set_rng_state(state: RngState) -> None:
    """Set the process-wide generators to `state`, from which they continue.

    Effects: ambient. Writes them, and the generator of the current device if the state has one.

    Examples:
        >>> from faccel.testing import fake_context
        >>> set_rng_state(rng_state(fake_context(0, 1)))
    """
    Generators(state.torch, state.numpy, state.python).restore()
    if state.device is not None:
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        index = torch.accelerator.current_device_index()
        default_generator(torch.device(accelerator.type, index)).set_state(state.device)
