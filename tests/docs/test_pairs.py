"""The snippets of docs/accelerate: those of faccel run, those of Accelerate name what it has."""

import importlib.util
import pathlib
import re
import shlex

import click
import pytest

from faccel.cli.commands import main
from tests.docs import accelerate_names, pairs
from tests.docs.pages import ROOT
from tests.docs.test_features import ROWS

PAIRS = pairs.read_pairs()
by_row = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.row)
HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None


def commands(source):
    """Return `(program, arguments)` of each command of a shell block."""
    lines = source.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    for line in words:
        for program in ("accelerate", "faccel"):
            if program in line:
                yield program, line[line.index(program) + 1 :]


@by_row
def test_a_snippet_of_faccel_runs(pair, tmp_path, monkeypatch):
    if "not run" in pair.options:
        pytest.skip(pair.options["not run"])
    package = pair.options.get("needs")
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    for block in pair.of("faccel", "python"):
        pairs.run(pair, block)


@pytest.mark.skipif(not HAS_ACCELERATE, reason="accelerate is not installed")
@by_row
def test_a_snippet_of_accelerate_names_what_accelerate_has(pair):
    for block in pair.of("Accelerate", "python"):
        accelerate_names.check(block)
    for block in pair.of("Accelerate", "sh"):
        for program, arguments in commands(block):
            if program == "accelerate":
                accelerate_names.check_command(arguments)


@by_row
def test_a_command_of_faccel_is_accepted(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "accelerate.yaml", "faccel.yaml"):
        pathlib.Path(name).touch()
    for name in ("runs", "weights"):
        pathlib.Path(name).mkdir()
    for block in pair.of("faccel", "sh"):
        for program, arguments in commands(block):
            if program == "faccel":
                parse(main, "faccel", arguments)


def parse(command, name, arguments):
    """Parse a command line without running the command."""
    arguments = [word for word in arguments if word != ">"]
    context = command.make_context(name, list(arguments), resilient_parsing=False)
    if isinstance(command, click.Group) and context.args + context._protected_args:
        name, subcommand, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        parse(subcommand, name, rest)


@by_row
def test_a_pair_has_both_sides_and_they_are_short(pair):
    assert [x.library for x in pair.snippets] == ["Accelerate", "faccel"]
    for snippet in pair.snippets:
        assert 1 <= len(snippet.source.splitlines()) <= 14
        assert all(len(line) <= 80 for line in snippet.source.splitlines())


@by_row
def test_a_section_has_the_title_of_its_row_in_the_table(pair):
    assert ROWS[pair.row][0].replace("`", "") == pair.title.replace("`", "")


def test_each_row_that_faccel_has_is_a_pair_and_the_table_links_it():
    table = (ROOT / "docs" / "accelerate-features.md").read_text()
    linked = dict(re.findall(r"^\| \[([A-L]\d+)\]\((accelerate/[^)]+)\)", table, re.M))
    assert list(linked) == [row for row in ROWS if row in {pair.row for pair in PAIRS}]
    for pair in PAIRS:
        assert linked[pair.row].startswith(f"accelerate/{pair.page}.md#{pair.row.lower()}-")
    missing = {row for row, cells in ROWS.items() if cells[1] in ("better", "have")} - set(linked)
    assert not missing, missing


@pytest.mark.skipif(not HAS_ACCELERATE, reason="accelerate is not installed")
@pytest.mark.parametrize(
    "source",
    [
        "from accelerate import Accelerators",
        "accelerator.gather_for_metric(x)",
        "accelerator.gather(tensors=x)",
        "from accelerate import PartialState\nstate = PartialState()\nstate.is_first",
        "from accelerate.utils import set_seed\nset_seed(0, devices=True)",
    ],
)
def test_a_wrong_name_of_accelerate_is_found(source):
    with pytest.raises((ImportError, AttributeError, TypeError)):
        accelerate_names.check(source)
