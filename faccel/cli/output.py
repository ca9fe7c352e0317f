"""How a command shows what it found: JSON for machines, rich on a terminal, plain lines anywhere else."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import click

from faccel.config import Config, config_fields

json_option = click.option("--json", "as_json", is_flag=True, help="One line of JSON.")


def present(document: Any, rows: Iterable[Sequence[str]], *, as_json: bool) -> None:
    """Print `document` as JSON, or `rows` as a table on a terminal and as lines with two spaces between cells."""
    if as_json:
        print(json.dumps(document))
    elif not sys.stdout.isatty():
        print("\n".join("  ".join(filter(None, row)) for row in rows))
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        for row in rows:
            table.add_row(
                *(Text(cell, style=style) for cell, style in zip(row, _styles(row), strict=True))
            )
        Console().print(table)


def fields_document(config: Config) -> dict[str, Any]:
    """Return each field's value and source, as JSON can hold them."""
    values = {field.name: getattr(config, field.name) for field in config_fields()}
    return {
        name: {
            "value": attrs.asdict(value) if attrs.has(type(value)) else value,
            "source": config.sources[name],
        }
        for name, value in values.items()
    }


def explained(config: Config) -> list[tuple[str, ...]]:
    """Return each field's value and source as rows."""
    return [tuple(line.split("  ", 1)) for line in config.explain().splitlines()]


def _styles(row: Sequence[str]) -> list[str]:
    return ["bold", *["red" if cell.startswith("CORRUPT") else "" for cell in row[1:]]]
