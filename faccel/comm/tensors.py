"""Collectives over nested tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from faccel.checks import one_of
from faccel.comm.gather_gradients import GatherCall, gather_with_gradients
from faccel.comm.pack import Packed, check_rank, describe, digest, pack, pad_to
from faccel.comm.row_count import RowCount
from faccel.context import DistContext, require_context
from faccel.device_table import is_host
from faccel.effects import COLLECTIVE, effectful
from faccel.errors import DataError, DesyncError, short_repr
from faccel.mesh import DATA, WORLD
from faccel.tree import Tree, flatten, leaf_error

REDUCE_OPS = ("sum", "mean", "min", "max", "prod")


def tensor_leaves(
    tree: Tree, ctx: DistContext
) -> tuple[list[torch.Tensor], Callable[[Sequence[Tree]], Tree]]:
    """Return the leaves, detached, contiguous and on the device of `ctx`, and `rebuild`.

    Effects: pure.

    Raises:
        TreeError: A leaf is not a dense tensor; names it.
    """
    leaves, rebuild = flatten(tree)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, torch.Tensor):
            problem = "every leaf of `x` must be a tensor"
            fix = "use `faccel.gather_objects` or `faccel.broadcast_objects` for other objects"
            raise leaf_error(tree, i, problem, fix)
        if leaf.is_nested:
            problem = "a leaf of `x` is a nested tensor, but only dense tensors are supported"
            raise leaf_error(tree, i, problem, "call `.to_padded_tensor(0.0)` on it")
        if leaf.layout != torch.strided:
            problem = (
                f"a leaf of `x` has the layout {leaf.layout}, but only dense tensors are supported"
            )
            raise leaf_error(tree, i, problem, "call `.to_dense()` on it")
        leaf = leaf.detach().to(ctx.device)
        # collectives send the bytes, where conjugation and negation would be flags of a view
        leaves[i] = leaf.resolve_conj().resolve_neg().contiguous()
    return leaves, rebuild


@effectful(COLLECTIVE)
def gather(
    x: Tree,
    ctx: DistContext,
    *,
    num_valid: int | None = None,
    ragged: bool = False,
    differentiable: bool = False,
    axis: str = DATA,
) -> Tree:
    """Concatenate `x` from every rank of the axis along dim 0, in data order.

    Effects: collective. Every rank of the axis must call it, with the same structure, trailing
    shapes and dtypes. One collective for the whole tree; a second one with `ragged`.

    Args:
        x: This rank's rows: a tensor `T[n, ...]`, or any nesting of them. A 0-d leaf counts as one
            row and is never dropped.
        ctx: The world to gather over.
        num_valid: Rows of this rank that are not padding (`Batch.num_valid`), from 0 to `n`.
            The others are dropped. May differ between ranks. With the `Batch.num_valid` of a loader
            whose batches differ in their number of rows, `n` may differ, too.
        ragged: Whether `n` differs between ranks; for other numbers than `Batch.num_valid`.
        differentiable: Whether gradients flow back to `x`, for losses over the rows of all ranks.
            A row gets the sum of all ranks' gradients, so that a wrapped model trains as on one
            process. Backward is collective then: the loss of every rank must depend on the result.
        axis: `"data"`, `"world"` or an axis of the mesh. Ranks that read the same data count once
            on `"data"`.

    Returns:
        The same structure, each leaf `T[sum of valid rows, ...]`, equal on every rank, on the
        device of `ctx`; detached from the graph unless `differentiable`. Always a copy, even on
        one rank.

    Raises:
        DataError: `num_valid` is out of range, or leaves have different numbers of rows.
        DesyncError: Ranks sent other shapes or dtypes (off the CPU only detected if rows are
            counted).
        TreeError: A leaf is not a dense tensor; names it.

    Examples:
        >>> import torch
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: gather(torch.tensor([ctx.rank, -1]), ctx, num_valid=1), 3)[0]
        tensor([0, 1, 2])
    """
    require_context(ctx, "faccel.gather(x, ctx)")
    if differentiable:
        return _gather_differentiably(x, ctx, num_valid=num_valid, ragged=ragged, axis=axis)
    leaves, rebuild = tensor_leaves(x, ctx)
    # A 0-d leaf is sent as one row, but `num_valid` and padding leave it alone.
    is_scalar: list[bool] = []
    for i, leaf in enumerate(leaves):
        is_scalar.append(leaf.ndim == 0)
        if leaf.ndim == 0:
            leaves[i] = leaf.reshape(1)
    counts_rows = num_valid is not None or ragged
    count = 0
    if counts_rows:
        count = _count(x, leaves, is_scalar, num_valid)
    sent = x
    if ragged or isinstance(num_valid, RowCount):
        largest = getattr(num_valid, "largest", None)
        leaves = _same_rows(leaves, is_scalar, count, largest, ctx, axis)
        # `x` may have other shapes on other ranks, which debug mode must not compare.
        sent = rebuild(leaves)
    # The header travels with the leaves, so that neither check nor count needs a collective.
    header = torch.tensor([digest(leaves), count], device=ctx.device)
    packed = pack([*leaves, header])
    # Directly before the collective: after an error it would describe another one.
    ctx.comm.set_call_label("gather", sent)
    rows = ctx.comm.all_gather(packed.row, axis)
    if counts_rows:
        return rebuild(_valid_rows(packed, rows, leaves, is_scalar, ctx, axis))
    if is_host(ctx.device):  # on other devices the host would wait for the header
        check_same(packed.read(rows, len(leaves))[:, 0].tolist(), leaves, ctx, axis)
    # `T[W, n, ...]` to `T[W*n, ...]`: row `i` of rank `r` becomes row `r*n + i`.
    copies = packed.read_copies(rows)
    return rebuild([copy.flatten(0, 1) for copy in copies[: len(leaves)]])


def _gather_differentiably(
    x: Tree, ctx: DistContext, *, num_valid: int | None, ragged: bool, axis: str
) -> Tree:
    leaves, rebuild = flatten(x)
    tensor_leaves(x, ctx)  # raises for a leaf that is not a dense tensor

    def gather_leaves(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # As the user's tree, so that errors and debug mode name the leaves.
        tree = rebuild(tensors)
        gathered = gather(tree, ctx, num_valid=num_valid, ragged=ragged, axis=axis)
        return flatten(gathered)[0]

    counts: list[int] | None = None
    if num_valid is not None or ragged:
        is_scalar = [leaf.ndim == 0 for leaf in leaves]
        count = torch.tensor(_count(x, leaves, is_scalar, num_valid), device=ctx.device)
        counts = ctx.comm.all_gather(count, axis).tolist()
    call = GatherCall(gather_leaves, counts, ctx, axis)
    # On the device of the context first, by an operation that autograd records.
    moved = [leaf.to(ctx.device) for leaf in leaves]
    return rebuild(gather_with_gradients(call, moved))


def _valid_rows(
    packed: Packed,
    rows: torch.Tensor,
    leaves: list[torch.Tensor],
    is_scalar: list[bool],
    ctx: DistContext,
    axis: str,
) -> list[torch.Tensor]:
    """Return the leaves of all ranks, each rank's rows up to its count."""
    # Before any leaf is read: with other shapes the bytes would be read as wrong values.
    digests, counts = packed.read(rows, len(leaves)).T.tolist()
    check_same(digests, leaves, ctx, axis)
    results: list[torch.Tensor] = []
    for i, scalar in enumerate(is_scalar):
        values = packed.read(rows, i)
        if scalar:
            results.append(values.flatten().clone())
            continue
        valid: list[torch.Tensor] = []
        for rank, count in enumerate(counts):
            valid.append(values[rank, :count])
        results.append(torch.cat(valid))
    return results


