"""Codecs of tensors, arrays and TensorDicts."""

from __future__ import annotations

import numpy as np
import torch

from faccel.checkpoint.codec import (
    Codec,
    Decoder,
    Encoder,
    Node,
    Restore,
    StoredTensor,
    mismatch,
    restore_all,
)
from faccel.checkpoint.tensor_names import child_name
from faccel.checkpoint.tensor_views import (
    DTYPES,
    check_storable,
    empty_in_layout,
    is_view_needed,
    stored_view,
)
from faccel.errors import CheckpointError
from faccel.tree import Tree, has_inner_tensors, is_sharded, is_tensordict

# Tensors. The kind states how the elements are stored: as they are, a complex number as a pair of
# real ones, or as bytes of a dtype that the files do not have.


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not has_inner_tensors(value)


def encode_tensor(value: torch.Tensor, path: str, encoder: Encoder) -> Node:
    """Add a tensor to those of the encoder, and return its node."""
    check_storable(path, value)
    node: dict[str, str] = {"!": "tensor"}
    if value.dtype.is_complex:
        node = {"!": "complex"}
    elif is_view_needed(value.dtype):
        node = {"!": "bits", "dtype": str(value.dtype).removeprefix("torch.")}
    encoder.reserve(path)
    # Replicas may differ by rounding, so all that is stored of a replicated tensor is the first
    # data rank's.
    if encoder.is_per_rank and is_sharded(value):
        raise CheckpointError(
            f"`{path}` is sharded, so its ranks store it together",
            got=f"a {type(value).__name__} inside of `per_rank`",
            fix="remove `per_rank` from it",
        )
    if encoder.is_per_rank or encoder.ctx.data_rank == 0 or is_sharded(value):
        encoder.tensors[path] = _stored_form(value)
    return node


def _stored_form(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    if not is_sharded(value):  # a lazy negation has other bytes in memory; a DTensor has none
        value = value.resolve_neg().resolve_conj()
    return stored_view(value)


def decode_spec(node: Node, path: str, decoder: Decoder) -> StoredTensor:
    """Return shape and dtype of the tensor that was saved as `node`.

    Raises:
        CheckpointError: This version of torch does not have its dtype.
    """
    stored = decoder.stored(path)
    if node["!"] == "complex":
        return StoredTensor(stored.shape[:-1], stored.dtype.to_complex())
    if node["!"] == "bits":
        dtype = DTYPES.get(node["dtype"])
        if dtype is None or dtype.itemsize != 1:
            raise mismatch(path, f"the unknown dtype `{node['dtype']}`", "update torch")
        return StoredTensor(stored.shape, dtype)
    return stored


def _decode_tensor(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    spec = decode_spec(node, path, decoder)
    # A tensor of the shape of `target` gets its device and layout.
    if isinstance(target, torch.Tensor) and target.shape == spec.shape:
        tensor = empty_in_layout(target, spec.dtype)
    else:
        tensor = torch.empty(spec.shape, dtype=spec.dtype)
    decoder.read_into(path, stored_view(tensor))
    return lambda: tensor


TENSOR = Codec(("tensor", "complex", "bits"), _is_tensor, encode_tensor, _decode_tensor)


# Arrays and scalars of numpy. The dtype is in the node, because torch has fewer dtypes and one byte
# order.


def _is_array(value: object) -> bool:
    return isinstance(value, (np.ndarray, np.generic))


def _encode_array(value: np.ndarray | np.generic, path: str, encoder: Encoder) -> Node:
    if value.dtype.kind not in "biufc":
        raise CheckpointError(
            f"`{path}` is an array whose items are not numbers",
            got=f"dtype {value.dtype}",
            fix="use a list",
        )
    if isinstance(value, np.ndarray) and type(value) not in (np.ndarray, np.memmap):
        raise CheckpointError(  # a masked array would come back without its mask
            f"`{path}` is a subclass of an array",
            got=f"a {type(value).__name__}",
            fix="store the arrays that it consists of",
        )
    # torch has one byte order; the dtype in the node has the array's
    native = np.asarray(value).astype(value.dtype.newbyteorder("="), copy=False)
    array = np.ascontiguousarray(native).reshape(value.shape)  # it turns 0 dims into 1
    try:
        tensor = torch.from_numpy(array)
    except TypeError:
        raise CheckpointError(
            f"`{path}` is an array of a dtype that torch does not have",
            got=f"dtype {value.dtype}",
            fix="cast it, for example with `.astype(np.float64)`",
        ) from None
    node = encode_tensor(tensor, path, encoder)
    is_scalar = isinstance(value, np.generic)
    return {"!": "array", "v": node, "dtype": value.dtype.str, "scalar": is_scalar}


def _decode_array(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    restore_tensor = decoder.decode(node["v"], None, path)
    dtype = np.dtype(node["dtype"])

    def restore() -> np.ndarray | np.generic:
        array = restore_tensor().numpy().astype(dtype, copy=False)
        if node["scalar"]:
            return dtype.type(array[()])
        return array

    return restore


ARRAY = Codec(("array",), _is_array, _encode_array, _decode_array)


# TensorDicts. They have `state_dict`, but they are values: a new one is returned.


def _encode_tensordict(value: Tree, path: str, encoder: Encoder) -> Node:
    nodes: dict[str, Node] = {}
    for key in value.keys():  # noqa: SIM118 (iterating a TensorDict iterates its batch)
        nodes[key] = encoder.encode(value.get(key), child_name(path, key))
    return {"!": "tensordict", "batch_size": list(value.batch_size), "v": nodes}


def _decode_tensordict(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    from tensordict import TensorDict

    targets: dict[str, Tree] = {}
    if is_tensordict(target):  # for the layouts of its tensors
        targets = dict(target.items())
    restores: dict[str, Restore] = {}
    for key, child in node["v"].items():
        restores[key] = decoder.decode(child, targets.get(key), child_name(path, key))

    def restore() -> TensorDict:
        return TensorDict(restore_all(restores), batch_size=node["batch_size"])

    return restore


TENSORDICT = Codec(("tensordict",), is_tensordict, _encode_tensordict, _decode_tensordict)
