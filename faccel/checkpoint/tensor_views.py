"""Which tensors can be stored, and the views of them in dtypes that the files have.

safetensors files that PyTorch's readers understand have no complex numbers and not every float8:
those are stored as pairs of real numbers, and as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn.parameter import is_lazy

from faccel.checkpoint.files import SAFETENSORS_DTYPES
from faccel.errors import CheckpointError
from faccel.flat_shard import FlatShard
from faccel.offloaded_tensor import OffloadedTensor
from faccel.tree import has_inner_tensors, is_cast_shard, is_dtensor, is_sharded, local_tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


# Looked up instead of `getattr(torch, name)`: that imports modules of torch by their names.
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


def check_storable(name: str, tensor: torch.Tensor) -> None:
    """Raise unless the elements of a tensor are in memory, dense, and complete on its ranks.

    Effects: pure. Every rank raises for the same tensor.

    Raises:
        CheckpointError: The tensor cannot be stored; the message names it.
    """
    problem = _problem(tensor)
    if problem is not None:
        got, fix = problem
        raise CheckpointError(f"`{name}` cannot be stored", got=got, fix=fix)


def is_storable(tensor: torch.Tensor) -> bool:
    """Return whether `check_storable` raises nothing.

    Effects: pure.
    """
    return _problem(tensor) is None


def _problem(tensor: torch.Tensor) -> tuple[str, str] | None:
    """Return what prevents a tensor from being stored, and the fix."""
    if isinstance(tensor, OffloadedTensor):  # an export reads it when it writes it
        return None
    if is_lazy(tensor):
        return "a lazy tensor without a shape", "run the model once before you save it"
    if tensor.is_meta:
        return (
            "a tensor on the device meta, which has no elements",
            'allocate it first: `faccel.wrap(module, ctx)`, or `module.to_empty(device="cpu")`',
        )
    problem = _problem_of_format(tensor)
    if problem is not None:
        return problem
    if is_dtensor(tensor):
        return _problem_of_shards(cast("DTensor", tensor))
    if not is_sharded(tensor) and not has_inner_tensors(tensor) and not _has_memory(tensor):
        return (
            f"a {type(tensor).__name__}, which has no memory",
            "give its class `__tensor_flatten__` and `__tensor_unflatten__`, or leave it out",
        )
    return None


def _problem_of_format(tensor: torch.Tensor) -> tuple[str, str] | None:
    dtype = tensor.dtype
    if tensor.is_quantized:
        return f"a tensor of dtype {dtype}", "call `.dequantize()` on it"
    if tensor.is_nested:
        return "a nested tensor", "store the list `tensor.unbind()`"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}", "call `.to_dense()` on it"
    if is_view_needed(dtype) and not dtype.is_complex and dtype.itemsize != 1:
        return f"a tensor of dtype {dtype}", "cast it, for example with `.float()`"
    return None


def _problem_of_shards(tensor: DTensor) -> tuple[str, str] | None:
    if any(placement.is_partial() for placement in tensor.placements):
        return (
            f"a DTensor of placements {tensor.placements}",
            "call `.full_tensor()` on every rank",
        )
    local = local_tensor(tensor)
    if has_inner_tensors(local):  # blocks of elements have one scale, and no part of a block
        return (
            f"a DTensor whose shards are of class {type(local).__name__}",
            "use ordinary tensors, such as the states of `torch.optim.AdamW`, or a mesh that "
            'replicates them: `faccel.init(mesh="dp_replicate=-1")`',
        )
    return None


def _has_memory(tensor: torch.Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    try:
        return tensor.untyped_storage().data_ptr() != 0
    # PyTorch raises for a tensor subclass whose storage cannot be read.
    except (RuntimeError, NotImplementedError):
        return False


def is_view_needed(dtype: torch.dtype) -> bool:
    """Return whether tensors of a dtype are stored as real numbers or as bytes.

    Effects: pure.

    Examples:
        >>> is_view_needed(torch.bfloat16), is_view_needed(torch.complex64)
        (False, True)
    """
    if dtype.is_complex:
        return True
    return dtype not in SAFETENSORS_DTYPES


def stored_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of a tensor in a dtype of the files; the tensor itself if it has one.

    Effects: pure. A complex number is a pair of real ones in a new last dim.
    """
    tensor = _with_plain_shards(tensor)
    if not is_view_needed(tensor.dtype):
        return tensor
    if tensor.dtype.is_complex:
        return _of_local(tensor, torch.view_as_real, (2,))
    return _of_local(tensor, lambda local: local.view(torch.uint8), ())


def _with_plain_shards(tensor: torch.Tensor) -> torch.Tensor:
    """Return a DTensor whose shard is gathered in fp8 as one of its elements in memory.

    Any other tensor is returned itself. Checkpoints do not depend on how parameters are gathered.
    """
    if not is_dtensor(tensor):
        return tensor
    if not is_cast_shard(cast("Any", tensor)._local_tensor):
        return tensor
    return with_local(cast("DTensor", tensor), local_tensor(tensor))


def _of_local(
    tensor: torch.Tensor, view: Callable[[torch.Tensor], torch.Tensor], new_dims: Sequence[int]
) -> torch.Tensor:
    """Return `view` of a tensor; of a DTensor, the DTensor of the views of its shards."""
    if not is_dtensor(tensor):
        return view(tensor)
    return with_local(cast("DTensor", tensor), view(local_tensor(tensor)), new_dims)


def with_local(like: DTensor, local: torch.Tensor, new_dims: Sequence[int] = ()) -> torch.Tensor:
    """Return a DTensor of the placements of `like` with another shard, which it aliases.

    Effects: pure.

    Args:
        like: For its shape and placements.
        local: `T[..., *new_dims]`: the shard of this rank.
        new_dims: Extents of dims that are added after those of `like`.
    """
    from torch.distributed.tensor import DTensor

    shape = torch.Size([*like.shape, *new_dims])
    stride: list[int] = []
    size = 1
    for extent in reversed(shape):  # that of a contiguous tensor; only the shape is stored
        stride.append(size)
        size *= max(extent, 1)
    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=shape,
        stride=tuple(reversed(stride)),
    )


def empty_in_layout(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialized tensor with the shape, device and layout of `like`.

    Effects: pure. Its class is `like`'s only for a tensor that is sharded over ranks: the momentum
    of a quantized parameter is an ordinary tensor.
    """
    like = like.detach()
    if is_dtensor(like):
        local = empty_in_layout(local_tensor(like), dtype)
        return with_local(cast("DTensor", like), local)
    if has_inner_tensors(like):
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    return torch.empty_like(like, dtype=dtype)


def memory_key(name: str, tensor: torch.Tensor) -> Hashable:
    """Return a key that is equal for two names of one tied tensor.

    Effects: pure.
    """
    if isinstance(tensor, FlatShard) and tensor.param is not None:
        return id(tensor.param)
    if isinstance(tensor, OffloadedTensor):
        return tensor.full_name
    if tensor.numel() == 0:  # all empty tensors have the same address
        return name
    # Of a sharded tensor the local shard is compared: ranks hold equal ties.
    shard = local_tensor(tensor)
    start = (shard.untyped_storage().data_ptr(), shard.storage_offset())
    return start, tensor.shape, shard.stride(), tensor.dtype
