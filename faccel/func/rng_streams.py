"""Randomness of a step: a generator made of numbers in the state, and what says that somebody drew from another."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from faccel.context import DistContext
from faccel.errors import PurityError
from faccel.random.hashing import mix

_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.RReLU,
)


def _draws(layer: nn.Module) -> bool:
    if not layer.training:
        return False
    rate = (
        getattr(layer, "p", 1.0) if isinstance(layer, _DROPOUTS) else getattr(layer, "dropout", 0.0)
    )
    return (
        isinstance(rate, float) and rate > 0
    )  # attention and recurrent layers have a number of that name


class NoStream:
    """Stands where a generator would, inside of a transform of torch's that cannot have one; drawing is an error."""

    def check(self, model: nn.Module) -> None:
        """Refuse a model that would draw."""
        drawing = (type(each).__name__ for each in model.modules() if _draws(each))
        name = next((each for each in drawing), None)
        if name is not None:
            self.draw(f"a {name} in training mode")

    def draw(self, got: str) -> None:
        """Refuse a draw."""
        raise PurityError(
            "torch.compile and vmap cannot see through a generator, so that nothing random may happen in here",
            got=got,
            fix="write `compiled(step, ctx)` instead of `torch.compile(step)`, `ensemble(step, ctx)` instead of "
            "`vmap`, or pass a generator: `step(state, batch, generator)`",
        )


class InGraph(NoStream):
    """Stands where a generator would, inside of a graph whose caller has seeded what the graph draws from."""

    def check(self, model: nn.Module) -> None:
        """Refuse nothing."""

    def draw(self, got: str) -> None:
        """Refuse nothing."""


Stream = torch.Generator | NoStream


def seeded(
    generator: torch.Generator, seed: torch.Tensor, step: torch.Tensor, ctx: DistContext
) -> torch.Generator:
    """Let a generator begin anew, from the numbers of a state (of an ensemble the first one's) and the data rank."""
    if seed.ndim:
        seed, step = seed[0], step[0]
    return generator.manual_seed(mix(int(seed), ctx.data_rank, int(step)))


def again(generator: Stream) -> Stream:
    """Return a generator that will give what this one is about to give."""
    return generator.clone_state() if isinstance(generator, torch.Generator) else generator


def _default(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    generators: Any = getattr(torch, device.type).default_generators
    return generators[device.index or 0]


@contextmanager
def drawing_from(generator: torch.Generator) -> Generator[None]:
    """Let layers that draw from the process's generator draw from this one; the process's own is put back."""
    default = _default(generator.device)
    own = default.get_state()
    default.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(default.get_state())
        default.set_state(own)


def device_state(ctx: DistContext) -> Any:
    """Return the state of the process's generator of the device; None on a CPU, whose own is watched elsewhere."""
    return (
        None
        if ctx.device.type == "cpu"
        else getattr(torch, ctx.device.type).get_rng_state(ctx.device)
    )
