"""The command line; the only place that prints. torch is imported by the commands that need it."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import Any

import click

from faccel.cli.config_command import config
from faccel.cli.launch_command import launch, test
from faccel.cli.output import explained, json_option, present


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="faccel")
def main() -> None:
    """Run your own PyTorch training loop on anything."""


main.add_command(config)
main.add_command(launch)
main.add_command(test)


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@json_option
def checkpoints(directory: str, *, as_json: bool) -> None:
    """List the checkpoints of DIRECTORY, and compare every file with its hash.

    Exits with 1 where one of them is not as it was written.
    """
    from faccel.checkpoint.manifest import check_hash, read_manifest
    from faccel.checkpoint.manifest import checkpoints as look

    found: list[dict[str, Any]] = []
    for each in look(directory):
        problem = each.problem
        if problem is None:
            files = read_manifest(each.path).files
            problem = next(
                (said for entry in files if (said := check_hash(each.path, entry))), None
            )
        found.append(
            {"step": each.step, "path": each.path, "problem": problem, "num_bytes": each.num_bytes,
             "world_size": each.world_size, "created_s": each.created_s, "metadata": dict(each.metadata)}
        )  # fmt: skip
    rows = [(f"step {one['step']}", _state_of(one), one["path"]) for one in found]
    present(found, rows, as_json=as_json)
    if any(one["problem"] is not None for one in found):
        sys.exit(1)


def _state_of(checkpoint: dict[str, Any]) -> str:
    if checkpoint["problem"] is not None:
        return f"CORRUPT: {checkpoint['problem']}"
    return f"{checkpoint['num_bytes'] / 1e6:.1f} MB from {checkpoint['world_size']} ranks"


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--model", "name", help="Which model, where the state holds several.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="The largest file.")
@json_option
def merge(
    checkpoint: str, out: str, *, name: str | None, max_shard_size: str, as_json: bool
) -> None:
    """Make one export of the model in CHECKPOINT, as `from_pretrained` loads it, in the directory OUT."""
    import faccel
    from faccel.checkpoint.merge import merge as make

    try:
        with faccel.init(env={}) as ctx:
            files = make(checkpoint, out, ctx, name=name, max_shard_size=max_shard_size)
            present(list(files), [(file,) for file in files], as_json=as_json)
    except faccel.errors.FaccelError as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.option(
    "--explain",
    is_flag=True,
    help="For each field of the configuration its value and where it came from.",
)
@json_option
def env(*, explain: bool, as_json: bool) -> None:
    """Show versions, devices, the place in the world and, with --explain, where each value came from."""
    import faccel
    from faccel.cli.environment import as_rows, describe
    from faccel.config import resolve
    from faccel.config_file import find, read

    try:
        reference = find(os.environ)
        config = resolve(env=os.environ, file=None if reference is None else read(reference))
        with ExitStack() as stack:
            problem, ctx = None, None
            try:
                ctx = stack.enter_context(faccel.init())
            except faccel.errors.FaccelError as error:
                problem = str(error)
            document = describe(config, ctx) | ({"problem": problem} if problem else {})
            rows = [
                ("file", reference or "none"),
                *as_rows(document),
                *(explained(config) if explain else []),
            ]
            present(document, rows, as_json=as_json)
    except faccel.errors.FaccelError as error:
        raise click.ClickException(str(error)) from None
    if problem:
        raise click.ClickException(problem)
