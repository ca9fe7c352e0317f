"""Functions that must be pure are watched: what they write into their arguments is found by value."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from tensordict import TensorDict

from faccel.context import DistContext
from faccel.errors import PurityError
from faccel.func.rng_streams import device_state
from faccel.random.generators import detect_draws
from faccel.tree import flatten, paths

R = TypeVar("R")


def digest(leaf: Any) -> int:
    """Return a number for the bits of a leaf, 0 for what has none; without a copy where it is dense and on the CPU."""
    if isinstance(leaf, torch.Tensor):
        if leaf.layout != torch.strided or leaf.is_meta:
            return 0
        leaf = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
        if leaf.is_quantized or not leaf.numel():
            return 0
        leaf = leaf.view(torch.uint8).numpy()
    if not isinstance(leaf, np.ndarray):
        return 0
    array: Any = np.ascontiguousarray(leaf)
    return xxhash.xxh3_64_intdigest(array)


def _digests(named: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, tree in named.items():
        if isinstance(tree, TensorDict):
            yield from ((f"{name}[{key!r}]", digest(leaf)) for key, leaf in tree.items(True, True))
        else:
            for path, leaf in zip(paths(tree, name), flatten(tree)[0], strict=True):
                yield path, digest(leaf)


def found_pure(
    run: Callable[[], R], arguments: dict[str, Any], ctx: DistContext, *, by_value: bool
) -> R:
    """Return `run()`, and refuse what it did besides.

    Args:
        run: Calls the user's function.
        arguments: What it was given, by name.
        ctx: Where it runs.
        by_value: Whether arguments are compared by the value of every element, a pass over all of
            them, and the generators of NumPy and Python, too.

    Raises:
        PurityError: It wrote to an argument, whose leaf is named, or drew from a generator of the process.
    """
    before = dict(_digests(arguments)) if by_value else {}
    on_device = device_state(ctx)
    # Python's and NumPy's generators take longer to compare than a small step: with `by_value` only
    result, drew = detect_draws(run, torch_only=not by_value)
    if drew or (on_device is not None and not torch.equal(on_device, device_state(ctx))):
        raise PurityError(
            "the function drew random numbers from a generator of the process, so that no step could be repeated",
            got="draws that did not come from its `generator`",
            fix="write `functional_call(model, params, x, generator=generator)` for a model with dropout, and "
            "`torch.rand(..., generator=generator)`",
        )
    after = dict(_digests(arguments)) if by_value else {}
    for name in [*before, *(after.keys() - before.keys())]:
        if name not in after or name not in before or after[name] != before[name]:
            raise PurityError(
                "the function wrote to its argument",
                got=f"another value of `{name}`",
                fix="compute new tensors: `x * 2` instead of `x.mul_(2)`, `x.clone()` before a write",
            )
    return result
