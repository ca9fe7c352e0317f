"""`faccel config`: create, print, change and check the user's configuration file."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from faccel.checks import parse_count
from faccel.cli.flags import LocalPath, UsageError
from faccel.cli.output import explain_rows, fields_document, json_option, present
from faccel.config_file import NPROC
from faccel.errors import ConfigError, FaccelError, nearest, short_text

if TYPE_CHECKING:
    from faccel.config import Config
    from faccel.config_file import ConfigFile


@click.group(invoke_without_command=True)
@click.pass_context
def config(context: click.Context) -> None:
    """Create, print, check and import configuration files.

    Without a COMMAND, asks for each field in the terminal.
    """
    if context.invoked_subcommand is None:
        _questionnaire()


@contextmanager
def _errors_as_messages() -> Generator[None]:
    """Print an error of faccel as a message with exit code 1, without a traceback."""
    try:
        yield
    except FaccelError as error:
        raise click.ClickException(str(error)) from None


def _recommended() -> tuple[dict[str, Any], int]:
    """Return the fields that are recommended for this node, and the number of processes."""
    import torch

    from faccel.device_table import computes_bf16

    # The same choice as `--nproc auto`.
    num_processes = 1
    if torch.accelerator.is_available():
        num_processes = max(1, torch.accelerator.device_count())
    values: dict[str, Any] = {}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and computes_bf16(accelerator.type):
        values["mixed_precision"] = "bf16"
    return values, num_processes


def _questionnaire() -> None:
    # questionary reads keys, which pipes and files do not send.
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            ConfigError(
                "`faccel config` without a command needs a terminal",
                got="redirected input or output",
                fix="use `faccel config default`, then `faccel config set key=value`",
            )
        )
    from faccel.cli.questions import ask
    from faccel.config_file import ConfigFile
    from faccel.config_sources import resolve

    file = _user_file()
    try:
        with _errors_as_messages():
            current = _values_of(file)
            resolve(
                file=ConfigFile(file, current)
            )  # an invalid file fails before the first question
            recommended, num_processes = _recommended()
            values, num_nodes = ask(current, recommended, num_processes)
    # Answers so far are dropped: a file with half of them would look complete.
    except KeyboardInterrupt:
        raise click.ClickException("interrupted; nothing was written") from None
    _write(file, values)
    options = ""
    if num_nodes > 1:
        # They differ between nodes, so no file has them.
        options = f"--nnodes {num_nodes} --node-rank RANK --main-address HOST "
    print(f"{file}\nstart with: faccel launch {options}script.py")


def _values_of(file: str) -> dict[str, Any]:
    """Return the fields in a file, none if it does not exist."""
    from faccel.config_file import read

    if not os.path.exists(file):
        return {}
    return dict(read(file).values)


def _reference() -> str:
    """Return the configuration file that applies by default, as `path` or `path#section`."""
    from faccel.config_file import VARIABLE, default_path

    reference = os.environ.get(VARIABLE) or default_path(os.environ)
    # Without $HOME, as in some containers.
    if reference is None:
        raise click.ClickException("no home directory. To fix: set FACCEL_CONFIG to a file")
    return reference


def _user_file() -> str:
    """Return the path of the user's configuration file, which the commands may write.

    A section of a larger file is never written: the rest of that file belongs to the user.
    """
    # `FACCEL_CONFIG` may name a section, as in `training.yaml#faccel`.
    file, mark, section = _reference().partition("#")
    if mark:
        raise UsageError(
            ConfigError(
                "a section of a larger file is never written",
                got=f"section `{section}` of `{file}`",
                fix=f"edit `{file}` by hand, or set FACCEL_CONFIG to a separate file",
            )
        )
    return file


def _check_new(file: str, *, force: bool, fix: str) -> None:
    if os.path.exists(file) and not force:
        raise click.ClickException(f"`{file}` already exists. To fix: add `--force`, or {fix}")


def _write(
    path: str, values: Mapping[str, Any], comment: str = "", *, is_replaced: bool = False
) -> None:
    from faccel.config_edit import write

    with _errors_as_messages():
        write(path, values, comment, is_replaced=is_replaced)


@config.command()
def path() -> None:
    """Print the path of the default configuration file."""
    print(_reference())


@config.command()
@json_option
def show(*, as_json: bool) -> None:
    """Print the value and the source of each field."""
    from faccel.config_file import find, read
    from faccel.config_sources import resolve

    with _errors_as_messages():
        reference = find(os.environ)
        file = None
        if reference is not None:
            file = read(reference)
        resolved = resolve(env=os.environ, file=file)
    rows: list[tuple[str, ...]] = [(f"file: {reference or 'none'}", "")]
    if file is not None and file.nproc is not None:
        rows.append((f"{NPROC} = {file.nproc}", f"({file.source(NPROC)})"))
    rows += explain_rows(resolved)
    present({"file": reference, "fields": fields_document(resolved)}, rows, as_json=as_json)


@config.command()
@click.option("--force", is_flag=True, help="Replace an existing file.")
def default(*, force: bool) -> None:
    """Write a file with the settings that are recommended for this node."""
    file = _user_file()
    _check_new(file, force=force, fix="change it with `faccel config set`")
    # Without the number of processes: it would be that of `--nproc auto`.
    values, _ = _recommended()
    _write(file, values, is_replaced=force)
    print(file)


@config.command(name="set")
@click.argument("pairs", nargs=-1, required=True, metavar="KEY=VALUE...")
def set_(pairs: tuple[str, ...]) -> None:
    """Change fields in the file."""
    from faccel.config_file import ConfigFile

    file = _user_file()
    try:
        values = _values_of(file)
        for pair in pairs:
            name, value = _parse_pair(pair)
            values[name] = value
        _validated(ConfigFile(file, values))  # all of them, before the file is written
    except FaccelError as error:
        raise UsageError(error) from None
    _write(file, values)
    print(file)


def _validated(file: ConfigFile) -> Config:
    """Return the configuration of a file, whose mesh fits its number of processes."""
    from faccel.config_mesh import check_num_processes
    from faccel.config_sources import resolve

    resolved = resolve(file=file)
    if file.num_processes is not None:
        check_num_processes(resolved, file.num_processes)
    return resolved


def _parse_pair(pair: str) -> tuple[str, Any]:
    """Parse `KEY=VALUE` into the name and the value of a field."""
    from faccel.config import config_fields, unreadable

    name, mark, text = pair.partition("=")
    if not mark:
        raise ConfigError(
            "`faccel config set` expects `key=value`",
            got=f"`{short_text(pair)}`",
            fix=f"write `{short_text(name)}=...`",
        )
    if name == NPROC:
        return name, _int_or_word(text)
    fields = {field.name: field for field in config_fields()}
    # Before parsing: an unknown name has no parser.
    if name not in fields:
        raise ConfigError(
            f"`{short_text(name)}` is not a field of the configuration",
            fix=nearest(name, [*fields, NPROC]),
        )
    try:
        return name, fields[name].metadata["parse"](text)
    except ValueError as error:
        raise unreadable(f"`{name}`", fields[name], text, error) from None


def _int_or_word(text: str) -> int | str:
    count = parse_count(text)
    if count is not None:
        return count
    return text  # `auto`, or a mistake, which the validation of the file reports


@config.command()
@click.argument("file")
@json_option
def check(file: str, *, as_json: bool) -> None:
    """Check FILE (or FILE#SECTION) and report the first error in it.

    Also tries whether the device, the mesh and the strategy are available on this node.
    """
    from faccel.cli.trial import try_configuration
    from faccel.config_file import read

    try:
        content = read(file)
        try_configuration(_validated(content), content.num_processes or 1)
    except FaccelError as error:
        if not as_json:
            raise click.ClickException(str(error)) from None
        # The three parts of the message as data, for editors and CI.
        document = {"file": file, "problem": error.problem, "got": error.got, "fix": error.fix}
        present(document, [], as_json=True)
        sys.exit(1)
    present({"file": file, "problem": None}, [(f"{file}: valid",)], as_json=as_json)


@config.command(name="import")
@click.argument("file", type=LocalPath(exists=True, dir_okay=False))
@click.option("-o", "--out", help="File to write. Default: the user's configuration file.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@json_option
def import_(file: str, out: str | None, *, force: bool, as_json: bool) -> None:
    """Convert FILE, a configuration of Accelerate, and list the keys without an equivalent."""
    from faccel.config_file import ConfigFile, read_accelerate
    from faccel.launching.import_accelerate import from_accelerate

    target = out or _user_file()
    _check_new(target, force=force, fix="choose another file with `-o`")
    with _errors_as_messages():
        converted = from_accelerate(read_accelerate(file))
        _validated(ConfigFile(target, converted.values))
    command = shlex.join(["faccel", "launch", *converted.options, "script.py"])
    # The comment is the only place in the file for options of the launcher.
    comment = f"from {os.path.basename(file)}; start with: {command}"
    rows = [(target,), (f"start with: {command}",)]
    _write(target, converted.values, comment)
    document = {
        "file": target,
        "command": command,
        "values": dict(converted.values),
        "without_equivalent": dict(converted.without_equivalent),
        "in_script": dict(converted.in_script),
    }
    present(document, rows, as_json=as_json)
    if not as_json:
        for key, text in converted.in_script.items():
            sys.stderr.write(f"in the script: {key}: write {text}\n")
        for key, value in converted.without_equivalent.items():
            # To standard error: standard output holds what a script would read.
            sys.stderr.write(
                f"no equivalent in this version: {short_text(key)}: {short_text(value)}\n"
            )
