"""Reads what is added to a file of lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_MAX_BYTES = 1 << 20


class Follower:
    """Reads complete lines that were added to a file since the last call.

    The first call begins near the end of a large file: a view of the last values needs no others.

    Args:
        path: The file, which need not exist yet.
        max_bytes: The most that one call reads.
    """

    def __init__(self, path: Path, max_bytes: int = _MAX_BYTES) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._offset = 0

    def lines(self) -> list[bytes]:
        """Return the new lines, without one that is not complete yet.

        Effects: ambient. Reads the file.
        """
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._offset:  # another file has replaced it
                    self._offset = 0
                begin = max(self._offset, size - self._max_bytes)
                file.seek(begin)
                data = file.read(size - begin)
        except OSError:  # it does not exist yet
            return []
        end = data.rfind(b"\n") + 1
        lines = data[:end].splitlines()
        # The first one is cut if something was skipped.
        if begin > self._offset and lines:
            del lines[0]
        self._offset = begin + end
        return lines

    def texts(self) -> list[str]:
        """Return the new lines as text.

        Effects: ambient. Reads the file.
        """
        return b"\n".join(self.lines()).decode(errors="replace").split("\n")

    def objects(self) -> list[dict[str, Any]]:
        """Return the new lines that are objects of JSON.

        Effects: ambient. Reads the file.
        """
        objects: list[dict[str, Any]] = []
        for line in self.lines():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):  # of another program
                continue
            if isinstance(values, dict):
                objects.append(values)
        return objects
