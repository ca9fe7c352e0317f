"""The commands `faccel checkpoints DIR` and `faccel checkpoints import DIR OUT`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from faccel.cli.flags import LocalPath
from faccel.cli.output import json_option, present

if TYPE_CHECKING:
    from faccel.checkpoint.import_folder import ImportReport
    from faccel.checkpoint.manifest import Checkpoint


class _Directory(click.Group):
    """A group whose first word may also be a directory, which is listed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        # `faccel checkpoints DIR` is older than the group, and scripts call it.
        is_command = bool(args) and args[0] in self.commands
        if args and not is_command and args[0] not in ctx.help_option_names:
            args = ["list", *args]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "[--json] DIRECTORY")
        formatter.write_usage(ctx.command_path, "import [OPTIONS] DIRECTORY OUT")


@click.group(cls=_Directory)
def checkpoints() -> None:
    """List the checkpoints in DIRECTORY and verify the hash of every file.

    The exit code is 1 if a checkpoint is incomplete, corrupt, or of a newer version of faccel.
    A directory with the name of a command is written `./import`.
    """


@checkpoints.command("list", hidden=True)
@click.argument("directory", type=LocalPath(exists=True, file_okay=False))
@json_option
def list_directory(directory: str, *, as_json: bool) -> None:
    """List the checkpoints in DIRECTORY and verify the hash of every file.

    The exit code is 1 if a checkpoint is incomplete, corrupt, or of a newer version of faccel.
    """
    from faccel.checkpoint.manifest import checkpoints as list_checkpoints
    from faccel.inference.budget import size_text

    documents: list[dict[str, object]] = []
    rows: list[tuple[str, str, str]] = []
    is_corrupt = False
    for checkpoint in list_checkpoints(directory):
        problem = _verify(checkpoint)
        ranks = "1 rank" if checkpoint.world_size == 1 else f"{checkpoint.world_size} ranks"
        status = f"{size_text(checkpoint.num_bytes)} from {ranks}"
        if problem is not None:
            is_corrupt = True
            status = f"CORRUPT: {problem}"
        if checkpoint.is_newer_format:  # it is valid
            status = f"NEWER: {problem}"
        rows.append((f"step {checkpoint.step}", status, checkpoint.path))
        documents.append(
            {
                "step": checkpoint.step,
                "path": checkpoint.path,
                "problem": problem,
                "num_bytes": checkpoint.num_bytes,
                "world_size": checkpoint.world_size,
                "created_s": checkpoint.created_s,
                "metadata": dict(checkpoint.metadata),
            }
        )
    present(documents, rows, as_json=as_json)
    # After the whole list is printed: a script reads it, and then the exit code.
    if is_corrupt:
        sys.exit(1)


def _verify(checkpoint: Checkpoint) -> str | None:
    """Return what is wrong with a checkpoint: its manifest, a hash, or the content of a file."""
    from faccel.checkpoint.verification import first_problem

    if checkpoint.problem is not None:
        return checkpoint.problem
    # Hashes of all files, which `checkpoints` alone does not read: it takes as long as
    # reading the files.
    return first_problem(checkpoint.path)


@checkpoints.command("import")
@click.argument("directory", type=LocalPath(exists=True))
@click.argument("out", type=LocalPath(file_okay=False))
@click.option("--format", "name", default="auto", show_default=True, help="What has written it.")
@click.option("--step", type=click.IntRange(0), help="Step of the checkpoint.")
@click.option("--epoch", type=click.IntRange(0), help="Epoch of the cursor.")
@click.option("--samples", type=click.IntRange(0), help="Samples that all ranks have read of it.")
@click.option(
    "--skip", multiple=True, metavar="NAME", help="A key, or a file of Accelerate, to skip."
)
@json_option
def import_directory(
    directory: str,
    out: str,
    *,
    name: str,
    step: int | None,
    epoch: int | None,
    samples: int | None,
    skip: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write a checkpoint of another library in DIRECTORY as one of faccel in OUT.

    Formats are accelerate (`save_state`, also with FSDP), dcp (torch.distributed.checkpoint),
    fabric, safetensors and torch (files of `torch.save`). No code of the files is executed. What
    is left out is listed.
    """
    import faccel
    from faccel.checkpoint.import_folder import import_checkpoint

    # An empty environment: the import runs on one process, whatever launched this command.
    with faccel.init(env={}) as ctx:
        report = import_checkpoint(
            directory,
            out,
            ctx,
            format=name,
            step=step,
            epoch=epoch,
            samples=samples,
            skip=skip,
        )
    present(_document(report), _rows(report), as_json=as_json)


def _document(report: ImportReport) -> dict[str, object]:
    return {
        "path": report.checkpoint.path,
        "step": report.checkpoint.step,
        "state": dict(report.state),
        "left_out": dict(report.left_out),
        "notes": list(report.notes),
    }


def _rows(report: ImportReport) -> list[tuple[str, ...]]:
    # What is left out is printed after what was imported, where a reader of the end sees it.
    checkpoint = report.checkpoint
    rows: list[tuple[str, ...]] = [(f"step {checkpoint.step}", "written", checkpoint.path)]
    rows += [(key, "imported", kind) for key, kind in report.state.items()]
    rows += [(name, "LEFT OUT", reason) for name, reason in report.left_out.items()]
    rows += [("note", note) for note in report.notes]
    return rows
