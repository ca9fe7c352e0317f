"""Assertions for tests of user code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from faccel.comm.objects import gather_objects
from faccel.context import DistContext
from faccel.protocols import WORLD
from faccel.random.generators import Generators
from faccel.tree import Tree, flatten, paths


def _different(a: Tree, b: Tree, atol: float = 0.0) -> str | None:
    """Return the path of the first leaf in which two trees differ, None where they are equal."""
    names, others = paths(a), paths(b)
    if names != others:
        return f"the structure: {names} and {others}"
    for name, x, y in zip(names, flatten(a)[0], flatten(b)[0], strict=True):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            same = x.shape == y.shape and x.dtype == y.dtype
            if not same or not torch.allclose(x, y, rtol=0, atol=atol, equal_nan=True):
                return f"{name}: {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}"
        elif isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor) or x != y:
            return f"{name}: {x!r} and {y!r}"
    return None


def assert_all_finite(tree: Tree) -> None:
    """Fail on a NaN or an infinity; names the leaf.

    Effects: pure.

    Examples:
        >>> assert_all_finite({"x": torch.ones(2)})
    """
    for name, leaf in zip(paths(tree), flatten(tree)[0], strict=True):
        if (
            isinstance(leaf, torch.Tensor)
            and leaf.is_floating_point()
            and not leaf.isfinite().all()
        ):
            bad = int((~leaf.isfinite()).sum())
            raise AssertionError(f"{name} has {bad} elements of {leaf.numel()} that are not finite")


def assert_replicated(tree: Tree, ctx: DistContext, *, axis: str = WORLD) -> None:
    """Fail on every rank where the ranks of an axis do not hold the same, bit for bit; names the leaf and the rank.

    Effects: collective.

    Examples:
        >>> from faccel.testing import simulate
        >>> _ = simulate(lambda ctx: assert_replicated({"x": torch.ones(2)}, ctx), 2)
    """
    everyone = gather_objects(tree, ctx, axis=axis)
    for rank, other in enumerate(everyone):
        difference = _different(everyone[0], other)
        if difference is not None:
            raise AssertionError(f"rank 0 and rank {rank} differ in {difference}")


def assert_pure(fn: Callable[..., Any], *args: Any) -> Any:
    """Call `fn(*args)` twice and fail where it changed an argument or a process-wide generator, or answered otherwise.

    Effects: pure, as far as `fn` is. Values are compared, so that writes through `.data` are seen too.

    Returns:
        What `fn` returned.

    Examples:
        >>> assert_pure(lambda x: x * 2, torch.ones(1))
        tensor([2.])
    """
    before = copy.deepcopy(args)
    generators = Generators.current()
    first = fn(*args)
    after = Generators.current()
    difference = _different(list(before), list(args))
    if difference is not None:
        raise AssertionError(f"{fn} has written to its argument {difference}")
    if not torch.equal(generators.torch, after.torch) or generators.python != after.python:
        raise AssertionError(f"{fn} has drawn from a process-wide generator")
    words = (generators.numpy, after.numpy)
    if any(
        not (x == y if not hasattr(x, "all") else (x == y).all())
        for x, y in zip(*words, strict=True)
    ):
        raise AssertionError(f"{fn} has drawn from numpy's process-wide generator")
    difference = _different(first, fn(*args))
    if difference is not None:
        raise AssertionError(f"{fn} gave another result for the same arguments: {difference}")
    return first


def equal_to_single_process(
    fn: Callable[..., Tree],
    *args: Any,
    world_sizes: Sequence[int] = (2, 4),
    atol: float = 1e-6,
    **options: Any,
) -> Tree:
    """Run `fn(ctx, *args)` on one rank and on simulated worlds; fail where any rank's result differs.

    Effects: pure, as far as `fn` is.

    Args:
        fn: Must return the same on every rank: gathered or reduced values, parameters.
        *args: Passed on.
        world_sizes: The worlds to compare with.
        atol: Absolute tolerance of tensors, for another order of summation.
        **options: Those of `simulate`.

    Returns:
        The result on one rank.

    Examples:
        >>> import faccel
        >>> equal_to_single_process(lambda ctx: faccel.reduce(torch.ones(1), ctx, op="mean"))
        tensor([1.])
    """
    from faccel.testing import simulate

    expected = simulate(fn, 1, *args, **options)[0]
    for world_size in world_sizes:
        for rank, result in enumerate(simulate(fn, world_size, *args, **options)):
            difference = _different(expected, result, atol)
            if difference is not None:
                raise AssertionError(
                    f"one process and rank {rank} of {world_size} differ in {difference}"
                )
    return expected
