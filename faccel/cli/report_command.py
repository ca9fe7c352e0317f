"""The command `faccel report RUN`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from faccel.cli.flags import LocalPath
from faccel.cli.output import json_option, present


@click.command()
@click.argument("run", type=click.Path())
@click.option(
    "--out",
    type=LocalPath(dir_okay=False),
    help="File to write. Default: report.html in the folder RUN.",
)
@json_option
def report(run: str, *, out: str | None, as_json: bool) -> None:
    """Write one page of HTML about the run in the folder RUN, and print its path.

    RUN is the folder of `faccel launch --run-dir RUN`, or one run in it. The page needs no network.
    The run may have ended, failed or been killed, or still train.
    """
    from faccel.report.charts import require_matplotlib
    from faccel.report.findings import finding
    from faccel.report.page import page
    from faccel.report.run_folder import find_run
    from faccel.report.run_record import read_record

    require_matplotlib()
    folders = find_run(run, "faccel report")
    record = read_record(folders)
    path = Path(out or folders.path / "report.html")
    # Names of files that are not UTF-8 are in messages as surrogates, which no encoding has.
    # A page that is open in a browser is replaced, and never half of one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        temporary.write_bytes(page(record).encode(errors="backslashreplace"))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    result = finding(record)
    document = {
        "path": str(path),
        "state": record.state,
        "verdict": result.sentence,
        "evidence": list(result.evidence),
        "next_step": result.next_step,
    }
    present(document, [(str(path),), (result.sentence,)], as_json=as_json)
