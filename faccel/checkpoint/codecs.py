"""The table of codecs: every kind of value that a checkpoint stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from faccel.checkpoint.codec import Codec, Decoder, Encoder, StoredTensor
from faccel.checkpoint.codec_ema import EMA
from faccel.checkpoint.codec_imported import IMPORTED
from faccel.checkpoint.codec_modules import MODULE, STATEFUL
from faccel.checkpoint.codec_optimizers import OPTIMIZER
from faccel.checkpoint.codec_per_rank import PER_RANK
from faccel.checkpoint.codec_random import RNG_STATE
from faccel.checkpoint.codec_records import RECORD
from faccel.checkpoint.codec_sharded_wrappers import SHARDED_WRAPPER
from faccel.checkpoint.codec_tensors import ARRAY, TENSOR, TENSORDICT
from faccel.checkpoint.codec_values import (
    BYTES,
    COMPLEX,
    DEVICE,
    DTYPE,
    FLOAT,
    MAPPING,
    PLAIN,
    SEQUENCE,
)
from faccel.checkpoint.codec_wrappers import WRAPPER
from faccel.context import DistContext
from faccel.tree import Tree

CODECS: tuple[Codec[Any], ...] = (
    PLAIN,
    FLOAT,
    SHARDED_WRAPPER,  # before TENSOR: a DTensor is one
    TENSOR,
    WRAPPER,
    # Before STATEFUL: these have `state_dict`, too.
    MODULE,
    OPTIMIZER,
    RNG_STATE,
    EMA,
    TENSORDICT,
    STATEFUL,
    # Before RECORD.
    *IMPORTED,
    PER_RANK,
    # Before SEQUENCE: a named tuple is a tuple.
    RECORD,
    MAPPING,
    SEQUENCE,
    # Before COMPLEX: numpy's complex128 is a complex number, and its float64 a float.
    ARRAY,
    BYTES,
    COMPLEX,
    DTYPE,
    DEVICE,
)
"""In order: the first codec that matches a value encodes it."""


def encoder_for(state: Tree, ctx: DistContext, *, trained_only: bool = False) -> Encoder:
    """Return an encoder of `state` with all codecs."""
    return Encoder(CODECS, state, ctx, trained_only=trained_only)


def decoder_for(
    state: Tree,
    stored: Mapping[str, StoredTensor],
    ctx: DistContext,
    *,
    strict: bool = True,
    stored_path: Callable[[str], str] = str,
) -> Decoder:
    """Return a decoder into `state` with all codecs."""
    return Decoder(CODECS, state, stored, ctx, strict=strict, stored_path=stored_path)
