"""MLflow, https://mlflow.org/docs/latest/python_api: a server, or a SQLite file."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from faccel.tracking import service
from faccel.tracking.media import named_images
from faccel.tracking.server import Server
from faccel.tracking.tracker import Cell, Tracker
from faccel.tracking.values import json_values

_MAX_PARAM = 6000  # characters; longer values are refused
_PARAMS_PER_BATCH = 100


@attrs.frozen(eq=False)
class _MlflowRun:
    client: Any
    active: Any
    # None for files and databases, and for Databricks, whose client has limits of its kind
    server: Server | None

    @property
    def run_id(self) -> str:
        return self.active.info.run_id


def _mlflow() -> Any:
    return service.import_service("mlflow", "mlflow", "mlflow")


def _open(folder: Path, config: Mapping[str, object], **options: Any) -> _MlflowRun:
    mlflow = _mlflow()
    allowed = ("tracking_uri", "experiment_name", *service.keyword_names(mlflow.start_run))
    service.check_options("mlflow", options, allowed)
    run_id = service.same_run(folder, "mlflow", options, "run_id")
    uri = options.pop("tracking_uri", None)
    # Before anything of the process is set.
    server = _server_at(str(uri or mlflow.get_tracking_uri()))
    # MLflow keeps both for the process, and its functions such as `mlflow.log_dict` use them.
    if uri is not None:
        mlflow.set_tracking_uri(uri)
    experiment = options.pop("experiment_name", None)
    if experiment is not None:
        mlflow.set_experiment(experiment)
    # A run that the script has started stays open: this one is nested in it.
    arguments: dict[str, Any] = {"nested": mlflow.active_run() is not None}
    if run_id is None:
        arguments["run_name"] = folder.name
    else:
        arguments["run_id"] = run_id
    run = _MlflowRun(mlflow.MlflowClient(), mlflow.start_run(**{**arguments, **options}), server)
    service.write_run_id(folder, "mlflow", run.run_id)
    _log_config(run, json_values(config))
    return run


def _server_at(uri: str) -> Server | None:
    """Return the server of a URI, which answers; None for a URI of another scheme."""
    if not uri.startswith(("http://", "https://")):
        return None
    server = Server(uri, "/health")
    server.ask()
    return server


def _bounded(write: Callable[..., None]) -> Callable[..., None]:
    """Return a function that calls no server that is down.

    MLflow repeats each request 7 times, for 4 minutes or more. Its limits are variables of the
    environment, which belong to the user.
    """

    def call(run: _MlflowRun, *args: Any) -> None:
        if run.server is not None:
            run.server.require()
        write(run, *args)

    return call


def _log_config(run: _MlflowRun, config: Mapping[str, object]) -> None:
    # The complete configuration, of the newest start.
    run.client.log_dict(run.run_id, dict(config), "config.json")
    # MLflow refuses a new value of a parameter: those of the first start stay.
    known = run.client.get_run(run.run_id).data.params
    param_type = _mlflow().entities.Param
    params: list[Any] = []
    for name, value in config.items():
        text = str(value)
        # A value that is too long is in config.json.
        if name not in known and len(text) <= _MAX_PARAM:
            params.append(param_type(name, text))
    for start in range(0, len(params), _PARAMS_PER_BATCH):
        batch = params[start : start + _PARAMS_PER_BATCH]
        run.client.log_batch(run.run_id, params=batch)


def _log(run: _MlflowRun, values: Mapping[str, float], step: int) -> None:
    metric_type = _mlflow().entities.Metric
    milliseconds = int(time.time() * 1000)
    # `log_batch` refuses all metrics if the name of one is invalid: they are recorded one by one.
    metrics = [metric_type(name, value, milliseconds, step) for name, value in values.items()]
    try:
        run.client.log_batch(run.run_id, metrics=metrics)
    except _mlflow().MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        _log_valid(run, metrics)
        raise


def _log_valid(run: _MlflowRun, metrics: Sequence[Any]) -> None:
    for metric in metrics:
        try:
            run.client.log_batch(run.run_id, metrics=[metric])
        except _mlflow().MlflowException:
            continue  # the caller reports it


def _images(run: _MlflowRun, name: str, images: np.ndarray, step: int) -> None:
    # The key is what the slider of the UI shows.
    for key, image in named_images(name, images):
        run.client.log_image(run.run_id, image, key=key, step=step)


def _table(
    run: _MlflowRun, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int
) -> None:
    data: dict[str, list[Cell]] = {}
    for index, column in enumerate(columns):
        data[column] = [row[index] for row in rows]
    # A file per step: MLflow appends the rows to an existing file.
    run.client.log_table(run.run_id, data, f"tables/{name}-{step}.json")


def _figure(run: _MlflowRun, name: str, figure: Any, step: int) -> None:
    # plotly writes HTML; MLflow takes the format from the suffix.
    suffix = "html"
    if hasattr(figure, "savefig"):
        suffix = "png"
    run.client.log_figure(run.run_id, figure, f"figures/{name}-{step}.{suffix}")


def _file(run: _MlflowRun, name: str, path: Path) -> None:
    label = Path("files", name)
    if label.name == path.name:
        run.client.log_artifact(run.run_id, str(path), str(label.parent))
        return
    # MLflow takes the name from the file.
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / label.name
        shutil.copyfile(path, copy)
        run.client.log_artifact(run.run_id, str(copy), str(label.parent))


def _close(run: _MlflowRun) -> None:
    if run.server is not None:
        try:
            run.server.ask()  # it may be up again
        except ConnectionError:
            _leave(run)
            raise
    # The script may have ended it, or started another.
    # `end_run` ends the active run only.
    if _is_active(run):
        _mlflow().end_run()
    else:
        run.client.set_terminated(run.run_id)


def _is_active(run: _MlflowRun) -> bool:
    active = _mlflow().active_run()
    return active is not None and active.info.run_id == run.run_id


def _leave(run: _MlflowRun) -> None:
    """Make the run inactive without its server: MLflow tries to end an active one at exit."""
    if not _is_active(run):
        return
    mlflow = _mlflow()
    uri = mlflow.get_tracking_uri()
    # `end_run` forgets the run first, and then raises at once, because the scheme is unknown.
    mlflow.set_tracking_uri("down://")
    try:
        mlflow.end_run()
    except mlflow.MlflowException:
        pass
    finally:
        mlflow.set_tracking_uri(uri)


def _handle(run: _MlflowRun) -> Any:
    return run.active


TRACKER = Tracker(
    _open,
    _bounded(_log),
    _close,
    images=_bounded(_images),
    table=_bounded(_table),
    figure=_bounded(_figure),
    file=_bounded(_file),
    handle=_handle,
    name="mlflow",
)
