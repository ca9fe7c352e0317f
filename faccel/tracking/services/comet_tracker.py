"""Comet, https://www.comet.com/docs/v2/api-and-sdk/python-sdk."""

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


def _open(folder: Path, config: Mapping[str, object], **options: Any) -> Any:
    comet_ml = service.import_service("comet_ml", "comet_ml", "comet_ml")
    service.check_options("comet_ml", options, service.keyword_names(comet_ml.start))
    key = service.same_run(folder, "comet_ml", options, "experiment_key")
    # A key of 32 letters chosen here makes a session without network a part of the same run.
    arguments: dict[str, Any] = {
        "experiment_key": key or uuid.uuid4().hex,
        "experiment_config": comet_ml.ExperimentConfig(
            name=folder.name, offline_directory=str(folder)
        ),
    }
    experiment = comet_ml.start(**{**arguments, **options})
    service.write_run_id(folder, "comet_ml", experiment.get_key())
    experiment.log_parameters(json_values(config))
    return experiment


def _log(experiment: Any, values: Mapping[str, Any], step: int) -> None:
    numbers: dict[str, float] = {}
    for name, value in values.items():
        # A metric that is a text would be refused; texts have a tab of their kind.
        if isinstance(value, str):
            experiment.log_text(value, step=step, metadata={"name": name})
        else:
            numbers[name] = value
    experiment.log_metrics(numbers, step=step)


def _images(experiment: Any, name: str, images: np.ndarray, step: int) -> None:
    # Two images of one name and step would replace each other.
    for label, image in named_images(name, images):
        # Without the limits, Comet stretches the values of each image to 0 and 255.
        limits = (0, 255)
        experiment.log_image(image_of(image), name=label, image_minmax=limits, step=step)


def _table(
    experiment: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
) -> None:
    # The suffix chooses the format.
    data = [list(row) for row in rows]
    experiment.log_table(f"{name}-{step}.csv", tabular_data=data, headers=list(columns))


def _figure(experiment: Any, name: str, figure: Any, step: int) -> None:
    experiment.log_figure(name, figure, step=step)


def _file(experiment: Any, name: str, path: Path) -> None:
    experiment.log_asset(str(path), file_name=name)


def _close(experiment: Any) -> None:
    experiment.end()


TRACKER = Tracker(
    _open,
    _log,
    _close,
    types=(float, str),
    images=_images,
    table=_table,
    figure=_figure,
    file=_file,
    name="comet_ml",
)
