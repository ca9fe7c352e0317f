"""Which part of a sequence each rank of the axis `cp` has."""

from __future__ import annotations

import torch
from torch import Tensor

from faccel.context import DistContext

AXIS = "cp"
# With a causal mask, a query has more keys the later it is. In this layout a rank has one early and
# one late piece, so that all ranks compute equally much (Brandon et al., Striped Attention, 2023,
# describe the imbalance; Megatron-LM and Llama 3, section 3.3.2, have this layout).
HEAD_TAIL = "head-tail"


def chunk_index(ctx: DistContext) -> int:
    """Return the index of this rank on the axis `cp`."""
    return ctx.mesh.spec.coordinates(ctx.rank)[AXIS]


def num_pieces(ctx: DistContext) -> int:
    """Return the number of equal pieces that a rank has."""
    return 2 if ctx.config.cp_layout == HEAD_TAIL else 1


def pieces_of(index: int, ctx: DistContext) -> tuple[int, ...]:
    """Return the pieces that the rank `index` of the axis has, counted from the sequence's start.

    Effects: pure.

    Examples:
        >>> from faccel.testing import fake_context
        >>> pieces_of(1, fake_context(0, 4, mesh="cp=4"))
        (1,)
        >>> ctx = fake_context(0, 4, mesh="cp=4", config={"cp_layout": "head-tail"})
        >>> [pieces_of(index, ctx) for index in range(4)]
        [(0, 7), (1, 6), (2, 5), (3, 4)]
    """
    if num_pieces(ctx) == 1:
        return (index,)
    return (index, 2 * ctx.mesh.spec.cp - 1 - index)


def part_of_rank(x: Tensor, dim: int, ctx: DistContext) -> Tensor:
    """Return this rank's part of a full sequence: a view if the part is contiguous."""
    slices = x.tensor_split(num_pieces(ctx) * ctx.mesh.spec.cp, dim)
    pieces = pieces_of(chunk_index(ctx), ctx)
    if len(pieces) == 1:
        return slices[pieces[0]]
    return torch.cat([slices[piece] for piece in pieces], dim)


def in_order(x: Tensor, dim: int, ctx: DistContext) -> Tensor:
    """Return a full sequence whose parts are in the order of the ranks, in the order of tokens."""
    if num_pieces(ctx) == 1:
        return x
    pieces = _pieces_by_rank(ctx)
    slices = x.tensor_split(len(pieces), dim)
    by_piece = dict(zip(pieces, slices, strict=True))
    return torch.cat([by_piece[piece] for piece in range(len(pieces))], dim)


def by_rank(x: Tensor, dim: int, ctx: DistContext) -> Tensor:
    """Return a full sequence in the order of tokens with its parts in the order of the ranks."""
    if num_pieces(ctx) == 1:
        return x
    pieces = _pieces_by_rank(ctx)
    slices = x.tensor_split(len(pieces), dim)
    return torch.cat([slices[piece] for piece in pieces], dim)


def _pieces_by_rank(ctx: DistContext) -> list[int]:
    pieces: list[int] = []
    for index in range(ctx.mesh.spec.cp):
        pieces.extend(pieces_of(index, ctx))
    return pieces
