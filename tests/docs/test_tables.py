"""The tables of the pages that are generated from the code or from a result file."""

import json

from benchmarks import char_lm
from faccel import device_table
from faccel.backends.table import BACKENDS, table
from faccel.config import field_table
from tests.docs.pages import generated_table, pages


def test_the_table_of_backends_is_generated_from_the_records():
    assert generated_table("backends") == table()
    for row in BACKENDS.values():
        assert row.tested_on and row.written_for


def test_the_table_of_devices_is_generated_from_the_records():
    assert generated_table("devices") == device_table.table()


def test_the_table_of_configuration_fields_is_generated_from_the_record():
    assert generated_table("fields") == field_table()


def test_the_table_of_losses_is_generated_from_the_result_file():
    result = json.loads(char_lm.RESULT.read_text())
    assert result["largest_difference"] <= 1e-4
    assert set(result["losses"]) == set(char_lm.ROWS)
    assert any(char_lm.table(result) in path.read_text() for path in pages())