def check_same(
    digests: Sequence[int], leaves: list[torch.Tensor], ctx: DistContext, axis: str
) -> None:
    """Raise if ranks have sent tensors of different shapes or dtypes.

    Effects: pure.

    Args:
        digests: That of each rank of the axis, or of the source and of this rank.
        leaves: What this rank has sent.
        ctx: The world.
        axis: The axis of the collective.

    Raises:
        DesyncError: The digests differ.
    """
    # After a gather all ranks have the same digests: all raise, or none. After a broadcast only
    # the ranks raise whose digest differs from the one of `src`.
    if len(set(digests)) == 1:
        return
    # Only digests were sent, so the message can group ranks but describe this rank's leaves only.
    ranks_by_digest: dict[int, list[int]] = {}
    for rank, value in enumerate(digests):
        ranks_by_digest.setdefault(value, []).append(rank)
    raise DesyncError(
        "ranks sent different shapes or dtypes in one collective",
        got=f"ranks with equal ones: {list(ranks_by_digest.values())}; "
        f"rank {ctx.comm.rank(axis)} sent {describe(leaves)}",
        fix="send the same shapes and dtypes, or pass `ragged=True` for different numbers of rows",
    )


def _count(
    x: Tree, leaves: list[torch.Tensor], is_scalar: list[bool], num_valid: int | None
) -> int:
    """Return the number of valid rows, which all leaves but scalars must have."""
    num_rows: int | None = None
    for i, leaf in enumerate(leaves):
        if is_scalar[i]:
            continue
        if num_rows is None:
            num_rows = leaf.shape[0]
        if leaf.shape[0] != num_rows:
            problem = f"every leaf of `x` must have the same {num_rows} rows"
            # `leaf_error` adds the path of the leaf; wrong numbers of rows are a `DataError`.
            error = leaf_error(x, i, problem, "gather it in another call")
            raise DataError(error.problem, got=error.got, fix=error.fix)
    if num_rows is None:
        raise DataError(
            "`x` has no rows to count with `num_valid` or `ragged`",
            got="only 0-d tensors",
            fix="leave `num_valid` and `ragged` out",
        )
    if num_valid is None:
        return num_rows
    is_integer = isinstance(num_valid, int)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not is_integer or not 0 <= num_valid <= num_rows:
        raise DataError(
            f"`num_valid` must be an integer from 0 to {num_rows}, the number of rows of `x`",
            got=f"num_valid={short_repr(num_valid)}",
            fix="pass `num_valid=batch.num_valid` of the batch that `x` was computed from",
        )
    return num_valid


