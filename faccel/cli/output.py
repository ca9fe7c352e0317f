"""How commands print results: JSON, a table on a terminal, or plain lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence

import attrs
import click

from faccel.config import Config, config_fields
from faccel.errors import printable

json_option = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")


def present(document: object, rows: Iterable[Sequence[str]], *, as_json: bool) -> None:
    """Print `document` as JSON, or `rows` as a table.

    On a terminal the table has columns and colours. Otherwise a row is a line, with two spaces
    between its cells.

    Effects: ambient. Writes to standard output.
    """
    if as_json:
        # dates and other values of YAML have no JSON
        print(json.dumps(document, default=str))
        return
    # For pipes and files: no colours and no line breaks within a row.
    if not sys.stdout.isatty():
        for row in rows:
            print(printable("  ".join(filter(None, row))))
        return
    # Imported late: rich is slow to import, and JSON and pipes do not need it.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        # `Text`, not `str`: rich would read square brackets in a path as markup
        table.add_row(*(Text(printable(cell), style=_style(i, cell)) for i, cell in enumerate(row)))
    Console().print(table)


def _style(column: int, cell: str) -> str:
    if column == 0:
        return "bold"
    if cell.startswith("CORRUPT"):
        return "red"
    return ""


def fields_document(config: Config) -> dict[str, dict[str, object]]:
    """Return the value and the source of each field, as JSON values.

    Effects: pure.
    """
    document: dict[str, dict[str, object]] = {}
    for field in config_fields():
        value = getattr(config, field.name)
        # The mesh, the plan and its compilation are records; other fields are JSON values.
        if field.name in ("plan", "compile") and value is not None:
            from faccel.plan_values import plan_values

            value = plan_values(value)
        elif attrs.has(type(value)):
            value = attrs.asdict(value)
        document[field.name] = {"value": value, "source": config.sources[field.name]}
    return document


def explain_rows(config: Config) -> list[tuple[str, ...]]:
    """Return the value and the source of each field, as rows of a table.

    Effects: pure.
    """
    return [tuple(line.split("  ", 1)) for line in config.explain().splitlines()]
