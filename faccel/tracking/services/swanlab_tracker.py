"""SwanLab, https://docs.swanlab.cn/en/api."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from faccel.tracking import service
from faccel.tracking.media import copy_file, image_of
from faccel.tracking.tracker import Cell, Tracker
from faccel.tracking.values import json_values


def _swanlab() -> Any:
    return service.import_service("swanlab", "swanlab", "swanlab")


def _open(folder: Path, config: Mapping[str, object], **options: Any) -> Any:
    swanlab = _swanlab()
    service.check_options("swanlab", options, service.keyword_names(swanlab.init))
    # The default of `project` is the working folder, and that of `log_dir` is in it.
    arguments: dict[str, Any] = {
        "project": folder.parent.name,
        "name": folder.name,
        "log_dir": str(folder / "swanlog"),
        "config": json_values(config),
    }
    run_id = service.same_run(folder, "swanlab", options, "id")
    # "allow" starts a run if the server does not have this one.
    if run_id is not None:
        arguments |= {"id": run_id, "resume": "allow"}
    run = swanlab.init(**{**arguments, **options})
    service.write_run_id(folder, "swanlab", run.id)
    return run


def _log(run: Any, values: Mapping[str, Any], step: int) -> None:
    recorded: dict[str, Any] = {}
    for name, value in values.items():
        recorded[name] = value
        # SwanLab would try to convert text to a number.
        if isinstance(value, str):
            recorded[name] = _swanlab().Text(value)
    run.log(recorded, step=step)


def _images(run: Any, name: str, images: np.ndarray, step: int) -> None:
    image_type = _swanlab().Image
    # A list is one entry with several images.
    run.log({name: [image_type(image_of(image)) for image in images]}, step=step)


def _table(
    run: Any, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
) -> None:
    # The only table that SwanLab draws is one of ECharts.
    table = _swanlab().echarts.Table()
    table.add(list(columns), [list(row) for row in rows])
    run.log({name: table}, step=step)


def _file(run: Any, name: str, path: Path) -> None:
    # SwanLab links to the file, whose content may change before the link is followed.
    copies = Path(run.dir) / "copies"
    copy = copy_file(path, copies, name)
    run.save(str(copy), base_path=str(copies), policy="now")


def _close(run: Any) -> None:
    run.finish()


TRACKER = Tracker(
    _open,
    _log,
    _close,
    types=(float, str),
    images=_images,
    table=_table,
    file=_file,
    name="swanlab",
)
