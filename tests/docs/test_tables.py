"""The tables of the pages that are generated from the code or from a result file."""

import json

from benchmarks import char_lm
from docs.pictures import median
from faccel import device_table
from faccel.backends.table import BACKENDS, table
from faccel.config import field_table
from tests.docs.pages import README, ROOT, generated_table, pages


def test_the_table_of_backends_is_generated_from_the_records():
    assert generated_table("backends") == table()
    for row in BACKENDS.values():
        assert row.tested_on and row.written_for


def test_the_table_of_devices_is_generated_from_the_records():
    assert generated_table("devices") == device_table.table()


def test_the_table_of_configuration_fields_is_generated_from_the_record():
    assert generated_table("fields") == field_table()


def test_the_ratios_and_times_of_the_benchmarks_are_those_of_the_result_files():
    pages_with_figures = [README.read_text(), (ROOT / "docs" / "benchmarks.md").read_text()]
    contenders = ["faccel", "accelerate", "fabric"]
    row = ("step", "read item by item")
    ratios = [f"{median(*row, name, 'ratio to torch'):.2f}" for name in contenders]
    times = [f"{median('gather', 'time per call', n, 'us') / 1e3:.3g} ms" for n in contenders]
    for text, count in zip(pages_with_figures, (2, 3), strict=True):
        assert f"| {' | '.join(ratios[:count])} |" in text
        assert f"| {' | '.join(times[:count])} |" in text


def test_the_table_of_losses_is_generated_from_the_result_file():
    result = json.loads(char_lm.RESULT.read_text())
    assert result["largest_difference"] <= 1e-4
    assert set(result["losses"]) == set(char_lm.ROWS)
    assert any(char_lm.table(result) in path.read_text() for path in pages())
