"""The command `faccel migrate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from faccel.cli.flags import LocalPath
from faccel.cli.output import json_option, present
from faccel.config_edit import replace_file
from faccel.errors import ConfigError, short_text

# Folders with scripts of others.
_SKIPPED = {".git", ".venv", "venv", "node_modules", "__pycache__", "site-packages"}


@click.command()
@click.argument("source", metavar="FILE|DIR", type=LocalPath(exists=True))
@click.option("-o", "--out", type=LocalPath(), help="Write to this file or folder instead.")
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 if a file would change.")
@json_option
def migrate(source: str, *, out: str | None, check: bool, as_json: bool) -> None:
    """Rewrite scripts of Accelerate to faccel, in place.

    Comments and formatting stay. A call without an equal stays, too, with a comment
    `# faccel: not converted: ...` before it; other comments `# faccel: ...` explain what differs.

    The exit code is 1 if a script is no valid Python, and with --check if a file would change.
    """
    if check and out is not None:
        raise click.UsageError("--check writes nothing: leave out --out")
    _require_libcst()
    documents: list[dict[str, object]] = []
    rows: list[tuple[str, ...]] = []
    is_failed = False
    for path, target in _scripts(Path(source), out):
        document = _migrate_file(path, target, check=check)
        documents.append(document)
        is_failed = is_failed or "problem" in document or (check and bool(document["changed"]))
        rows.append(_row(document))
    present(documents, rows, as_json=as_json)
    # After everything is printed: a script reads it, and then the exit code.
    if is_failed:
        sys.exit(1)


def _require_libcst() -> None:
    try:
        import libcst  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError(
            "`faccel migrate` needs libcst, which is not installed",
            got=str(error),
            fix='run `pip install "faccel[migrate]"`, or `pip install libcst`',
        ) from None


def _scripts(source: Path, out: str | None) -> Iterator[tuple[Path, Path]]:
    """Yield each script and the path to write to."""
    target = source if out is None else Path(out).expanduser()
    if source.is_file():
        # `-o folder` keeps the name of the file.
        yield source, target / source.name if target.is_dir() else target
        return
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source)
        if not _SKIPPED.intersection(relative.parts) and path.is_file():
            yield path, target / relative


def _migrate_file(path: Path, target: Path, *, check: bool) -> dict[str, object]:
    """Rewrite one file; return what the command prints about it."""
    import libcst

    from faccel.migration.rewrite import migrate_script

    document: dict[str, object] = {"path": str(path), "out": str(target)}
    try:
        source = path.read_bytes()
        migration = migrate_script(source)
    except OSError as error:
        return {**document, "changed": False, "problem": f"it cannot be read: {error}"}
    except (libcst.ParserSyntaxError, SyntaxError, UnicodeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {**document, "changed": False, "problem": f"no valid Python: {lines[0]}"}
    except ConfigError as error:
        return {**document, "changed": False, "problem": str(error)}
    except Exception as error:  # a fault of the rewriting: the other files are rewritten
        what = f"it cannot be rewritten: {type(error).__name__}: {short_text(str(error))}"
        return {**document, "changed": False, "problem": what}
    changed = migration.code != source
    if not check and (changed or target != path):
        try:
            replace_file(str(target), migration.code)
        except OSError as error:
            return {**document, "changed": False, "problem": f"it cannot be written: {error}"}
    return {
        **document,
        "changed": changed,
        "converted": migration.converted,
        "unconverted": migration.unconverted,
        "notes": list(migration.notes),
    }


def _row(document: dict[str, object]) -> tuple[str, ...]:
    if "problem" in document:
        return str(document["path"]), str(document["problem"])
    counts = f"{document['converted']} converted, {document['unconverted']} not converted"
    notes = document["notes"]
    assert isinstance(notes, list)
    return str(document["path"]), counts, f"{len(notes)} notes"
