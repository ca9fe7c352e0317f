"""ClearML, https://clear.ml/docs/latest/docs/references/sdk/task."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from faccel.errors import ConfigError
from faccel.tracking import service
from faccel.tracking.media import png
from faccel.tracking.tracker import Cell, Tracker
from faccel.tracking.values import json_values


def _open(folder: Path, config: Mapping[str, object], **options: Any) -> Any:
    task_type = service.import_service("clearml", "clearml", "clearml").Task
    service.check_options("clearml", options, ("offline", *service.keyword_names(task_type.init)))
    task_id = service.same_run(folder, "clearml", options, "reuse_last_task_id")
    # ClearML has this choice for the process, not for a task.
    if options.pop("offline", False):
        task_type.set_offline(offline_mode=True)
    arguments: dict[str, Any] = {
        "project_name": folder.parent.name,
        "task_name": folder.name,
        # By default, ClearML overwrites the last task of this name.
        "reuse_last_task_id": False,
    }
    if task_id is not None:
        # 0: steps are those of the user, and not counted from the last one.
        arguments |= {"reuse_last_task_id": task_id, "continue_last_task": 0}
    task = task_type.init(**{**arguments, **options})
    # A session without network cannot be continued: `clearml-task` imports it as a part of one.
    if not task_type.is_offline():
        service.write_run_id(folder, "clearml", task.id)
    task.set_parameters_as_dict(json_values(config))
    return task


def _title_and_series(name: str) -> tuple[str, str]:
    """Return the plot of a value, and its curve in it: "val/loss" is a curve of the plot "val"."""
    title, separator, series = name.rpartition("/")
    # A plot with one curve has its name twice.
    if not separator:
        return name, name
    return title, series


def _log(task: Any, values: Mapping[str, Any], step: int) -> None:
    logger = task.get_logger()
    not_finite: list[str] = []
    for name, value in values.items():
        title, series = _title_and_series(name)
        # Text is a line of the console: ClearML has no plot of it.
        if isinstance(value, str):
            logger.report_text(f"step {step}, {name}: {value}", print_console=False)
        elif math.isfinite(value):
            logger.report_scalar(title, series, value, step)
        else:
            not_finite.append(f"`{name}`")
    if not_finite:  # ClearML would store 0
        raise ConfigError(
            f"ClearML records no NaN and no infinity: {', '.join(not_finite)} left out",
            got=f"step {step}",
            fix='record them with another tracker, too, such as `"jsonl"`',
        )


def _images(task: Any, name: str, images: np.ndarray, step: int) -> None:
    for index, image in enumerate(images):
        # An array would become a JPEG file, which has losses and no transparency.
        with tempfile.NamedTemporaryFile(suffix=".png", delete=False) as file:
            file.write(png(image))
        task.get_logger().report_image(
            name, str(index), step, local_path=file.name, delete_after_upload=True
        )


def _table(
    task: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
) -> None:
    title, series = _title_and_series(name)
    # The first row has the names of the columns.
    table = [list(columns), *[list(row) for row in rows]]
    task.get_logger().report_table(title, series, step, table_plot=table)


def _figure(task: Any, name: str, figure: Any, step: int) -> None:
    title, series = _title_and_series(name)
    logger = task.get_logger()
    if hasattr(figure, "savefig"):
        # As an image: the interactive one needs plotly.
        logger.report_matplotlib_figure(title, series, figure, step, report_image=True)
    else:
        logger.report_plotly(title, series, figure, step)


def _file(task: Any, name: str, path: Path) -> None:
    # Otherwise a file that changes later would be uploaded in its later state.
    task.upload_artifact(name, str(path), wait_on_upload=True)


def _close(task: Any) -> None:
    task.close()


TRACKER = Tracker(
    _open,
    _log,
    _close,
    types=(float, str),
    images=_images,
    table=_table,
    figure=_figure,
    file=_file,
    name="clearml",
)
