"""The file `faccel.json` in the folder of a run: its configurations, for `faccel report`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from faccel.context import DistContext
from faccel.run_facts import run_facts
from faccel.tracking.values import json_values

RUN_FILE = "faccel.json"


def write_run_file(
    folder: Path, ctx: DistContext, *, config: Mapping[str, object] | None = None
) -> None:
    """Write the file on rank 0. A folder that cannot be written is logged, and training continues.

    Effects: ambient. Writes the file.

    Args:
        folder: The folder of the run.
        ctx: The context, whose configuration is stored with its sources.
        config: The hyperparameters; None keeps those that the file has.
    """
    path = folder / RUN_FILE
    values = run_facts(ctx.config)
    values |= {"world_size": ctx.world_size, "device": ctx.device.type}
    if config is None:
        config = read_run_file(folder).get("config")  # pyright: ignore[reportAssignmentType]
    if config is not None:
        config = json_values(config)
    values["config"] = config
    # A reader of a run that starts must not find half of it.
    temporary = path.with_name(f"{RUN_FILE}.new")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        logging.getLogger("faccel").error("`%s` cannot be written: %r", path, error)


def read_run_file(folder: Path, name: str = RUN_FILE) -> dict[str, object]:
    """Return the content of the file, or of another one of its form; empty if there is none.

    Effects: ambient. Reads the file.
    """
    try:
        values = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # none, or of another program
        return {}
    if isinstance(values, dict):
        return values
    return {}
