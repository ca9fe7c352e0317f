"""Assertions for tests of user code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from faccel.comm.objects import gather_objects
from faccel.context import DistContext, require_context
from faccel.mesh import WORLD
from faccel.random.generators import Generators
from faccel.testing.replica_hash import check_replicas_by_hash
from faccel.training.model import WrappedModel
from faccel.tree import Tree, flatten, paths

T = TypeVar("T")
TreeT = TypeVar("TreeT", bound=Tree)


def assert_all_finite(tree: Tree) -> None:
    """Raise if a tensor contains a NaN or an infinity.

    Effects: pure.

    Raises:
        AssertionError: Names the leaf and the number of elements.

    Examples:
        >>> assert_all_finite({"x": torch.ones(2)})
    """
    for path, leaf in zip(paths(tree), flatten(tree)[0], strict=True):
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            continue
        num_nonfinite = int((~leaf.isfinite()).sum())
        if num_nonfinite:
            raise AssertionError(
                f"{path} has {num_nonfinite} elements of {leaf.numel()} that are not finite"
            )


def assert_replicated(
    tree: Tree, ctx: DistContext, *, axis: str = WORLD, hashed: bool = False
) -> None:
    """Raise on every rank if the ranks of an axis have different values, compared bit by bit.

    Effects: collective. `hashed`: one all-reduce of one number, for which the host waits.

    Args:
        tree: Any nested values, or a wrapped model: its parameters and buffers, full ones where
            the strategy shards them.
        ctx: The world.
        axis: The axis whose ranks are compared.
        hashed: Whether ranks compare hashes of the bits instead of exchanging all values, so that
            a training loop can check every 100 steps. A model or an optimizer may be a value of
            `tree`: parameters, buffers, gradients and the state of the optimizer. A sharded tensor
            is compared on the axes of the mesh on which shards are replicated.

    Raises:
        AssertionError: Names the leaf and the first rank that differs from rank 0; with `hashed`,
            the ranks that differ from the majority.
        TreeError: With `hashed`, a leaf is neither a tensor, an array, a number nor text.

    Examples:
        >>> from faccel.testing import simulate
        >>> _ = simulate(lambda ctx: assert_replicated({"x": torch.ones(2)}, ctx), 2)
    """
    require_context(ctx, "faccel.testing.assert_replicated(tree, ctx)")
    if hashed:
        check_replicas_by_hash(tree, ctx, axis)
        return
    if isinstance(tree, WrappedModel):
        tree = _full_tensors(tree)
    # Each rank compares all trees, so that each raises and none waits for another.
    trees = gather_objects(tree, ctx, axis=axis)
    for rank, other in enumerate(trees):
        difference = _difference(trees[0], other)
        if difference is not None:
            raise AssertionError(f"rank 0 and rank {rank} differ in {difference}")


def _full_tensors(model: WrappedModel) -> dict[str, torch.Tensor]:
    """Return parameters and buffers under the user's names. Collective if they are sharded."""
    from torch.distributed.tensor import DTensor  # slow to import

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, DTensor):
            # From this rank's replica of each shard, which may differ from those of other ranks.
            tensor = tensor.full_tensor()
        tensors[name] = tensor.detach()
    return tensors


def assert_pure(fn: Callable[..., T], *args: Any) -> T:
    """Call `fn(*args)` twice and raise if it has side effects or different results.

    It must not change its arguments or a process-wide generator. Values are compared, so that
    writes through `.data` are detected too.

    Effects: pure, as far as `fn` is.

    Returns:
        The result of `fn`.

    Raises:
        AssertionError: Names the argument, the generator or the leaf of the result.

    Examples:
        >>> assert_pure(lambda x: x * 2, torch.ones(1))
        tensor([2.])
    """
    # Copied before the call, because a write through `.data` changes no version counter.
    args_before = copy.deepcopy(args)
    generators_before = Generators.current()
    result = fn(*args)
    generators = Generators.current()
    difference = _difference(list(args_before), list(args))
    if difference is not None:
        raise AssertionError(f"{fn} has written to its argument {difference}")
    _check_generators(fn, generators_before, generators)
    difference = _difference(result, fn(*args))
    if difference is not None:
        raise AssertionError(f"{fn} returned another result for the same arguments: {difference}")
    return result


def _check_generators(fn: Callable[..., object], before: Generators, after: Generators) -> None:
    if before.equals(after):
        return
    name = "numpy's"
    if not torch.equal(before.torch, after.torch):
        name = "torch's"
    elif before.python != after.python:
        name = "Python's"
    raise AssertionError(f"{fn} has drawn from {name} process-wide generator")


def equal_to_single_process(
    fn: Callable[..., TreeT],
    *args: Any,
    world_sizes: Sequence[int] = (2, 4),
    atol: float = 1e-6,
    rtol: float = 0.0,
    **options: Any,
) -> TreeT:
    """Run `fn(ctx, *args)` on one rank and on simulated worlds; raise if a result differs.

    Effects: pure, as far as `fn` is.

    Args:
        fn: Must return equal values on all ranks: gathered or reduced values, parameters.
        *args: Further arguments of `fn`.
        world_sizes: The worlds to compare with one rank.
        atol: Absolute tolerance of tensors and floats, because the order of summation differs.
        rtol: Relative tolerance: values may differ by `atol + rtol * abs(value)`.
        **options: Keyword arguments of `simulate`.

    Returns:
        The result on one rank.

    Raises:
        AssertionError: Names the world size, the rank and the leaf.

    Examples:
        >>> import faccel
        >>> equal_to_single_process(lambda ctx: faccel.reduce(torch.ones(1), ctx, op="mean"))
        tensor([1.])
    """
    from faccel.testing import simulate  # `simulation` imports this module

    expected = simulate(fn, 1, *args, **options)[0]
    for world_size in world_sizes:
        results = simulate(fn, world_size, *args, **options)
        for rank, result in enumerate(results):
            difference = _difference(expected, result, atol, rtol)
            if difference is not None:
                raise AssertionError(
                    f"one process and rank {rank} of {world_size} differ in {difference}"
                )
    return expected


def _difference(a: Tree, b: Tree, atol: float = 0.0, rtol: float = 0.0) -> str | None:
    """Return the path of the first leaf in which two trees differ; None if they are equal."""
    paths_a, paths_b = paths(a), paths(b)
    # The structure first: leaves of different trees cannot be paired.
    if paths_a != paths_b:
        return f"the structure: {paths_a} and {paths_b}"
    for path, x, y in zip(paths_a, flatten(a)[0], flatten(b)[0], strict=True):
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            if not _is_close(x, y, atol, rtol):
                return f"{path}: {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}"
            continue
        if isinstance(x, float) and isinstance(y, float):
            is_equal = _is_close(torch.tensor(x), torch.tensor(y), atol, rtol)
        else:
            is_equal = (
                not isinstance(x, torch.Tensor) and not isinstance(y, torch.Tensor) and x == y
            )
        if not is_equal:
            return f"{path}: {x!r} and {y!r}"
    return None


def _is_close(x: torch.Tensor, y: torch.Tensor, atol: float, rtol: float) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    # NaNs are equal: a test of NaN handling compares them.
    return torch.allclose(x, y, rtol=rtol, atol=atol, equal_nan=True)
