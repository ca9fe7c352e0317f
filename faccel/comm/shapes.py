"""Splitting work over ranks and padding to common shapes, for inference; exchanging rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any, TypeGuard

import torch

from faccel.checks import shown
from faccel.comm.pack import digest, pack, pad_to
from faccel.comm.tensors import check_same, tensor_leaves
from faccel.context import DistContext, require_context
from faccel.device_table import is_host
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import DataError
from faccel.mesh import DATA, WORLD
from faccel.tree import Tree, leaf_error


def split(xs: Tree, ctx: DistContext, *, pad: bool = False, axis: str = DATA) -> Tree:
    """Return this rank's slice of a list, tuple, tensor or dataset, or of each of those in a dict.

    Effects: pure. The slices are contiguous and in rank order; the first `n % W` ranks get one item
    more than the others.

    Args:
        xs: A value that is the same on every rank. All values of a dict must have the same length.
            A `datasets.Dataset` of Hugging Face is sliced without a copy of its table.
        ctx: The world.
        pad: Whether shorter slices repeat the last item of `xs`, so that all ranks have equally
            many items. The last `-n % W` ranks get one repeat each.
        axis: `"data"`, `"world"` or an axis of the mesh.

    Returns:
        A new container of the same kind; a view if `xs` is a tensor and nothing is padded.

    Raises:
        DataError: `xs` has no length, or its values have different lengths.

    Examples:
        >>> from faccel.testing import fake_context
        >>> [split(list("abcde"), fake_context(rank, 3)) for rank in range(3)]
        [['a', 'b'], ['c', 'd'], ['e']]
        >>> split({"x": ("a", "b", "c")}, fake_context(1, 2), pad=True)
        {'x': ('c', 'c')}
    """
    require_context(ctx, "faccel.split(xs, ctx)")
    if isinstance(xs, Mapping):
        return _split_mapping(xs, ctx, pad=pad, axis=axis)
    is_dataset = _is_hugging_face_dataset(xs)
    if not isinstance(xs, list | tuple | torch.Tensor) and not is_dataset:
        raise DataError(
            "`xs` must be a list, a tuple, a tensor, a `datasets.Dataset` or a dict of those",
            got=shown(xs),
            fix="convert it, for example with `list(xs)`",
        )
    if axis == DATA:
        rank, size = ctx.data_rank, ctx.data_world_size
    else:
        rank, size = ctx.comm.rank(axis), ctx.comm.size(axis)
    # With q, e = divmod(n, W): rank r has q + (r < e) items, and begins at r*q + min(r, e).
    num_each, num_extra = divmod(len(xs), size)
    start = rank * num_each + min(rank, num_extra)
    has_extra = rank < num_extra
    if is_dataset:
        rows = list(range(start, start + num_each + int(has_extra)))
        if pad and num_extra and not has_extra:
            rows.append(len(xs) - 1)
        return xs.select(rows)  # which finds out that they are contiguous, and copies nothing then
    items: Tree = xs[start : start + num_each + int(has_extra)]
    # Slices differ by one item at most, so one repeat makes them equally long.
    if not pad or has_extra or num_extra == 0:
        return items
    # The last item of `xs`, not of the slice, which is empty if there are fewer items than ranks.
    if isinstance(xs, torch.Tensor):
        return torch.cat([items, xs[-1:]])
    return items + xs[-1:]


def _is_hugging_face_dataset(xs: Any) -> TypeGuard[Any]:
    # By name: the package takes seconds to import.
    return f"{type(xs).__module__}.{type(xs).__name__}" == "datasets.arrow_dataset.Dataset"


def _split_mapping(
    xs: Mapping[Tree, Tree], ctx: DistContext, *, pad: bool, axis: str
) -> Mapping[Tree, Tree]:
    lengths = {key: len(value) for key, value in xs.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(
            "all values of `xs` must have the same length",
            got=str(lengths),
            fix="call `split` for each value",
        )
    slices: dict[Tree, Tree] = {}
    for key, value in xs.items():
        slices[key] = split(value, ctx, pad=pad, axis=axis)
    if type(xs) is dict or not isinstance(xs, MutableMapping):
        return slices
    result = copy.copy(xs)  # keeps the class of a tokenizer's `BatchEncoding`, and its encodings
    result.update(slices)
    return result


@effectful(COLLECTIVE)
def pad_across(
    x: Tree,
    ctx: DistContext,
    *,
    dim: int = 0,
    value: float = 0,
    first: bool = False,
    axis: str = DATA,
) -> Tree:
    """Pad every tensor along `dim` to the largest size on any rank of the axis.

    Effects: collective. Every rank must call it with the same structure; one small all-reduce for
    the whole tree.

    Args:
        x: A tensor, or any nesting of them. Leaves without a dimension `dim` are not padded.
        ctx: The world.
        dim: Along which dimension; a negative one counts from the last.
        value: The value of the new elements.
        first: Whether to fill at the beginning instead of the end.
        axis: `"data"`, `"world"` or an axis of the mesh.

    Returns:
        The same structure, copied, detached, on the device of `ctx`.

    Raises:
        DataError: A leaf has other numbers of dimensions on other ranks; raised on all of them.
        TreeError: A leaf is not a dense tensor; names it.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: pad_across(torch.ones(ctx.rank + 1), ctx), 3)[0]
        tensor([1., 0., 0.])
    """
    require_context(ctx, "faccel.comm.pad_across(x, ctx)")
    leaves, rebuild = tensor_leaves(x, ctx)
    # A leaf without the dimension stays as it is. It takes part with size 0, so that every rank
    # sends as many numbers per leaf.
    has_dim: list[bool] = []
    own_sizes: list[int] = []
    for leaf in leaves:
        has = -leaf.ndim <= dim < leaf.ndim
        has_dim.append(has)
        own_sizes += [leaf.shape[dim] if has else 0, leaf.ndim, -leaf.ndim]
    # One all-reduce for all leaves, of `int64[3 * number of leaves]`.
    sizes_tensor = torch.tensor(own_sizes, device=ctx.device)
    numbers: list[int] = ctx.comm.all_reduce(sizes_tensor, "max", axis).tolist()
    sizes = numbers[::3]
    for i in range(len(leaves)):
        # The largest and the negated smallest number of dimensions: the same on every rank.
        largest, negated_smallest = numbers[3 * i + 1 : 3 * i + 3]
        if largest != -negated_smallest:
            problem = "every leaf of `x` must have the same number of dimensions on every rank"
            fix = "reshape it, for example with `x.unsqueeze(0)`"
            error = leaf_error(x, i, problem, fix)
            got = f"{error.got}, and {-negated_smallest} to {largest} dimensions on all ranks"
            raise DataError(error.problem, got=got, fix=error.fix)
    padded: list[torch.Tensor] = []
    for leaf, has, size in zip(leaves, has_dim, sizes, strict=True):
        if has:
            padded.append(pad_to(leaf, size, dim=dim, value=value, first=first))
        else:
            padded.append(leaf.clone())
    return rebuild(padded)


@effectful(COLLECTIVE)
def all_to_all(x: Tree, ctx: DistContext, *, axis: str = WORLD) -> Tree:
    """Exchange rows: row `j` of rank `i` becomes row `i` of rank `j`.

    Effects: collective. Every rank of the axis must call it, with the same structure, shapes and
    dtypes. One collective for the whole tree.

    Args:
        x: A tensor `T[size, ...]` with one row per rank of the axis, or any nesting of them.
        ctx: The world.
        axis: `"world"`, `"data"` or an axis of the mesh.

    Returns:
        The same structure and shapes, copied and detached, on the device of `ctx`.

    Raises:
        DesyncError: Shapes or dtypes differ between ranks (detected on the CPU).
        TreeError: A leaf does not have one row per rank.

    Examples:
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: all_to_all(10 * ctx.rank + torch.arange(2), ctx).tolist(), 2)
        ([0, 10], [1, 11])
    """
    require_context(ctx, "faccel.comm.all_to_all(x, ctx)")
    leaves, rebuild = tensor_leaves(x, ctx)
    size = ctx.comm.size(axis)
    for i, leaf in enumerate(leaves):
        if leaf.ndim == 0 or leaf.shape[0] != size:
            problem = f"`x` must have {size} rows, one row per rank of the axis `{axis}`"
            raise leaf_error(x, i, problem, f"reshape it to `x.reshape({size}, -1)`")
    # A row that is shorter than expected would be read as other values, so each one has a digest.
    own_digest = digest(leaves)
    digests = torch.full((size, 1), own_digest, device=ctx.device)
    packed = pack([digests, *leaves], num_rows=size)
    # Without the label debug mode would compare rows of bytes, which do not show the leaves.
    ctx.comm.set_call_label("all_to_all", x)
    rows = ctx.comm.all_to_all(packed.row, axis)
    if is_host(ctx.device):  # on other devices the host would wait for the digests
        check_same(packed.read(rows, 0).flatten().tolist(), leaves, ctx, axis)
    return rebuild(packed.read_copies(rows)[1:])
