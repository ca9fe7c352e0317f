"""Weights & Biases, https://docs.wandb.ai/ref/python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from faccel.tracking import service
from faccel.tracking.media import figure_array
from faccel.tracking.tracker import Cell, Tracker
from faccel.tracking.values import json_values, to_json

# wandb draws objects of these libraries.
_DRAWN = ("matplotlib", "plotly", "wandb")


def _wandb() -> Any:
    return service.import_service("wandb", "wandb", "wandb")


def _open(folder: Path, config: Mapping[str, object], **options: Any) -> Any:
    wandb = _wandb()
    service.check_options("wandb", options, service.keyword_names(wandb.init))
    arguments: dict[str, Any] = {
        "name": folder.name,
        "dir": str(folder),
        "config": json_values(config),
    }
    run_id = service.same_run(folder, "wandb", options, "id")
    if run_id is not None:
        # A resumed run may have another configuration, such as more epochs.
        arguments |= {"id": run_id, "resume": "allow", "allow_val_change": True}
    # Options are stronger, also `id`, if the folder is new.
    run = wandb.init(**{**arguments, **options})
    service.write_run_id(folder, "wandb", run.id)
    return run


def _log(run: Any, values: Mapping[str, object], step: int) -> None:
    run.log({name: _history_value(value) for name, value in values.items()}, step=step)


def _history_value(value: Any) -> Any:
    """Return a value that wandb can store: one object of another type would drop all values."""
    if type(value).__module__.partition(".")[0] in _DRAWN:
        return value
    # The usual way to record several images is a list of `wandb.Image`.
    if isinstance(value, list | tuple):
        return [_history_value(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _history_value(item) for key, item in value.items()}
    return to_json(value)


def _images(run: Any, name: str, images: np.ndarray, step: int) -> None:
    image_type = _wandb().Image
    # Values of one step are merged until a value of a later step arrives.
    run.log({name: [image_type(image) for image in images]}, step=step)


def _table(
    run: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
) -> None:
    # A column of a float and a text is valid here, and an error of wandb by default.
    table = _wandb().Table(
        columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True
    )
    run.log({name: table}, step=step)


def _figure(run: Any, name: str, figure: Any, step: int) -> None:
    # wandb converts a figure of matplotlib to plotly, and fails for those that plotly cannot draw.
    if hasattr(figure, "savefig"):
        _images(run, name, figure_array(figure), step)
    else:
        run.log({name: figure}, step=step)


def _file(run: Any, name: str, path: Path) -> None:
    # Artifacts belong to the project: the identity of the run makes the name unique.
    artifact = _wandb().Artifact(f"run-{run.id}-{_artifact_name(name)}", type="file")
    artifact.add_file(str(path), name=name)
    run.log_artifact(artifact)


def _artifact_name(name: str) -> str:
    # The other characters are invalid in names of artifacts.
    valid = [character if character.isalnum() or character in "-_." else "_" for character in name]
    return "".join(valid)


def _close(run: Any) -> None:
    run.finish()


TRACKER = Tracker(
    _open,
    _log,
    _close,
    types=(object,),
    images=_images,
    table=_table,
    figure=_figure,
    file=_file,
    name="wandb",
)
