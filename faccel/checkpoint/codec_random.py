"""Codec of `RngState`: the only value that differs between ranks and is stored for each of them."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from faccel.checkpoint.codec import Codec, Decoder, Encoder, Node, Restore, mismatch
from faccel.checkpoint.tensor_names import child_name
from faccel.device_table import is_host
from faccel.errors import CheckpointError
from faccel.random.generators import Generators
from faccel.random.hashing import mix
from faccel.random.seeding import RngState
from faccel.tree import Tree


def _is_rng_state(value: object) -> bool:
    return isinstance(value, RngState)


def _encode_rng_state(value: RngState, path: str, encoder: Encoder) -> Node:
    _add_tensors(value, encoder.ctx.rank, path, encoder)
    node: Node = {"!": "rng", "ranks": encoder.ctx.world_size, "device": value.device is not None}
    if value.device is not None:
        node["device_type"] = encoder.ctx.device.type
    return node


def random_node(
    states: Sequence[RngState], device_type: str | None, path: str, encoder: Encoder
) -> Node:
    """Return the node of the generators of all ranks of another program's world.

    Effects: updates encoder, by the tensors.

    Args:
        states: Those of each rank.
        device_type: The type of the device of `RngState.device`; None if there is none.
        path: The path of the value.
        encoder: The encoder.
    """
    for rank, state in enumerate(states):
        _add_tensors(state, rank, path, encoder)
    node: Node = {"!": "rng", "ranks": len(states), "device": device_type is not None}
    if device_type is not None:
        node["device_type"] = device_type
    return node


def _add_tensors(value: RngState, rank: int, path: str, encoder: Encoder) -> None:
    rank_path = child_name(path, f"rank-{rank:05d}")
    for name, tensor in _to_tensors(value).items():
        encoder.tensors[child_name(rank_path, name)] = tensor


def _decode_rng_state(node: Node, target: Tree, path: str, decoder: Decoder) -> Restore:
    rank = decoder.ctx.rank
    saved_rank = rank % node["ranks"]  # a larger world derives its generators from the saved ones
    names = ["torch", "python", "numpy", "pairs"]
    # A generator of another device type has another algorithm, and a CPU has none for a device.
    device_type = decoder.ctx.device.type
    is_same_type = node.get("device_type", device_type) == device_type
    if node["device"] and is_same_type and not is_host(decoder.ctx.device):
        names.append("device")
    rank_path = child_name(path, f"rank-{saved_rank:05d}")
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        tensors[name] = decoder.new_tensor(child_name(rank_path, name))

    def restore() -> RngState:
        state = _from_tensors(tensors)
        _check_state(state, path)
        if rank == saved_rank:
            return state
        return _derive(state, rank)

    return restore


def _to_tensors(rng: RngState) -> dict[str, torch.Tensor]:
    """Return the generators as tensors, because JSON is ten times as large."""
    python_version, python_words, python_gauss = rng.python
    numpy_kind, numpy_keys, numpy_position, has_gauss, numpy_gauss = rng.numpy
    if numpy_kind != "MT19937":
        raise CheckpointError(
            "numpy's global generator is not a Mersenne Twister",
            got=numpy_kind,
            fix="restore it with `numpy.random.set_bit_generator(numpy.random.MT19937())`",
        )
    # Both libraries draw normal numbers in pairs, and keep the second one for the next call.
    if python_gauss is None:
        python_gauss = math.nan
    tensors = {
        "torch": rng.torch,
        "python": torch.tensor([python_version, *python_words]),
        "numpy": torch.tensor([*numpy_keys.tolist(), numpy_position, has_gauss]),
        "pairs": torch.tensor([python_gauss, numpy_gauss], dtype=torch.float64),
    }
    if rng.device is not None:
        tensors["device"] = rng.device
    return tensors


def _from_tensors(tensors: Mapping[str, torch.Tensor]) -> RngState:
    """Return the generators that `_to_tensors` stored."""
    python_version, *python_words = tensors["python"].tolist()
    *numpy_keys, numpy_position, has_gauss = tensors["numpy"].tolist()
    python_gauss, numpy_gauss = tensors["pairs"].tolist()
    if math.isnan(python_gauss):
        python_gauss = None
    return RngState(
        torch=tensors["torch"],
        numpy=(
            "MT19937",
            np.array(numpy_keys, dtype=np.uint32),
            numpy_position,
            has_gauss,
            numpy_gauss,
        ),
        python=(python_version, tuple(python_words), python_gauss),
        device=tensors.get("device"),
    )


def _check_state(state: RngState, path: str) -> None:
    """Raise unless generators accept a state: `set_rng_state` could not undo a failure."""
    try:
        torch.Generator().set_state(state.torch)
        random.Random().setstate(state.python)
        np.random.RandomState().set_state(state.numpy)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise mismatch(path, f"an invalid random state ({error})", "load it without") from error


def _derive(state: RngState, rank: int) -> RngState:
    """Return generators for a rank that the saved world did not have.

    They differ between ranks, and are equal on each load.
    """
    checksum = zlib.crc32(state.torch.numpy().tobytes())
    generators = Generators.seeded(mix(checksum, rank))
    return RngState(generators.torch, generators.numpy, generators.python, None)


RNG_STATE = Codec(("rng",), _is_rng_state, _encode_rng_state, _decode_rng_state, is_strict=True)
