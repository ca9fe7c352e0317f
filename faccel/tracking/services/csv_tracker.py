"""Numbers and text in a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO
from urllib.parse import quote

from faccel.tracking.media import end_last_line
from faccel.tracking.tracker import Cell, Tracker


def _open(folder: Path, config: Mapping[str, object]) -> TextIO:
    path = folder / "metrics.csv"
    end_last_line(path)
    # a continued run has its header already
    is_new = not path.exists() or path.stat().st_size == 0
    # The csv module writes the ends of lines; text mode would translate them a second time.
    # Text may have bytes of a file name that are no UTF-8.
    file = path.open("a", newline="", encoding="utf-8", errors="backslashreplace")
    # One row per number, because a column per name needs all names before the first row.
    if is_new:
        csv.writer(file).writerow(("step", "name", "value"))
    return file


def _log(file: TextIO, values: Mapping[str, object], step: int) -> None:
    csv.writer(file).writerows((step, name, value) for name, value in values.items())
    file.flush()


def _table(
    file: TextIO, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
) -> None:
    # Next to the file of the numbers; a name such as "val/samples" must not name a folder.
    path = Path(file.name).with_name("tables") / f"{quote(name, safe='')}-{step}.csv"
    path.parent.mkdir(exist_ok=True)
    # "w": a step that is repeated after a restart replaces its table.
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as table:
        writer = csv.writer(table)
        writer.writerow(columns)
        writer.writerows(rows)


def _close(file: TextIO) -> None:
    file.close()


TRACKER = Tracker(_open, _log, _close, types=(float, str), table=_table, name="csv")
