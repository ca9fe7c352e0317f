"""The command group `faccel` and its small commands.

Only this package prints. Each command imports what it needs, so that `--help` does not import
torch, which takes seconds.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from faccel.cli.checkpoints_command import checkpoints
from faccel.cli.compare_command import compare
from faccel.cli.config_command import config
from faccel.cli.estimate_command import estimate
from faccel.cli.flags import LocalPath
from faccel.cli.launch_command import launch, test
from faccel.cli.migrate_command import migrate
from faccel.cli.output import explain_rows, json_option, present
from faccel.cli.report_command import report
from faccel.cli.watch_command import watch
from faccel.cli.why_command import why
from faccel.errors import FaccelError, printable

if TYPE_CHECKING:
    from faccel.context import DistContext


class _Commands(click.Group):
    """Commands that end with the message of an error, without a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except FaccelError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # `faccel env | head -1`; click ends silently
                raise
            _discard_output()
            raise click.ClickException(printable(str(error))) from None


def _discard_output() -> None:
    """Drop what is buffered: at its end Python would write it again, and fail again."""
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), sys.stdout.fileno())


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="faccel")
def main() -> None:
    """Run a PyTorch training loop on any device and any number of processes."""
    # In the locale C, text outside of ASCII would raise when it is printed.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


main.add_command(checkpoints)
main.add_command(compare)
main.add_command(config)
main.add_command(estimate)
main.add_command(launch)
main.add_command(migrate)
main.add_command(report)
main.add_command(test)
main.add_command(watch)
main.add_command(why)


@main.command()
@click.argument("checkpoint", type=LocalPath(exists=True, file_okay=False))
@click.argument("out", type=LocalPath(file_okay=False))
@click.option("--model", "name", help="Name of the model, if the state holds several.")
@click.option(
    "--max-shard-size", default="5GB", show_default=True, help="Size of the largest file."
)
@json_option
def merge(
    checkpoint: str, out: str, *, name: str | None, max_shard_size: str, as_json: bool
) -> None:
    """Export the model in CHECKPOINT to the directory OUT, in the format of `from_pretrained`."""
    import faccel
    from faccel.checkpoint.merge import merge as merge_checkpoint

    # An empty environment: the export runs on one process, whatever launched this command.
    with faccel.init(env={}) as ctx:
        files = merge_checkpoint(checkpoint, out, ctx, name=name, max_shard_size=max_shard_size)
        present(list(files), [(file,) for file in files], as_json=as_json)


@main.command()
@click.option("--explain", is_flag=True, help="Print each configuration field and its source.")
@json_option
def env(*, explain: bool, as_json: bool) -> None:
    """Print versions, devices and the rank of this process.

    With --explain, also print each field of the configuration and its source.
    """
    from faccel.cli.environment import as_rows, describe
    from faccel.config_file import find, read
    from faccel.config_sources import resolve

    reference = find(os.environ)
    # Without a file the environment and the defaults still apply.
    file = None
    if reference is not None:
        file = read(reference)
    config = resolve(env=os.environ, file=file)
    # The context stays open until everything about it is printed.
    with ExitStack() as stack:
        ctx, problem = _try_init(stack)
        document = describe(config, ctx)
        if problem is not None:
            document["problem"] = problem
        rows: list[tuple[str, ...]] = [("file", reference or "none"), *as_rows(ctx)]
        if explain:
            rows += explain_rows(config)
        present(document, rows, as_json=as_json)
    if problem is not None:
        raise click.ClickException(problem)


def _try_init(stack: ExitStack) -> tuple[DistContext | None, str | None]:
    """Return the context, or the problem: versions and devices are printed even if `init` fails."""
    import faccel

    try:
        # The stack shuts the context down, so that `env` also works below `faccel launch`.
        return stack.enter_context(faccel.init()), None
    except FaccelError as error:
        return None, str(error)
