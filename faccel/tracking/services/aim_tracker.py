"""Aim, https://aimstack.readthedocs.io: a repository `.aim` in the folder of the runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from faccel.tracking import service
from faccel.tracking.media import figure_array, image_of
from faccel.tracking.tracker import Tracker
from faccel.tracking.values import json_values


def _aim() -> Any:
    return service.import_service("aim", "aim", "aim")


def _open(folder: Path, config: Mapping[str, object], **options: Any) -> Any:
    aim = _aim()
    service.check_options(
        "aim", options, service.keyword_names(aim.Run.__init__)[1:]
    )  # after `self`
    # One repository for the runs of a folder: `aim up --repo runs` compares them.
    arguments: dict[str, Any] = {"repo": str(folder.parent)}
    run_hash = service.same_run(folder, "aim", options, "run_hash")
    if run_hash is not None:
        arguments["run_hash"] = run_hash
    run = aim.Run(**{**arguments, **options})
    service.write_run_id(folder, "aim", run.hash)
    run.name = folder.name
    run["config"] = json_values(config)
    # Aim copies files to a place that the user chooses.
    if run.artifacts_uri is None:
        run.set_artifacts_uri((folder / "aim-files").resolve().as_uri())
    return run


def _log(run: Any, values: Mapping[str, Any], step: int) -> None:
    for name, value in values.items():
        # A sequence of Aim has one type: numbers or texts.
        tracked = value
        if isinstance(value, str):
            tracked = _aim().Text(value)
        run.track(tracked, name=name, step=step)


def _images(run: Any, name: str, images: np.ndarray, step: int) -> None:
    image_type = _aim().Image
    # A list is one entry of the sequence.
    run.track([image_type(image_of(image)) for image in images], name=name, step=step)


def _figure(run: Any, name: str, figure: Any, step: int) -> None:
    # Aim draws a figure of matplotlib by plotly, which may be missing.
    if hasattr(figure, "savefig"):
        _images(run, name, figure_array(figure), step)
    else:
        run.track(_aim().Figure(figure), name=name, step=step)


def _file(run: Any, name: str, path: Path) -> None:
    # `block`: the process may end before a copy in the background.
    run.log_artifact(str(path), name=name, block=True)


def _close(run: Any) -> None:
    run.close()


TRACKER = Tracker(
    _open, _log, _close, types=(float, str), images=_images, figure=_figure, file=_file, name="aim"
)
