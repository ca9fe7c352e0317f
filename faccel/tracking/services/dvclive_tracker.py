"""DVCLive, https://dvc.org/doc/dvclive: files in the folder `dvclive` of the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from faccel.tracking.media import image_of, named_images
from faccel.tracking.service import check_options, import_service, keyword_names
from faccel.tracking.tracker import Tracker
from faccel.tracking.values import json_values


def _open(folder: Path, config: Mapping[str, object], **options: Any) -> Any:
    live_type = import_service("dvclive", "dvclive", "dvclive").Live
    check_options("dvclive", options, keyword_names(live_type.__init__)[1:])  # after `self`
    # Without `resume`, DVCLive deletes what the folder has.
    arguments: dict[str, Any] = {"dir": str(folder / "dvclive"), "resume": True}
    live = live_type(**{**arguments, **options})
    live.log_params(json_values(config))
    return live


def _log(live: Any, values: Mapping[str, Any], step: int) -> None:
    # DVCLive counts steps itself unless they are set.
    live.step = step
    for name, value in values.items():
        live.log_metric(name, value)
    live.make_summary()  # a killed run keeps the last values, too


def _images(live: Any, name: str, images: np.ndarray, step: int) -> None:
    live.step = step
    for folder, image in named_images(name, images):
        # DVC draws a slider over the steps for a folder of numbered images.
        live.log_image(f"{folder}/{step}.png", image_of(image))


def _file(live: Any, name: str, path: Path) -> None:
    # A copy in the folder of the run; without a DVC repository, DVCLive logs a warning instead.
    live.log_artifact(str(path), name=name, copy=True, cache=False)


def _close(live: Any) -> None:
    # In a Git repository, this saves the experiment.
    live.end()


TRACKER = Tracker(
    _open, _log, _close, types=(float, str), images=_images, file=_file, name="dvclive"
)
