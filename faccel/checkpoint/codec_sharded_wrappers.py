"""Codec of DTensors whose shards consist of other tensors: low-bit optimizer states under FSDP2.

Such a state has `codes`, and one number in `scale` for each block of codes. Both are stored as
matrices, so that another number of ranks can read its parts. Other inner tensors, such as a table
of the values of the codes, are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.optim import Optimizer

from faccel.checkpoint.codec import Codec, Decoder, Encoder, Node, Restore, mismatch, restore_all
from faccel.checkpoint.codec_tensors import decode_spec
from faccel.checkpoint.tensor_names import child_name
from faccel.checkpoint.tensor_views import stored_view, with_local
from faccel.checkpoint.wrapper_nodes import class_name, inner_tensors, wrapper_node
from faccel.errors import CheckpointError
from faccel.training.full_values import local_slice
from faccel.tree import has_inner_tensors, is_dtensor, local_tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_OF_ELEMENTS = ("codes", "scale")
"""The inner tensors of torchao's optimizer states that have a part for each element or block."""


def is_sharded_wrapper(value: object) -> bool:
    """Return whether a value is a DTensor whose shards consist of other tensors.

    Effects: pure.
    """
    return is_dtensor(value) and has_inner_tensors(local_tensor(cast("torch.Tensor", value)))


def _encode(value: DTensor, path: str, encoder: Encoder) -> Node:
    local: Any = local_tensor(value)
    cls = type(local)
    block_size = getattr(local, "block_size", 0)
    reason = "of a class without `codes` and `scale`"
    if block_size and set(_OF_ELEMENTS) <= inner_tensors(local).keys():
        reason = _why_not_whole_blocks(value, block_size)
    if reason is not None:
        raise CheckpointError(
            f"`{path}` cannot be stored, because its shards have no whole blocks of one scale",
            got=f"a DTensor whose shards are of class {class_name(cls)}, {reason}",
            fix=_FIX,
        )
    num_rows = _num_rows(value.shape, block_size)
    nodes: dict[str, Node] = {}
    for name, tensor in inner_tensors(local).items():
        if name in _OF_ELEMENTS:
            num_local = num_rows * local.numel() // value.numel()
            tensor = _sharded_rows(value, num_rows, tensor.reshape(num_local, -1))
        nodes[name] = encoder.encode(tensor, child_name(path, name))
    _, context = local.__tensor_flatten__()
    # Of the full tensor, as one process stores it.
    context = _with_shape(context, local.shape, value.shape)
    return wrapper_node(value, cls, context, nodes, path, encoder)


_FIX = (
    "use ordinary tensors, such as the states of `torch.optim.AdamW`, or a mesh that "
    'replicates them: `faccel.init(mesh="dp_replicate=-1")`'
)


def _num_rows(shape: Sequence[int], block_size: int) -> int:
    """Return the number of rows of the matrices that are stored.

    Those of the tensor, if each has whole blocks: then any number of ranks can have a part. Else a
    row is one block, and ranks must have equal parts.
    """
    row_size = torch.Size(shape[1:]).numel()
    if row_size % block_size == 0:
        return shape[0]
    return torch.Size(shape).numel() // block_size


def _why_not_whole_blocks(value: DTensor, block_size: int) -> str | None:
    """Return why ranks do not have consecutive whole blocks of a tensor; None if they do."""
    from torch.distributed.tensor import Replicate, Shard

    num_ranks = 1
    for placement, size in zip(value.placements, value.device_mesh.shape, strict=True):
        if isinstance(placement, Replicate) or size == 1:
            continue
        # The class itself: of FSDP2 over tensor parallel, a subclass is strided.
        if type(placement) is not Shard or placement.dim != 0 or num_ranks > 1:
            return f"of placements {value.placements}"
        num_ranks = size
    num_rows = _num_rows(value.shape, block_size)
    is_uneven = value.shape[0] % num_ranks or num_rows % num_ranks
    if num_rows != value.shape[0] and is_uneven:
        return f"with {num_rows} blocks of {block_size} elements for {num_ranks} ranks"
    return None


def _sharded_rows(like: DTensor, num_rows: int, rows: torch.Tensor) -> DTensor:
    """Return a DTensor `T[num_rows, n]` of the matrices `rows`, one of each rank."""
    from torch.distributed.tensor import DTensor

    num_columns = rows.shape[1]
    return DTensor.from_local(
        rows,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=torch.Size([num_rows, num_columns]),
        stride=(num_columns, 1),
    )


def _with_shape(context: Any, shape: Sequence[int], new_shape: Sequence[int]) -> Any:
    """Return the context of a wrapper with another shape, where it contains the shape."""
    entries: list[Any] = []
    for entry in context:
        is_shape = isinstance(entry, (tuple, list)) and tuple(entry) == tuple(shape)
        entries.append(tuple(new_shape) if is_shape else entry)
    return entries


