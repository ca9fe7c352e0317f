"""The table of Accelerate's features: complete, and with names that exist."""

import operator
import re

import attrs
import pytest
from click import Option

import faccel
from faccel.cli.launch_command import launch
from tests.docs.pages import ROOT

NUM_ROWS = {"A": 18, "B": 28, "C": 26, "D": 13, "E": 8, "F": 15, "G": 15, "H": 12, "I": 8, "J": 12}
NUM_ROWS |= {"K": 10, "L": 10}  # commands; records of options
STATES = {"better", "have", "not needed", "not yet"}
PAGE = ROOT / "docs" / "accelerate-features.md"
ROW = r"^\| \[?([A-L]\d+)(?:\]\(\S+\))? \| (.*) \|$"  # most numbers are links to snippets
ROWS = {
    match[1]: tuple(cell.strip() for cell in match[2].split(" | "))
    for match in re.finditer(ROW, PAGE.read_text(), re.M)
}
REASONS = {number: cells[2] for number, cells in ROWS.items()}


def test_each_feature_has_a_row():
    expected = [f"{letter}{i}" for letter, count in NUM_ROWS.items() for i in range(1, count + 1)]
    assert list(ROWS) == expected
    assert len(ROWS) == 175


def test_no_row_is_blank():
    for number, cells in ROWS.items():
        feature, state, reason = cells
        assert feature and reason, number
        assert state in STATES, number


def test_a_row_that_refers_to_another_one_has_its_state():
    for number, reason in REASONS.items():
        target = reason.removeprefix("as ")
        if target in ROWS:
            assert ROWS[number][1] == ROWS[target][1], number
        for other in re.findall(r"\b[A-L]\d+\b", reason):
            assert other in ROWS, number


NAMES = sorted(
    {name for text in REASONS.values() for name in re.findall(r"faccel(?:\.\w+)+", text)}
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_a_reason_exists(name):
    operator.attrgetter(name.removeprefix("faccel."))(faccel)


def test_the_options_of_the_reasons_exist():
    known = {name for param in launch.params if isinstance(param, Option) for name in param.opts}
    other_commands = {"--explain"}
    for number, reason in REASONS.items():
        for option in re.findall(r"`(--[a-z-]+)", reason):
            assert option in known | other_commands, number


def test_the_fields_of_the_reasons_exist():
    records = {"Config": faccel.Config, "Plan": faccel.Plan}
    for number, reason in REASONS.items():
        for record, field in re.findall(r"`(Config|Plan)[.(](\w+)", reason):
            assert field in attrs.fields_dict(records[record]), number
