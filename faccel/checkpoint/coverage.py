"""Whether the slices of a tensor cover all its elements."""

from __future__ import annotations

from collections.abc import Sequence

import attrs


@attrs.frozen
class Box:
    """A hyperrectangle of the indices of a tensor.

    Args:
        start: Its first index in each dim.
        end: The index after its last one in each dim.
    """

    start: tuple[int, ...]
    end: tuple[int, ...]

    @classmethod
    def of(cls, offsets: Sequence[int], sizes: Sequence[int]) -> Box:
        """Return the box at `offsets`, of `sizes` elements in each dim."""
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        return cls(tuple(offsets), tuple(ends))


def first_gap(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[int, ...] | None:
    """Return the first index of a tensor, in row-major order, that no box contains, if any.

    Effects: pure. Exact for boxes that overlap or are no grid. `O(n log n)` for `n` boxes of a grid
    along any dims, which is what ranks write; at worst `O(n^2 log n)` for two dims.

    Args:
        shape: Shape of the tensor.
        boxes: Inside of the tensor.

    Examples:
        >>> rows = [Box((0, 0), (2, 3)), Box((3, 0), (4, 3))]
        >>> first_gap((4, 3), rows), first_gap((4, 3), [*rows, Box((1, 0), (3, 3))])
        ((2, 0), None)
    """
    if 0 in shape:  # no elements
        return None
    # an empty box, such as the shard of a rank after the last row, contains nothing
    nonempty = [box for box in boxes if all(a < b for a, b in zip(box.start, box.end, strict=True))]
    return _first_gap(shape, nonempty, 0)


def _first_gap(shape: Sequence[int], boxes: Sequence[Box], dim: int) -> tuple[int, ...] | None:
    """Return the first gap in the dims from `dim` on, for boxes that agree in the dims before."""
    if not boxes:
        return (0,) * (len(shape) - dim)
    if dim == len(shape) or any(_is_full(box, shape, dim) for box in boxes):
        return None
    by_start = sorted(boxes, key=lambda box: box.start[dim])
    if dim == len(shape) - 1:
        return _first_gap_of_intervals(shape[dim], by_start)
    # Sweep: between two neighbouring boundaries of this dim, the same boxes are active.
    active: list[Box] = []
    position, next_box = 0, 0
    while position < shape[dim]:
        active = [box for box in active if box.end[dim] > position]
        while next_box < len(by_start) and by_start[next_box].start[dim] <= position:
            active.append(by_start[next_box])
            next_box += 1
        gap = _first_gap(shape, active, dim + 1)
        if gap is not None:
            return (position, *gap)
        position = min(box.end[dim] for box in active)
        if next_box < len(by_start):
            position = min(position, by_start[next_box].start[dim])
    return None


def _first_gap_of_intervals(size: int, by_start: Sequence[Box]) -> tuple[int] | None:
    """Return the first gap in the last dim, for boxes in the order of their starts in it."""
    covered = 0
    for box in by_start:
        if box.start[-1] > covered:
            break
        covered = max(covered, box.end[-1])
    if covered < size:
        return (covered,)
    return None


def _is_full(box: Box, shape: Sequence[int], dim: int) -> bool:
    for start, end, size in zip(box.start[dim:], box.end[dim:], shape[dim:], strict=True):
        if start > 0 or end < size:
            return False
    return True