def decode_into_shards(node: Node, cls: Any, like: DTensor, path: str, decoder: Decoder) -> Restore:
    """Plan to restore this rank's part of a wrapper of `cls`, in the layout of `like`.

    One process may have saved it, or any number of ranks.

    Raises:
        CheckpointError: Ranks would have parts of blocks.
    """
    if not set(_OF_ELEMENTS) <= node["v"].keys():
        raise mismatch(path, f"a tensor of class {node['class']} for a sharded parameter", _FIX)
    scale = decode_spec(node["v"]["scale"], child_name(path, "scale"), decoder)
    block_size = like.numel() // scale.shape.numel()
    reason = _why_not_whole_blocks(like, block_size)
    if reason is not None:
        raise mismatch(path, f"a state in blocks, for a parameter {reason}", _FIX)
    num_rows = _num_rows(like.shape, block_size)
    restores: dict[str, Restore] = {}
    for name, child in node["v"].items():
        child_path = child_name(path, name)
        if name in _OF_ELEMENTS:
            restores[name] = _decode_rows(like, num_rows, child, child_path, decoder)
        else:
            restores[name] = decoder.decode(child, None, child_path)
    restore_context = decoder.decode(node["context"], None, child_name(path, "context"))
    shape, stride = local_tensor(like).shape, local_tensor(like).stride()

    def restore() -> torch.Tensor:
        inner = in_shapes_of_class(restore_all(restores), shape)
        inner = {name: tensor.to(like.device) for name, tensor in inner.items()}
        context = _with_shape(restore_context(), like.shape, shape)
        return with_local(like, cls.__tensor_unflatten__(inner, context, shape, stride))

    return restore


def _decode_rows(like: DTensor, num_rows: int, node: Node, path: str, decoder: Decoder) -> Restore:
    """Plan to read this rank's rows of an inner tensor, as a matrix."""
    spec = decode_spec(node, path, decoder)
    num_local = num_rows * local_tensor(like).numel() // like.numel()
    num_columns = spec.shape.numel() // num_rows
    local = torch.empty(num_local, num_columns, dtype=spec.dtype, device=like.device)
    sharded = _sharded_rows(like, num_rows, local)
    if spec.shape == sharded.shape:
        decoder.read_into(path, stored_view(sharded))
        return lambda: local
    # One process stores vectors, of which a rank cannot read a part as a matrix.
    full = torch.empty(spec.shape, dtype=spec.dtype)
    decoder.read_into(path, stored_view(full))
    return lambda: local_slice(full.reshape(num_rows, num_columns), sharded)


def in_shapes_of_class(
    inner: Mapping[str, torch.Tensor], shape: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return inner tensors in the shapes of their class: those of a shard are matrices.

    Effects: pure.

    Args:
        inner: The inner tensors by name.
        shape: Of the wrapper or of its shard.
    """
    result = dict(inner)
    if "scale" in result:
        result["scale"] = result["scale"].reshape(-1)
    codes = result.get("codes")
    if codes is not None:
        result["codes"] = codes.reshape(-1)
        # Codes of 8 bits have the shape of the tensor; two of 4 bits are one number.
        if codes.numel() == torch.Size(shape).numel():
            result["codes"] = codes.reshape(shape)
    return result


def check_shards_of_one_class(opt: Optimizer, path: str) -> None:
    """Raise if ranks have states of different classes for one parameter of torchao's optimizers.

    They quantize the state of a shard with at least 4096 elements and whole blocks only.

    Raises:
        CheckpointError: Names the shape of the parameter. All ranks raise.
    """
    block_size = getattr(opt, "block_size", None)
    if block_size is None or not type(opt).__module__.startswith("torchao."):
        return
    for group in opt.param_groups:
        for param in group["params"]:
            if not is_dtensor(param):
                continue
            sizes = _shard_sizes(param)
            is_quantized = {size >= _MIN_QUANTIZED and size % block_size == 0 for size in sizes}
            if len(is_quantized) > 1:
                raise CheckpointError(
                    f"`{path}` cannot be stored, because some ranks have states of fp32",
                    got=f"a parameter of shape {list(param.shape)} in shards of "
                    f"{sorted(sizes)} elements",
                    fix="use a number of ranks that divides its rows, or the states of "
                    "`torch.optim.AdamW`",
                )


_MIN_QUANTIZED = 4096


def _shard_sizes(param: DTensor) -> set[int]:
    """Return the numbers of elements that ranks have of a parameter."""
    sizes = {tuple(param.shape)}
    for placement, num_ranks in zip(param.placements, param.device_mesh.shape, strict=True):
        if not placement.is_shard():
            continue
        dim = cast("Any", placement).dim
        chunks: set[tuple[int, ...]] = set()
        for shape in sizes:
            # The chunks of `torch.chunk`: all of one length but the last ones.
            length = -(-shape[dim] // num_ranks)
            for rank in range(num_ranks):
                extent = min(length, max(0, shape[dim] - rank * length))
                chunks.add((*shape[:dim], extent, *shape[dim + 1 :]))
        sizes = chunks
    return {torch.Size(shape).numel() for shape in sizes}


SHARDED_WRAPPER: Codec[Any] = Codec((), is_sharded_wrapper, _encode, lambda *_: lambda: None)
"""Encodes only: what it stores has the kind of `WRAPPER`."""
