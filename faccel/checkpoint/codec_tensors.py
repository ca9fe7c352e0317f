"""Codecs of tensors, arrays and TensorDicts."""

from __future__ import annotations

import numpy as np
import torch

from faccel.checkpoint.codec import Codec, Decoder, Encoder, Node, Restore, restore_all
from faccel.checkpoint.tensor_names import child_name
from faccel.errors import CheckpointError
from faccel.tree import Tree, is_sharded, is_tensordict

# Tensors. safetensors files that PyTorch's readers understand have no complex dtypes: those are
# stored as pairs of real numbers, in a last dim of size 2.


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def encode_tensor(value: torch.Tensor, path: str, encoder: Encoder) -> Node:
    """Add a tensor to those of the encoder, and return its node."""
    if value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(
            f"`{path}` is not a dense tensor",
            got=f"a tensor of layout {value.layout}",
            fix="call `.to_dense()` on it",
        )
    encoder.reserve(path)
    is_complex = value.dtype.is_complex
    # Replicas may differ by rounding, so all that is stored of a replicated tensor is the first
    # data rank's.
    if encoder.ctx.data_rank == 0 or is_sharded(value):
        encoder.tensors[path] = _stored_form(value)
    if is_complex:
        return {"!": "complex"}
    return {"!": "tensor"}


def _stored_form(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    if not is_sharded(value):  # a lazy negation has other bytes in memory; a DTensor has none
        value = value.resolve_neg()
    if value.dtype.is_complex:
        return torch.view_as_real(value.resolve_conj())
    return value


def _decode_tensor(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    if node["!"] == "complex":
        pairs = decoder.new_tensor(path)
        return lambda: torch.view_as_complex(pairs)
    tensor = decoder.new_tensor(path, like=target)
    return lambda: tensor


TENSOR = Codec(("tensor", "complex"), _is_tensor, encode_tensor, _decode_tensor)


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
    array = np.ascontiguousarray(value).reshape(value.shape)  # it turns 0 dims into 1
    node = encode_tensor(torch.from_numpy(array), path, encoder)
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
