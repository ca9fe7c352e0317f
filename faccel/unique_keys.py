"""A key that a file of settings has twice is an error: parsers would take the last value."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from faccel.errors import ConfigError, short_text

_MAX_LINES = 4  # of a message


def duplicate_key(key: str, lines: Sequence[int]) -> ConfigError:
    """Return the error for a key that occurs several times in one mapping.

    Effects: pure.

    Examples:
        >>> duplicate_key("seed", [1, 3]).got
        'it on the lines 1, 3'
    """
    return ConfigError(
        f"the key `{short_text(key)}` occurs twice in one mapping",
        got=f"it on the lines {', '.join(map(str, lines[:_MAX_LINES]))}",
        fix="remove one of the two",
    )


def load_json(text: str) -> object:
    """Return the value of a JSON text.

    Effects: pure.

    Raises:
        ConfigError: An object has a key twice; names the lines with this key.
        ValueError: The text is not JSON.

    Examples:
        >>> load_json('{"seed": 3}')
        {'seed': 3}
    """

    def to_dict(pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) == len(pairs):
            return values
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise duplicate_key(key, _lines_with(key, text))
            seen.add(key)
        return values

    return json.loads(text, object_pairs_hook=to_dict)


def _lines_with(key: str, text: str) -> list[int]:
    # Of all objects: the parser reports no position.
    pattern = re.compile(rf'"{re.escape(key)}"\s*:')
    return [text.count("\n", 0, match.start()) + 1 for match in pattern.finditer(text)]
