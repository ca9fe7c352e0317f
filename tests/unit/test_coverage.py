"""The check that slices cover a tensor, against a mask of the elements."""

import random

import numpy as np
import pytest

from faccel.checkpoint.coverage import Box, first_gap


def draw_case(draw):
    shape = tuple(draw.randrange(5) for _ in range(draw.randrange(4)))
    boxes = []
    for _ in range(draw.randrange(8)):
        start = tuple(draw.randrange(size + 1) for size in shape)
        end = tuple(draw.randint(a, size) for a, size in zip(start, shape, strict=True))
        boxes.append(Box(start, end))
    return shape, boxes


def test_the_first_gap_equals_that_of_a_mask_also_for_slices_that_overlap():
    draw = random.Random(0)
    num_covered = 0
    for _ in range(5000):
        shape, boxes = draw_case(draw)
        mask = np.zeros(shape, bool)
        for box in boxes:
            mask[tuple(map(slice, box.start, box.end))] = True
        gaps = np.argwhere(~mask)
        expected = tuple(gaps[0].tolist()) if len(gaps) else None
        assert first_gap(shape, boxes) == expected, (shape, boxes)
        num_covered += expected is None
    assert 500 < num_covered < 4500


class Counted(int):
    """An index that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other):
        Counted.comparisons += 1
        return int(self) < int(other)

    def __gt__(self, other):
        Counted.comparisons += 1
        return int(self) > int(other)


GRIDS = {
    "rows": lambda n: ((n, 2), [Box((i, 0), (i + 1, 2)) for i in range(n)]),
    "columns": lambda n: ((2, n), [Box((0, i), (2, i + 1)) for i in range(n)]),
    "elements": lambda n: ((n,), [Box((i,), (i + 1,)) for i in range(n)]),
    "nested": lambda n: ((2 * n,), [Box((i,), (2 * n - i,)) for i in range(n)]),
    "tiles": lambda n: (
        (n // 10, 10),
        [Box((i, j), (i + 1, j + 1)) for i in range(n // 10) for j in range(10)],
    ),
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_work_is_not_quadratic_in_the_number_of_slices(name):
    counts = []
    for n in (200, 800):
        shape, boxes = GRIDS[name](n)
        counted = [
            Box(tuple(map(Counted, box.start)), tuple(map(Counted, box.end))) for box in boxes
        ]
        Counted.comparisons = 0
        first_gap(shape, counted)
        counts.append(Counted.comparisons)
    assert counts[1] < 6 * counts[0]  # 4 times the slices, and a logarithm
