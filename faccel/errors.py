"""Every exception of faccel: one class per cause, each with what happened, what was seen and the fix as data."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class FaccelError(Exception):
    """The root of all errors that faccel raises on purpose.

    Attributes:
        problem: What is wrong, one clause that names the value.
        got: The value itself, possibly empty.
        fix: What to do, starting with a verb, possibly empty.
    """

    def __init__(self, problem: str, *, got: str = "", fix: str = "") -> None:
        self.problem = problem
        self.got = got
        self.fix = fix
        message = f"{problem}."
        if got:
            message += f" Got {got}."
        if fix:
            message += f"\nTo fix: {fix}."
        Exception.__init__(self, message)  # not `super()`, which torch.compile cannot see through

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.problem, self.got, self.fix)


def _rebuild(cls: type[FaccelError], problem: str, got: str, fix: str) -> FaccelError:
    return cls(problem, got=got, fix=fix)


class ConfigError(FaccelError, ValueError):
    """A configuration value is unknown, of the wrong type or impossible."""


class TopologyError(FaccelError, RuntimeError):
    """The environment describes a world that cannot be."""


class LaunchError(FaccelError, ValueError):
    """A launch cannot be, or what it should start is not there."""


class JoinError(FaccelError, RuntimeError):
    """Machines of a launch did not come together, or lost each other."""


class WorldError(FaccelError, RuntimeError):
    """The processes could not be joined into the world that was asked for, or it is gone."""


class DeviceError(FaccelError, RuntimeError):
    """The device that was asked for is not there."""


class BackendError(FaccelError, RuntimeError):
    """No strategy can do what the mesh and the plan ask for."""


class DesyncError(FaccelError, RuntimeError):
    """Ranks disagree about the next collective; names what each rank was doing and where."""


class RankFailedError(FaccelError, RuntimeError):
    """Another rank raised while this one waited for it."""


class TreeError(FaccelError, TypeError):
    """A nested value has a leaf that the function cannot handle; names the leaf."""


class DataError(FaccelError, ValueError):
    """A loader, a cursor or a batch does not fit."""


class ModelError(FaccelError, ValueError):
    """A model does not fit."""


class OptimizerError(FaccelError, ValueError):
    """An optimizer does not fit the model, or a step has nothing to apply."""


class CheckpointError(FaccelError, RuntimeError):
    """A checkpoint cannot be written, is incomplete or corrupt, or does not fit the state that it is loaded into."""


class PurityError(FaccelError, RuntimeError):
    """A function that must be pure wrote to an argument, or drew random numbers that nobody gave it."""


class DonatedError(FaccelError, RuntimeError):
    """A state whose storage was given to a step is used again."""


class ScalerError(FaccelError, RuntimeError):
    """A `ScalerState` was not threaded through the loop."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return a hint that lists `allowed`, with the nearest to `word` first named.

    Effects: pure.
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(word, names, n=1)
    listed = ", ".join(f"`{name}`" for name in names)
    return f"use `{close[0]}` (allowed: {listed})" if close else f"use one of {listed}"
