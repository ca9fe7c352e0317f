"""Each service's tracker: what it writes without network, in two runs of which one continues."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from faccel.tracking.tracker_table import TRACKERS

PROGRAMS = Path(__file__).with_name("tracker_programs.py")
ROWS = [["a", 0.5], ["b|c", None]]
OFFLINE = {
    "aim": {},
    "clearml": {"offline": True},
    "comet_ml": {"online": False},
    "dvclive": {},
    "mlflow": {"tracking_uri": "sqlite:///mlflow.db"},
    "swanlab": {"mode": "offline"},
    "trackio": {"project": "p"},
    "wandb": {"mode": "offline"},
}
# What the services write as text: cells of CSV files, values of a configuration.
AS_TEXT = {"comet_ml": [["a", "0.5"], ["b|c", ""]]}
NO_TABLES = ("aim", "dvclive")


def program(folder, *arguments, timeout=None):
    """Run a program that uses a service, and return its output."""
    # Services keep files in the home folder, and ask for an account if they find a terminal.
    env = {**os.environ, "HOME": str(folder), "TRACKIO_DIR": str(folder / "trackio")}
    env["PYTHONPATH"] = os.pathsep.join([str(PROGRAMS.parents[2]), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAMS), *arguments],
        cwd=folder, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def require(service):
    """Skip the test if a service is not installed; importing it would take seconds."""
    if importlib.util.find_spec(service) is None:
        pytest.skip(f"{service} is not installed: `.ci/run` tests it in another environment")


def test_every_service_has_a_test():
    assert set(OFFLINE) == set(TRACKERS) - {"csv", "jsonl", "tensorboard"}


@pytest.mark.slow
@pytest.mark.parametrize("service", OFFLINE)
def test_a_service_has_numbers_images_and_tables_of_both_parts_of_a_run(service, tmp_path):
    require(service)
    for first in (0, 2):
        output = program(tmp_path, "record", service, json.dumps(OFFLINE[service]), str(first))
        assert "later failures are not logged" not in output
    line = next(x for x in program(tmp_path, "read", service).splitlines() if x[:5] == "READ ")
    read = json.loads(line[5:])
    assert read["losses"] == {"0": 1.0, "1": 0.5, "2": 0.25, "3": 0.125}
    assert read["images"] == dict.fromkeys("0123", True)
    if service not in NO_TABLES:
        assert read["tables"] == dict.fromkeys("0123", AS_TEXT.get(service, ROWS))
    assert float(read["config"]["lr"]) == 0.5
    assert len(read["runs"]) == 1


@pytest.mark.slow
def test_trackio_continues_the_run_of_the_folder_and_not_the_newest_of_its_name(tmp_path):
    require("trackio")
    output = program(tmp_path, "same_names", "trackio")
    steps = next(line for line in output.splitlines() if line.startswith("STEPS "))
    assert json.loads(steps[6:]) == [[0, 2], [1]]


@pytest.mark.slow
def test_without_an_account_a_service_is_left_out_and_its_offline_mode_is_named(tmp_path):
    services = ("clearml", "swanlab", "wandb")
    for service in services:
        require(service)
    output = program(tmp_path, "no_account", *services)
    assert "OPENED jsonl\n" in output
    for service in services:
        assert output.count(f"the tracker `{service}` failed") == 1
        assert f"pass `{TRACKERS[service].offline}`" in output


# A program that waits for MLflow's own limits takes minutes; one request waits 120 s.
LIMIT_S = 110


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason", "opened"),
    [
        ("closed", "Connection refused", False),
        ("silent", "no answer in 5 s", False),
        ("later", "no answer in 5 s", True),
    ],
)
def test_a_server_that_is_down_stops_neither_the_run_nor_the_end_of_its_process(
    kind, reason, opened, tmp_path
):
    require("mlflow")
    output = program(tmp_path, "unreachable", kind, timeout=LIMIT_S)
    assert f"OPENED {opened}" in output
    # Once, with the way to record without the server; what has no server records everything.
    failures = [line for line in output.splitlines() if line.startswith("the tracker `mlflow`")]
    assert len(failures) == 1
    assert reason in failures[0]
    assert "secret" not in output
    assert opened or "sqlite:///mlflow.db" in failures[0]
    lines = (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [1.0, 0.5, 0.25]
