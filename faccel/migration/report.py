"""What a rewriting has done: counts, and notes for the lines that differ."""

from __future__ import annotations

import attrs


@attrs.define(eq=False)
class Report:
    """Counts of one file, while it is rewritten.

    Args:
        converted: Uses of accelerate that were replaced.
        unconverted: Uses that stay as they are, with a note.
        notes: The texts of all notes.
    """

    converted: int = 0
    unconverted: int = 0
    notes: list[str] = attrs.field(factory=list)
    _pending: list[list[str]] = attrs.field(factory=list, init=False)

    def convert(self, count: int = 1) -> None:
        """Count replaced uses."""
        self.converted += count

    def enter(self) -> None:
        """Begin a statement: notes are collected for it from now on."""
        self._pending.append([])

    def leave(self) -> list[str]:
        """End a statement; return its notes."""
        return self._pending.pop()

    def note(self, text: str) -> str:
        """Add a note to the statement that is being rewritten, if there is one; returns it."""
        self.notes.append(text)
        if self._pending and text not in self._pending[-1]:
            self._pending[-1].append(text)
        return text

    def note_once(self, text: str) -> list[str]:
        """Return a note in a list; an empty one if the script has the note already."""
        if text in self.notes:
            return []
        self.notes.append(text)
        return [text]

    def refuse(self, what: str, docs: str) -> str:
        """Count a use that is not converted, and add its note."""
        self.unconverted += 1
        # `docs` is a page, or what to write instead and a page.
        fix = f"see {docs}" if docs.startswith("docs/") else docs
        return self.note(f"not converted: {what}; {fix}")
