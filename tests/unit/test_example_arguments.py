"""Numbers on the command line of the examples: one that makes no sense is an error of argparse."""

import argparse
import ast
import pathlib

import pytest

from tests.gpt_example import gpt  # isort: skip (it makes the modules of the examples importable)
from arguments import count, positive

EXAMPLES = sorted((pathlib.Path(__file__).parents[2] / "examples").glob("*.py"))
# `func.dp_sgd` raises below 0, which is no whole number.
CHECKED_BY_FACCEL = {("dp_sgd.py", "--noise")}


def types_of_options(path):
    """Return the type of each option of a script that has one."""
    types = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            for keyword in node.keywords:
                if keyword.arg == "type":
                    types[node.args[0].value] = ast.unparse(keyword.value)
    return types


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_each_number_has_a_type_that_checks_its_range(path):
    for option, name in types_of_options(path).items():
        if (path.name, option) not in CHECKED_BY_FACCEL:
            assert name in ("count", "positive"), option


def test_the_options_are_found():
    options = {path.name: types_of_options(path) for path in EXAMPLES}
    assert options["gpt.py"] == {"--steps": "count", "--layers": "count"}
    assert options["mrpc.py"]["--lr"] == "positive"


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize("option", ["--steps", "--layers"])
def test_a_gpt_of_no_layers_or_steps_is_an_error_that_names_the_option(capsys, option, value):
    with pytest.raises(SystemExit) as caught:
        gpt.parse([option, value])
    assert caught.value.code == 2
    assert f"error: argument {option}: must be at least 1, got {value}\n" in capsys.readouterr().err


def test_numbers_in_their_range_are_taken():
    assert (count("1"), count("12")) == (1, 12)
    assert (positive("2e-5"), positive("1")) == (2e-5, 1.0)


@pytest.mark.parametrize("text", ["0", "-0.5", "inf", "nan"])
def test_a_rate_is_finite_and_above_0(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"got {text}"):
        positive(text)


@pytest.mark.parametrize("parse", [count, positive])
def test_a_word_is_no_number(parse):
    # argparse makes "invalid ... value: 'many'" of it.
    with pytest.raises(ValueError, match="many"):
        parse("many")