def _same_rows(
    leaves: list[torch.Tensor],
    is_scalar: list[bool],
    count: int,
    largest: int | None,
    ctx: DistContext,
    axis: str,
) -> list[torch.Tensor]:
    """Return the leaves with as many rows on every rank: the largest number of valid ones."""
    if largest is None:
        own_count = torch.tensor(count, device=ctx.device)
        largest = int(ctx.comm.all_reduce(own_count, "max", axis))
    resized: list[torch.Tensor] = []
    for leaf, scalar in zip(leaves, is_scalar, strict=True):
        if not scalar and leaf.shape[0] != largest:
            # A leaf may have more rows: those after the valid ones are repeats.
            leaf = pad_to(leaf[:count], largest)
        resized.append(leaf)
    return resized


@effectful(COLLECTIVE)
def reduce(x: Tree, ctx: DistContext, *, op: str = "sum", axis: str = DATA) -> Tree:
    """Reduce `x` over the ranks of the axis, element by element.

    Effects: collective. Every rank of the axis must call it, with the same structure, shapes and
    dtypes. One collective per dtype in the tree.

    Args:
        x: A tensor `T[...]`, or any nesting of them.
        ctx: The world to reduce over.
        op: `"sum"`, `"mean"`, `"min"`, `"max"` or `"prod"`. The mean of integers is a float of the
            default dtype, the sum of booleans an int64.
        axis: `"data"`, `"world"` or an axis of the mesh.

    Returns:
        The same structure and shapes, equal on every rank, copied and detached, on the device of
        `ctx`.

    Raises:
        ConfigError: `op` is unknown.
        DesyncError: Ranks passed different operations, leaves, shapes or dtypes (detected on the
            CPU; if all send more than 248 bytes, not on a rank that gloo itself aborts, for which
            see debug mode).
        TreeError: A leaf is not a dense tensor; names it.

    Examples:
        >>> import torch
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: reduce({"n": torch.tensor(ctx.rank)}, ctx, op="mean"), 4)[0]
        {'n': tensor(1.5000)}
    """
    require_context(ctx, "faccel.reduce(x, ctx)")
    one_of("op", op, REDUCE_OPS)
    leaves, rebuild = tensor_leaves(x, ctx)
    size = ctx.comm.size(axis)
    inputs = [_widened(leaf, op) for leaf in leaves]
    if leaves:
        ctx.comm.set_call_label(f"reduce({op})", x)
    # Not every backend has a mean (gloo has none): the sum is divided in `_narrowed`.
    collective_op = "sum" if op == "mean" else op
    results: list[torch.Tensor] = list(leaves)
    # One all-reduce per dtype, because bytes of several dtypes cannot be added in one tensor.
    indices_by_dtype: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(inputs):
        indices_by_dtype.setdefault(tensor.dtype, []).append(i)
    # the same order of dtypes on every rank, whatever order their trees were built in
    for dtype in sorted(indices_by_dtype, key=str):
        indices = indices_by_dtype[dtype]
        flat = torch.cat([inputs[i].reshape(-1) for i in indices])
        reduced = ctx.comm.all_reduce(flat, collective_op, axis)
        end = 0
        for i in indices:
            start, end = end, end + inputs[i].numel()
            piece = reduced[start:end]
            if len(indices) > 1:  # a view would keep the others alive
                piece = piece.clone()
            results[i] = _narrowed(piece.view(leaves[i].shape), leaves[i].dtype, op, size)
    return rebuild(results)


