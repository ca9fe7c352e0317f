"""The reductions of a simulated world, and the tensors that it can send: those of gloo."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from faccel.comm.pack import describe
from faccel.errors import DataError, DesyncError

ReduceOp = dist.ReduceOp | dist.ReduceOp.RedOpType


def op_name(op: ReduceOp) -> str:
    """Return `"sum"`, `"avg"`, ... for either form in which c10d passes a reduction.

    Effects: pure.
    """
    # c10d passes either the enum or an object that wraps it
    return str(getattr(op, "op", op)).rpartition(".")[2].lower()


def _bitwise(
    operator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: functools.reduce(operator, x.unbind(0))


# Each takes the inputs of all ranks, stacked in dimension 0. Sums keep the dtype of their input, as
# those of c10d do.
_REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: x.sum(0, dtype=x.dtype),
    "avg": lambda x: x.sum(0) / x.shape[0],
    "product": lambda x: x.prod(0, dtype=x.dtype),
    "min": lambda x: x.amin(0),
    "max": lambda x: x.amax(0),
    "band": _bitwise(torch.bitwise_and),
    "bor": _bitwise(torch.bitwise_or),
    "bxor": _bitwise(torch.bitwise_xor),
}
_BITWISE = ("band", "bor", "bxor")
# What gloo raises for, with "Invalid scalar type".
_DTYPES_WITHOUT_GLOO = (torch.int16,)


def reduce_tensors(tensors: Sequence[torch.Tensor], op: ReduceOp) -> torch.Tensor:
    """Return the reduction of one tensor per rank.

    Effects: pure.
    """
    if tensors[0].is_sparse:  # of which gloo only has the sum
        total: torch.Tensor = functools.reduce(torch.add, tensors)
        return total.coalesce()
    return _REDUCTIONS[op_name(op)](torch.stack([tensor.detach() for tensor in tensors]))


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Overwrite `target`, which may be a parameter. Called without recording of gradients."""
    if target.is_sparse:
        # Not on `detach()`: indices and values of a sparse tensor are replaced, not overwritten,
        # and only an alias would get the new ones.
        target.copy_(source)
        target._coalesced_(True)
        return
    target.detach().copy_(source.detach())


def message_error(
    message: torch.Tensor, target: torch.Tensor, source: int, rank: int, site: str = ""
) -> DesyncError:
    """Return the error for a message that does not fill the tensor of its receiver.

    Effects: pure.

    Args:
        message: What rank `source` has sent.
        target: The tensor of rank `rank`.
        source: A rank of the world.
        rank: A rank of the world.
        site: Call site of the receiver, if it is known.
    """
    receiver = f"rank {rank}"
    if site:
        receiver += f" at {site}"
    return DesyncError(
        "the shape or dtype of a message differs from the receiver's tensor",
        got=f"{describe([message])} from rank {source}, {describe([target])} on {receiver}",
        fix="send and receive the same shape and dtype",
    )


def check_tensors(call: str, tensors: Sequence[torch.Tensor]) -> None:
    """Raise for tensors that gloo refuses, or would write past.

    Effects: pure.

    Raises:
        DataError: A dtype or layout is unsupported.
    """
    for tensor in tensors:
        if tensor.layout != torch.strided:
            is_supported = tensor.is_sparse and call == "all_reduce"
            fix = "call `.to_dense()` on it; only `all_reduce` takes sparse COO tensors"
        elif tensor.dtype in _DTYPES_WITHOUT_GLOO:
            is_supported, fix = False, "convert it, for example with `.int()`"
        else:
            # A slice has gaps. gloo reads and writes as many elements as it has, one after another.
            is_supported, fix = _is_dense(tensor), "call `.contiguous()` on it, and copy it back"
        if not is_supported:
            raise DataError(
                f"`{call}` does not support this tensor with gloo, nor in a simulated world",
                got=f"{describe([tensor])}, {tensor.layout}, strides {_strides(tensor)}",
                fix=fix,
            )


def check_reduction(call: str, tensors: Sequence[torch.Tensor], op: ReduceOp) -> None:
    """Raise for a reduction that gloo does not have for these tensors.

    Effects: pure.

    Raises:
        DataError: Names the reduction and the tensors.
    """
    name = op_name(op)
    is_supported = name in _REDUCTIONS
    for tensor in tensors:
        is_exact = not (tensor.is_floating_point() or tensor.is_complex())
        if tensor.is_sparse:
            is_supported &= name == "sum"
        if tensor.is_complex():
            is_supported &= name in ("sum", "avg", "product")
        if name in _BITWISE:
            is_supported &= is_exact
        if name == "avg":
            is_supported &= not is_exact
    if not is_supported:
        raise DataError(
            f"`{call}` does not support this reduction with gloo, nor in a simulated world",
            got=f"{name} of {describe(tensors)}",
            fix="use `op=torch.distributed.ReduceOp.SUM`, of a dense tensor for other reductions",
        )


def check_fits(call: str, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Raise unless there is a target of the right shape and dtype for the tensor of each rank.

    Effects: pure.

    Raises:
        DataError: Shapes, dtypes or the number of tensors differ.
    """
    actual, expected = describe(targets), describe(sources)
    if actual != expected:
        raise DataError(
            f"`{call}` expects one tensor per rank, of the shape and dtype of this rank's",
            got=f"{actual}, not {expected}",
            fix="make them with `torch.empty_like`; pad tensors of other shapes first",
        )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Return whether the elements fill one block of memory, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    dims = sorted(range(tensor.ndim), key=lambda dim: -tensor.stride(dim))
    return tensor.permute(dims).is_contiguous()


def _strides(tensor: torch.Tensor) -> str:
    if tensor.layout != torch.strided:
        return "none"
    return str(list(tensor.stride()))
