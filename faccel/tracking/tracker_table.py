"""The table of the built-in trackers. A module of a tracker is imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

import attrs

from faccel.tracking.tracker import Tracker


@attrs.frozen
class TrackerRow:
    """A built-in tracker.

    Args:
        module: The module with its `TRACKER`, below `faccel.tracking.services`.
        offline: How to record without network or account, for the message of a failure.
    """

    module: str
    offline: str = ""


TRACKERS: Mapping[str, TrackerRow] = MappingProxyType(
    {
        "aim": TrackerRow("aim_tracker"),
        "clearml": TrackerRow("clearml_tracker", 'options={"clearml": {"offline": True}}'),
        "comet_ml": TrackerRow("comet_tracker", 'options={"comet_ml": {"online": False}}'),
        "csv": TrackerRow("csv_tracker"),
        "dvclive": TrackerRow("dvclive_tracker"),
        "jsonl": TrackerRow("jsonl_tracker"),
        "mlflow": TrackerRow(
            "mlflow_tracker", 'options={"mlflow": {"tracking_uri": "sqlite:///mlflow.db"}}'
        ),
        "swanlab": TrackerRow("swanlab_tracker", 'options={"swanlab": {"mode": "offline"}}'),
        "tensorboard": TrackerRow("tensorboard_tracker"),
        "trackio": TrackerRow("trackio_tracker"),
        "wandb": TrackerRow("wandb_tracker", 'options={"wandb": {"mode": "offline"}}'),
    }
)
"""The built-in trackers by name. For another service, pass a `Tracker` to `init_trackers`."""


def load_tracker(name: str) -> Tracker:
    """Return a built-in tracker.

    Effects: ambient. Imports its module, which imports the service when the tracker opens.

    Examples:
        >>> load_tracker("csv").types
        (<class 'float'>, <class 'str'>)
    """
    # The table has names instead of functions, so that it imports no module of a tracker.
    module = importlib.import_module(f"faccel.tracking.services.{TRACKERS[name].module}")
    return module.TRACKER
