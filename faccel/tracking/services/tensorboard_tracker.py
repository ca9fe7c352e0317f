"""TensorBoard: an event file in the folder of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from faccel.tracking.media import named_images
from faccel.tracking.service import check_options, import_service, keyword_names
from faccel.tracking.tracker import Cell, Tracker
from faccel.tracking.values import json_text

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter


def _open(folder: Path, config: Mapping[str, object], **options: Any) -> SummaryWriter:
    # tensorboard is an optional dependency, and slow to import.
    module = import_service("torch.utils.tensorboard.writer", "tensorboard", '"faccel[track]"')
    check_options("tensorboard", options, keyword_names(module.SummaryWriter))
    writer = module.SummaryWriter(**{"log_dir": str(folder), **options})
    writer.add_text("config", json_text(config, indent=2))
    return writer


def _log(writer: SummaryWriter, values: Mapping[str, Any], step: int) -> None:
    for name, value in values.items():
        if isinstance(value, str):
            writer.add_text(name, value, step)
        else:
            writer.add_scalar(name, value, step)


def _images(writer: SummaryWriter, name: str, images: np.ndarray, step: int) -> None:
    # One event per image: `add_images` draws a batch as one picture without gaps.
    # The same tag and step twice would show one of them.
    for tag, image in named_images(name, images):
        writer.add_image(tag, image, step, dataformats="HWC")


def _table(
    writer: SummaryWriter,
    name: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    step: int,
) -> None:
    # The Text tab draws a table of Markdown.
    lines = [_markdown_row(columns), _markdown_row(["---"] * len(columns))]
    lines += [_markdown_row(row) for row in rows]
    writer.add_text(name, "\n".join(lines), step)


def _markdown_row(cells: Sequence[Cell]) -> str:
    # A bar or a line break would start another cell or row.
    texts = [str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells]
    return f"| {' | '.join(texts)} |"


def _close(writer: SummaryWriter) -> None:
    writer.close()


TRACKER = Tracker(
    _open, _log, _close, types=(float, str), images=_images, table=_table, name="tensorboard"
)
