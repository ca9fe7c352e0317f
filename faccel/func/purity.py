"""Detection of impure functions: writes to arguments, and draws from default generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch
import xxhash
from tensordict import TensorDict

from faccel.context import DistContext
from faccel.errors import PurityError
from faccel.func.rng_streams import device_rng_state
from faccel.random.generators import detect_draws
from faccel.tree import Tree, flatten, paths

R = TypeVar("R")


def digest(leaf: Tree) -> int:
    """Return a 64-bit hash of the bytes of a tensor or an array, 0 for any other leaf.

    Tensors that are sparse, quantized or on the meta device have hash 0, too. Dense tensors on
    the CPU are not copied.
    """
    if isinstance(leaf, torch.Tensor):
        if leaf.layout != torch.strided or leaf.is_meta:
            return 0
        # Conjugate and negative views store other bytes than their values.
        leaf = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous().view(-1)
        if leaf.is_quantized or not leaf.numel():
            return 0
        leaf = leaf.view(torch.uint8).numpy()  # numpy has no bfloat16
    if not isinstance(leaf, np.ndarray):
        return 0
    array: Tree = np.ascontiguousarray(leaf)
    return xxhash.xxh3_64_intdigest(array)


def _digests(arguments: Mapping[str, Tree]) -> Iterator[tuple[str, int]]:
    """Yield path and hash of every leaf."""
    for name, tree in arguments.items():
        # Nested keys as one path, for a message such as `params['w']`.
        if isinstance(tree, TensorDict):
            for key, leaf in tree.items(True, True):
                yield f"{name}[{key!r}]", digest(leaf)
        else:
            for path, leaf in zip(paths(tree, name), flatten(tree)[0], strict=True):
                yield path, digest(leaf)


def call_pure(
    function: Callable[[], R],
    arguments: Mapping[str, Tree],
    ctx: DistContext,
    *,
    check_writes: bool,
) -> R:
    """Return `function()`; raise if it was not pure.

    Args:
        function: Calls the user's function.
        arguments: The arguments that it must not write to, by name.
        ctx: The context.
        check_writes: Whether to hash every leaf of `arguments` before and after, a pass over all
            of their values, and to check the generators of Python and NumPy, too. PyTorch's
            default generators are always checked.

    Raises:
        PurityError: It wrote to an argument, whose leaf is named, or drew from a default generator.
    """
    before: dict[str, int] = {}
    if check_writes:
        before = dict(_digests(arguments))
    # On a CPU the default generator is covered by `detect_draws`.
    device_state = device_rng_state(ctx)
    # The generators of Python and NumPy take longer to compare than a small step takes.
    result, has_drawn = detect_draws(function, torch_only=not check_writes)
    if device_state is not None:
        state_after = device_rng_state(ctx)
        has_drawn = has_drawn or state_after is None or not torch.equal(device_state, state_after)
    if has_drawn:
        raise PurityError(
            "the loss function drew random numbers from a default generator, "
            "so the step could not be repeated",
            got="draws that did not come from its `generator`",
            fix="write `functional_call(model, params, x, generator=generator)` for a model with "
            "dropout, and `torch.rand(..., generator=generator)`",
        )
    if check_writes:
        _check_unchanged(before, dict(_digests(arguments)))
    return result


def _check_unchanged(before: Mapping[str, int], after: Mapping[str, int]) -> None:
    # A leaf that was added or removed is a write, too: hashes are at least 0, so -1 differs.
    for name in [*before, *(after.keys() - before.keys())]:
        if before.get(name, -1) != after.get(name, -1):
            raise PurityError(
                "the loss function wrote to its argument",
                got=f"another value of `{name}`",
                fix="compute new tensors: `x * 2` instead of `x.mul_(2)`, "
                "`x.clone()` before a write",
            )
