"""Values of any type in a file of JSON lines; images, tables and files next to it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TextIO

import attrs
import numpy as np

from faccel.tracking.media import copy_file, end_last_line, png, quoted
from faccel.tracking.tracker import Cell, Tracker
from faccel.tracking.values import json_text

# The fields of each line, and the names of metrics that have their names.
_RENAMED = MappingProxyType({"step": "values/step", "time": "values/time"})


@attrs.frozen(eq=False)
class _Files:
    folder: Path
    metrics: TextIO


def _open(folder: Path, config: Mapping[str, object]) -> _Files:
    # The newest configuration: a resumed run may have another one.
    text = json_text(config, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    path = folder / "metrics.jsonl"
    end_last_line(path)
    return _Files(folder, path.open("a", encoding="utf-8"))


def _log(files: _Files, values: Mapping[str, object], step: int) -> None:
    # A metric of such a name would be taken for the step.
    if "step" in values or "time" in values:
        values = {_RENAMED.get(name, name): value for name, value in values.items()}
    line = {"step": step, "time": time.time(), **values}
    files.metrics.write(json_text(line) + "\n")
    files.metrics.flush()  # a killed run keeps all that it logged


def _log_media(files: _Files, line: Mapping[str, object]) -> None:
    # A separate file: readers of the numbers need not skip tables.
    path = files.folder / "media.jsonl"
    end_last_line(path)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "time": time.time()}) + "\n")


def _images(files: _Files, name: str, images: np.ndarray, step: int) -> None:
    (files.folder / "images").mkdir(exist_ok=True)
    paths: list[str] = []
    for index, image in enumerate(images):
        path = Path("images", f"{quoted(name)}-{step}-{index}.png")
        (files.folder / path).write_bytes(png(image))
        paths.append(path.as_posix())
    _log_media(files, {"kind": "images", "name": name, "step": step, "paths": paths})


def _table(
    files: _Files, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
) -> None:
    # In the line itself: a reader needs one file for all tables.
    table = {"columns": list(columns), "rows": [list(row) for row in rows]}
    _log_media(files, {"kind": "table", "name": name, "step": step, **table})


def _file(files: _Files, name: str, path: Path) -> None:
    # A copy, because the file may change or be deleted later.
    copy = copy_file(path, files.folder / "files", name)
    _log_media(files, {"kind": "file", "name": name, "path": f"files/{copy.name}"})


def _close(files: _Files) -> None:
    files.metrics.close()


def _handle(files: _Files) -> TextIO:
    return files.metrics


TRACKER = Tracker(
    _open,
    _log,
    _close,
    # JSON has lists and objects; what it has not is written as text
    types=(object,),
    images=_images,
    table=_table,
    file=_file,
    handle=_handle,
    name="jsonl",
)
