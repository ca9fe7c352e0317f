"""The command line; the only place that prints. torch is imported by the commands that need it."""

from __future__ import annotations

import sys

import click

from faccel.cli.config import config
from faccel.cli.launch import launch, test


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="faccel")
def main() -> None:
    """Run your own PyTorch training loop on anything."""


main.add_command(config)
main.add_command(launch)
main.add_command(test)


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
def checkpoints(directory: str) -> None:
    """List the checkpoints of DIRECTORY, and compare every file with its hash.

    Exits with 1 where one of them is not as it was written.
    """
    from faccel.checkpoint.record import check_hash, read_manifest
    from faccel.checkpoint.record import checkpoints as look

    is_fine = True
    for each in look(directory):
        problem = each.problem
        if problem is None:
            files = read_manifest(each.path).files
            problem = next((said for entry in files if (said := check_hash(each.path, entry))), None)
        is_fine = is_fine and problem is None
        what = (
            f"{each.num_bytes / 1e6:.1f} MB from {each.world_size} ranks" if problem is None else f"CORRUPT: {problem}"
        )
        print(f"step {each.step}  {what}  {each.path}")
    if not is_fine:
        sys.exit(1)


@main.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--model", "name", help="Which model, where the state holds several.")
@click.option("--max-shard-size", default="5GB", show_default=True, help="The largest file.")
def merge(checkpoint: str, out: str, name: str | None, max_shard_size: str) -> None:
    """Make one export of the model in CHECKPOINT, as `from_pretrained` loads it, in the directory OUT."""
    import faccel
    from faccel.checkpoint.export import merge as make

    try:
        with faccel.init(env={}) as ctx:
            for file in make(checkpoint, out, ctx, name=name, max_shard_size=max_shard_size):
                print(file)
    except faccel.errors.FaccelError as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.option("--explain", is_flag=True, help="For each field of the configuration its value and where it came from.")
def env(explain: bool) -> None:  # noqa: FBT001
    """Show versions, the place in the world and the device."""
    import platform

    import torch

    import faccel

    try:
        with faccel.init() as ctx:
            print(f"faccel {faccel.__version__}, torch {torch.__version__}, python {platform.python_version()}")
            print(f"rank {ctx.rank} of {ctx.world_size} ({ctx.topology.source}) on {ctx.device}")
            if explain:
                print(ctx.config.explain())
    except faccel.errors.FaccelError as error:
        raise click.ClickException(str(error)) from None
