"""Trackio, https://huggingface.co/docs/trackio: a SQLite file per project, or a Space."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from faccel.tracking import service
from faccel.tracking.media import image_of, named_images
from faccel.tracking.tracker import Cell, Tracker
from faccel.tracking.values import json_values


def _trackio() -> Any:
    return service.import_service("trackio", "trackio", "trackio")


def _open(folder: Path, config: Mapping[str, object], **options: Any) -> Any:
    trackio = _trackio()
    service.check_options("trackio", options, service.keyword_names(trackio.init))
    # Trackio has no default project, and continues the newest run of a project and a name.
    # Another folder may have both: 8 letters make the name unique.
    arguments: dict[str, Any] = {
        "project": folder.parent.name,
        "name": f"{folder.name}-{uuid.uuid4().hex[:8]}",
        "config": json_values(config),
    }
    name = service.same_run(folder, "trackio", options, "name")
    if name is not None:
        arguments |= {"name": name, "resume": "allow"}
    run = trackio.init(**{**arguments, **options})
    service.write_run_id(folder, "trackio", run.name)
    return run


def _log(run: Any, values: Mapping[str, object], step: int) -> None:
    # Several records of one step are one row of the dashboard.
    run.log(dict(values), step=step)


def _images(run: Any, name: str, images: np.ndarray, step: int) -> None:
    image_type = _trackio().Image
    # A value of a run is one image; a list of them belongs into a table.
    for key, image in named_images(name, images):
        run.log({key: image_type(image_of(image))}, step=step)


def _table(
    run: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
) -> None:
    table = _trackio().Table(columns=list(columns), data=[list(row) for row in rows])
    run.log({name: table}, step=step)


def _file(run: Any, name: str, path: Path) -> None:
    # Artifacts belong to the project: the identity of the run makes the name unique.
    artifact = _trackio().Artifact(f"run-{run.id}-{name}", type="file")
    artifact.add_file(str(path), name=name)
    run.log_artifact(artifact)


def _close(run: Any) -> None:
    trackio = _trackio()
    # Trackio finishes its current run once more when the process exits, unless it does it itself.
    if trackio.context_vars.current_run.get() is run:
        trackio.finish()
    else:
        run.finish()


TRACKER = Tracker(
    _open,
    _log,
    _close,
    types=(float, str),
    images=_images,
    table=_table,
    file=_file,
    name="trackio",
)
