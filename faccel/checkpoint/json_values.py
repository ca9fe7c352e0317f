"""Whether JSON can store a value: the metadata of a checkpoint, for example."""

from __future__ import annotations

import math
from collections.abc import Iterable

from faccel.checkpoint.tensor_names import MAX_DEPTH
from faccel.checks import shown
from faccel.errors import short_text

# Python reads and writes ints of up to 4300 decimal digits.
MAX_INT_BITS = 14_000


def json_problem(value: object, name: str = "value") -> str | None:
    """Return which item of a value JSON cannot store, and why; None if it can store all.

    Effects: pure.

    Examples:
        >>> json_problem({"loss": [float("nan")]}, "metadata")
        "`metadata['loss'][0]` is nan, of type float"
    """
    pending: list[tuple[str, object, int]] = [(name, value, 0)]
    while pending:
        path, item, depth = pending.pop()
        if depth > MAX_DEPTH:
            return f"`{short_text(path)}` is nested more than {MAX_DEPTH} levels deep"
        children: Iterable[tuple[object, object]] = ()
        if isinstance(item, (list, tuple)):
            children = enumerate(item)
        elif isinstance(item, dict):
            children = item.items()
            if not all(isinstance(key, str) for key in item):
                return f"`{short_text(path)}` has keys that are no strings"
        elif not _is_plain_or_subclass(item):
            if isinstance(item, int):  # its text would be too long
                return f"`{short_text(path)}` is an int of {item.bit_length()} bits"
            return f"`{short_text(path)}` is {shown(item)}"
        pending += [(f"{path}[{key!r}]", child, depth + 1) for key, child in children]
    return None


def _is_plain_or_subclass(value: object) -> bool:
    # JSON stores an enum or a number of numpy that is an int, a float or a str, too.
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return int(value).bit_length() <= MAX_INT_BITS
    return value is None or isinstance(value, str)
