"""`faccel config`: the user's own configuration file."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from faccel.cli.flags import UsageError
from faccel.cli.output import explained, fields_document, json_option, present
from faccel.errors import ConfigError, FaccelError, nearest


@click.group(invoke_without_command=True)
@click.pass_context
def config(context: click.Context) -> None:
    """Make, show, check and import configuration files; without a COMMAND, ask for each field in the terminal."""
    if context.invoked_subcommand is None:
        _questionnaire()


def _suited() -> dict[str, Any]:
    """Return what suits this machine: fields, and the number of processes."""
    import torch

    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    is_fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return {"nproc": max(1, count)} | ({"mixed_precision": "bf16"} if is_fast else {})


def _questionnaire() -> None:
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        fix = "use `faccel config default`, then `faccel config set key=value`"
        raise UsageError(
            ConfigError(
                "the questions need a terminal", got="input or output that is none", fix=fix
            )
        )
    from faccel.cli.questions import ask
    from faccel.config import resolve
    from faccel.config_file import ConfigFile, read

    file = _own()
    try:
        there = dict(read(file).values) if os.path.exists(file) else {}
        resolve(file=ConfigFile(file, there))
        values, nproc = ask(there, _suited())
    except FaccelError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; nothing was written") from None
    _write(file, values)
    words = ["faccel", "launch", *([] if nproc == 1 else ["--nproc", str(nproc)]), "script.py"]
    print(f"{file}\nstart with: {' '.join(words)}")


def _reference() -> str:
    from faccel.config_file import VARIABLE, default_path

    named = os.environ.get(VARIABLE) or default_path(os.environ)
    if named is None:
        raise click.ClickException(
            "there is no home directory. To fix: set FACCEL_CONFIG to a file"
        )
    return named


def _own() -> str:
    """Return the file that is written; a section of a file of the user's is not ours to write."""
    file, mark, section = _reference().partition("#")
    if mark:
        got = f"section `{section}` of `{file}`"
        fix = f"edit `{file}` by hand, or set FACCEL_CONFIG to a file of its own"
        raise UsageError(
            ConfigError("only a file that holds nothing else can be written", got=got, fix=fix)
        )
    return file


def _write(path: str, values: dict[str, Any], comment: str = "") -> None:
    from faccel.config_file import write

    try:
        write(path, values, comment)
    except FaccelError as error:
        raise click.ClickException(str(error)) from None


@config.command()
def path() -> None:
    """Print which file counts where none is named."""
    print(_reference())


@config.command()
@json_option
def show(*, as_json: bool) -> None:
    """Print each field, its value and where it came from."""
    from faccel.config import resolve
    from faccel.config_file import find, read

    try:
        reference = find(os.environ)
        file = None if reference is None else read(reference)
        found = resolve(env=os.environ, file=file)
    except FaccelError as error:
        raise click.ClickException(str(error)) from None
    rows = [(f"file: {reference or 'none'}", ""), *explained(found)]
    present({"file": reference, "fields": fields_document(found)}, rows, as_json=as_json)


@config.command()
@click.option("--force", is_flag=True, help="Replace the file that is there.")
def default(force: bool) -> None:  # noqa: FBT001
    """Write a file with what suits this machine."""
    file = _own()
    if os.path.exists(file) and not force:
        raise click.ClickException(
            f"`{file}` is there already. To fix: add `--force`, or change it with `faccel config set`"
        )
    values = _suited()
    del values["nproc"]
    _write(file, values)
    print(file)


@config.command(name="set")
@click.argument("pairs", nargs=-1, required=True, metavar="KEY=VALUE...")
def set_(pairs: tuple[str, ...]) -> None:
    """Change fields in the file."""
    from faccel.config import config_fields, resolve, unreadable
    from faccel.config_file import ConfigFile, read

    fields = {field.name: field for field in config_fields()}
    file = _own()
    try:
        values = dict(read(file).values) if os.path.exists(file) else {}
        for pair in pairs:
            name, mark, text = pair.partition("=")
            if not mark:
                raise ConfigError(
                    "a field is changed as `key=value`", got=f"`{pair}`", fix=f"write `{name}=...`"
                )
            if name not in fields:
                raise ConfigError(
                    f"`{name}` is not a field of the configuration", fix=nearest(name, fields)
                )
            try:
                values[name] = fields[name].metadata["parse"](text)
            except ValueError as error:
                raise unreadable(f"`{name}`", fields[name], text, error) from None
        resolve(file=ConfigFile(file, values))
    except FaccelError as error:
        raise UsageError(error) from None
    _write(file, values)
    print(file)


@config.command()
@click.argument("file")
@json_option
def check(file: str, *, as_json: bool) -> None:
    """Read FILE (or FILE#SECTION), and say what is wrong with it."""
    from faccel.config import resolve
    from faccel.config_file import read

    try:
        resolve(file=read(file))
    except FaccelError as error:
        if not as_json:
            raise click.ClickException(str(error)) from None
        present(
            {"file": file, "problem": error.problem, "got": error.got, "fix": error.fix},
            [],
            as_json=True,
        )
        sys.exit(1)
    present({"file": file, "problem": None}, [(f"{file}: fine",)], as_json=as_json)


@config.command(name="import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option("-o", "--out", help="Where to; the user's own file, if nothing is said.")
@click.option("--force", is_flag=True, help="Replace the file that is there.")
@json_option
def import_(file: str, out: str | None, *, force: bool, as_json: bool) -> None:
    """Turn FILE, a configuration of Accelerate, into one of faccel, and list what has no equal."""
    from faccel.config import resolve
    from faccel.config_file import ConfigFile, read
    from faccel.launching.import_accelerate import from_accelerate

    target = out or _own()
    if os.path.exists(target) and not force:
        raise click.ClickException(
            f"`{target}` is there already. To fix: add `--force`, or name another with `-o`"
        )
    try:
        imported = from_accelerate(read(file).values)
        resolve(file=ConfigFile(target, imported.values))
    except FaccelError as error:
        raise click.ClickException(str(error)) from None
    command = " ".join(["faccel", "launch", *imported.options, "script.py"])
    _write(
        target, dict(imported.values), f"# from {os.path.basename(file)}; start with: {command}\n"
    )
    document = {"file": target, "command": command, "values": dict(imported.values)}
    missing = dict(imported.without_equal)
    present(
        document | {"without_equal": missing},
        [(target,), (f"start with: {command}",)],
        as_json=as_json,
    )
    for key, value in missing.items() if not as_json else ():
        sys.stderr.write(f"no equal in this version: {key}: {value}\n")