def _widened(leaf: torch.Tensor, op: str) -> torch.Tensor:
    """Return a leaf in the dtype in which it is reduced."""
    is_integer = not (leaf.is_floating_point() or leaf.is_complex())
    # The sum in int8 would overflow before the division. A sum of booleans is a count of ranks.
    if leaf.dtype == torch.bool or (is_integer and op == "mean"):
        return leaf.to(torch.int64)
    if leaf.dtype == torch.int16:  # gloo does not support it
        return leaf.to(torch.int32)
    return leaf


def _narrowed(reduced: torch.Tensor, dtype: torch.dtype, op: str, size: int) -> torch.Tensor:
    """Return a result in the dtype of the leaf; means and sums of booleans need another one."""
    if op == "mean":
        return reduced / size
    if dtype == torch.bool and op == "sum":
        return reduced
    return reduced.to(dtype)


@effectful(COLLECTIVE)
def broadcast(x: Tree, ctx: DistContext, *, src: int = 0, axis: str = WORLD) -> Tree:
    """Return rank `src`'s value of `x` on every rank of the axis.

    Effects: collective. Every rank of the axis must call it, with the same structure, shapes and
    dtypes. One collective for the whole tree.

    Args:
        x: A tensor `T[...]`, or any nesting of them; on the other ranks only shapes and dtypes
            count.
        ctx: The world to broadcast over.
        src: The rank on the axis whose values are sent.
        axis: `"world"`, `"data"` or an axis of the mesh.

    Returns:
        The same structure, copied and detached, on the device of `ctx`.

    Raises:
        ConfigError: `src` is not a rank of the axis.
        DesyncError: Shapes or dtypes differ from those of `src` (detected on the CPU).
        TreeError: A leaf is not a dense tensor; names it.

    Examples:
        >>> import torch
        >>> from faccel.testing import simulate
        >>> simulate(lambda ctx: broadcast(torch.tensor(ctx.rank), ctx, src=2), 3)
        (tensor(2), tensor(2), tensor(2))
    """
    require_context(ctx, "faccel.broadcast(x, ctx)")
    check_rank("src", src, ctx, axis)
    leaves, rebuild = tensor_leaves(x, ctx)
    # The digest of `src` travels with its leaves: each rank compares it with its own.
    own_digest = digest(leaves)
    ctx.comm.set_call_label(f"broadcast(src={src})", x)
    packed = pack([*leaves, torch.tensor([own_digest], device=ctx.device)])
    rows = ctx.comm.broadcast(packed.row, src, axis)[None]
    if is_host(ctx.device):  # on other devices the host would wait for the digest
        check_same([own_digest, int(packed.read(rows, len(leaves)))], leaves, ctx, axis)
    copies = packed.read_copies(rows)
    return rebuild([copy[0] for copy in copies[: len(leaves)]])
