"""Random numbers of a step: a generator seeded from the state, and its stand-ins under transforms.

A step draws from a `torch.Generator` that depends on the seed and the step of the state and on the
data rank. PyTorch's transforms cannot trace a generator: there a `NoGenerator` takes its place.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from faccel.context import DistContext
from faccel.device_table import default_generator, is_host
from faccel.errors import PurityError
from faccel.random.hashing import mix

_DROPOUT_LAYERS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.RReLU,
)


def _is_random(layer: nn.Module) -> bool:
    """Return whether a layer of PyTorch's draws random numbers in its current mode."""
    if not layer.training:
        return False
    if isinstance(layer, _DROPOUT_LAYERS):
        rate = getattr(layer, "p", 1.0)  # RReLU has no `p` and always draws
    else:
        # Attention and recurrent layers store a number; other modules may store a layer there.
        rate = getattr(layer, "dropout", 0.0)
    return isinstance(rate, float) and rate > 0


class NoGenerator:
    """Takes the place of a generator under a PyTorch transform, where drawing is an error."""

    def check_model(self, model: nn.Module) -> None:
        """Raise PurityError if a layer of `model` would draw."""
        # Only layers can be found: a call of `F.dropout` in a forward is not detected.
        for module in model.modules():
            if _is_random(module):
                self.check_draw(f"a {type(module).__name__} in training mode")

    def check_draw(self, description: str) -> None:
        """Raise PurityError: nothing may be drawn here."""
        raise PurityError(
            "the loss function draws random numbers under a PyTorch transform, "
            "which cannot trace a generator",
            got=description,
            fix="write `compiled(step, ctx)` instead of `torch.compile(step)`, "
            "`ensemble(step, ctx)` instead of `torch.vmap(step)`, or pass a generator: "
            "`step(state, batch, generator)`",
        )


class GraphGenerator(NoGenerator):
    """Takes the place of a generator in a compiled graph that draws from the default generator.

    Drawing is allowed, because `compiled` seeds the default generator before each call.
    """

    def check_model(self, model: nn.Module) -> None:
        """Accept any model."""

    def check_draw(self, description: str) -> None:
        """Accept any draw."""


RandomSource = torch.Generator | NoGenerator


def reseed(
    generator: torch.Generator, seed: torch.Tensor, step: torch.Tensor, ctx: DistContext
) -> torch.Generator:
    """Seed a generator in place from the seed and step of a state and the data rank; return it.

    Of stacked states, `int64[k]`, the first one's numbers are used.
    """
    if seed.ndim:
        seed = seed[0]
        step = step[0]
    # Numbers of one step do not depend on the steps before: a resumed run draws the same.
    return generator.manual_seed(mix(int(seed), ctx.data_rank, int(step)))


def clone_generator(generator: RandomSource) -> RandomSource:
    """Return a generator that will return the same numbers as this one."""
    if isinstance(generator, torch.Generator):
        return generator.clone_state()
    return generator


@contextmanager
def as_default_generator(generator: torch.Generator) -> Generator[None]:
    """Run the body with the default generator of the device in the state of `generator`.

    Layers such as dropout draw from the default generator only. `generator` advances as if they
    had drawn from it; the state of the default generator is restored.
    """
    default = default_generator(generator.device)
    # A copy of 5 kB: little beside a step.
    saved_state = default.get_state()
    default.set_state(generator.get_state())
    try:
        yield
    finally:
        # The next layer or micro-batch continues where this one stopped.
        generator.set_state(default.get_state())
        default.set_state(saved_state)


def device_rng_state(ctx: DistContext) -> torch.Tensor | None:
    """Return the state of the default generator of the device; None on a CPU.

    The CPU's is compared by `faccel.random.generators`, without a copy.
    """
    if is_host(ctx.device):
        return None
    return default_generator(ctx.device).get_state()
