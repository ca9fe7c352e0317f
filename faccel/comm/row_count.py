"""The number of valid rows of a batch, with what `gather` needs where ranks have other numbers."""

from __future__ import annotations


class RowCount(int):
    """A rank's number of valid rows, in a step in which the ranks may have other numbers of rows.

    An all-gather needs equally many rows on every rank. The largest number comes from the loader,
    so `gather` needs no further collective for it.

    Args:
        num_valid: Valid rows of this rank.
        largest: The largest number of valid rows on any rank, the same on every rank; None if the
            loader has read this rank's rows only.

    Examples:
        >>> count = RowCount(2, largest=4)
        >>> count, count + 1, count.largest
        (2, 3, 4)
    """

    largest: int | None

    def __new__(cls, num_valid: int, largest: int | None = None) -> RowCount:
        """Return the number with the largest one of all ranks."""
        count = super().__new__(cls, num_valid)
        count.largest = largest
        return count
