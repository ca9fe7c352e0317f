"""The table of docs/coming-from-megatron.md: what it names exists."""

import inspect
import re

import pytest

import faccel
from faccel.cli.commands import main
from faccel.config import config_fields
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs" / "coming-from-megatron.md").read_text()
TABLE = PAGE.partition("## Flags")[2].partition("## Indexed datasets")[0]
ROWS = re.findall(r"^\| (`--.*?) \| (.*?) ?\| (.*?) ?\|$", TABLE, re.M)
NAME = r"faccel(?:\.\w+)+"


def resolve(name):
    value = faccel
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


def test_the_table_has_all_its_rows_and_each_flag_once():
    lines = [line for line in TABLE.splitlines() if line.startswith("| `--")]
    assert len(ROWS) == len(lines)
    flags = [flag for row in ROWS for flag in re.findall(r"`(--[\w-]+)[^`]*`", row[0])]
    assert len(set(flags)) >= 60
    # Two flags have values that are different rows.
    assert {flag for flag in flags if flags.count(flag) > 1} == {
        "--recompute-granularity", "--recompute-method",
    }  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_row_has_an_equal_or_a_reason(row):
    _, equal, difference = row
    assert equal or difference


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_names_and_arguments_of_faccel_exist(row):
    for code in re.findall(r"`([^`]*)`", " ".join(row[1:])):
        for name in re.findall(NAME, code):
            resolve(name)
        for name, arguments in re.findall(rf"({NAME})\(([^()]*)", code):
            function = resolve(name)
            parameters = inspect.signature(function).parameters
            takes_any = any(param.kind is param.VAR_KEYWORD for param in parameters.values())
            for argument in re.findall(r"(?:^|, )(\w+)=", arguments):
                if takes_any:  # fields of the configuration, or options in the docstring
                    known = {field.name for field in config_fields()}
                    assert argument in known or f"`{argument}" in function.__doc__, argument
                else:
                    assert argument in parameters, f"{name} has no argument {argument}"


def test_options_of_the_launcher_exist():
    context = main.make_context("faccel", ["--help"], resilient_parsing=True)
    launch = main.get_command(context, "launch")
    options = {option for param in launch.params for option in param.opts}
    for row in ROWS:
        for option in re.findall(r"`(--[\w-]+)[^`]*`", row[1]):
            assert option in options, option


def test_plans_and_records_of_the_table_can_be_built():
    records = re.findall(
        r"`(faccel\.(?:Plan|parallel\.(?:DdpConfig|FsdpConfig|PipelineConfig))\(.*?\))`", TABLE
    )
    assert len(records) >= 10
    for code in records:
        code = code.replace("chain=...", 'chain=("blocks.*",)')
        assert eval(code, {"faccel": faccel})
