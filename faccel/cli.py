"""The command line; the only place that prints. torch is imported by the commands that need it."""

from __future__ import annotations

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="faccel")
def main() -> None:
    """Run your own PyTorch training loop on anything.

    Start several processes with torchrun: `torchrun --nproc-per-node 2 script.py`.
    """


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
