"""Labels for what a public function does besides returning a value.

A label is a set of words:

- `collective`: every rank of the axis must call it;
- `ambient`: reads or writes state of the process, such as files, environment, random generators;
- `updates x`: writes into the argument `x`, which stays usable;
- `consumes x`: `x` must not be used afterwards.

The empty set is `pure`. The docstring's `Effects:` line repeats the label; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

# The decorator returns the type that it gets, so that type checkers keep the signature.
F = TypeVar("F", bound=Callable[..., object])

COLLECTIVE = "collective"
AMBIENT = "ambient"


def updates(argument: str) -> str:
    """Return the label of a function that writes into `argument`."""
    return f"updates {argument}"


def consumes(argument: str) -> str:
    """Return the label of a function after which `argument` must not be used again."""
    return f"consumes {argument}"


def effectful(*labels: str) -> Callable[[F], F]:
    """Return a decorator that labels a function with its effects."""

    def decorate(fn: F) -> F:
        # an attribute and not a wrapper: calls cost nothing, and signatures stay
        fn.__effects__ = frozenset(labels)  # type: ignore[attr-defined]
        return fn

    return decorate


def effects_of(fn: object) -> frozenset[str]:
    """Return the labels of `fn`; the empty set for a pure function."""
    # Most functions are pure: they need no decorator.
    return getattr(fn, "__effects__", frozenset())
