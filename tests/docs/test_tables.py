"""The tables of the pages that are generated from the code or from a result file."""

import json

from benchmarks import char_lm
from docs.pictures import RESULTS, median
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


def test_the_other_figures_of_the_benchmarks_are_those_of_the_result_files():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    tensors = ("step", "TensorDataset")
    window = median("forward_backward", "one process", "forward_backward", "ratio to by hand")
    write, load = "ratio to raw write and fsync", "ratio to torch's dcp.load"
    saves = [
        median("checkpoint", "durable save", name, write)
        for name in ("faccel.save", "accelerate save_state")
    ]
    loads = [
        median("checkpoint", "load", name, load)
        for name in ("faccel.load", "accelerate load_state")
    ]
    digits = [
        median("functional", "digits", name, "ratio to torch")
        for name in ("compiled", "donated", "pure")
    ]
    name = "ratio to 8 loops of torch"
    ensemble = median("functional", "ensemble", "compiled ensemble", name)
    added = [
        median("import_time", "added to torch", f"torch, {name}", "inside, ms")
        for name in ("faccel's loop", "accelerate")
    ]
    helps = [
        result("help")[f"{name} launch --help"]["ms"]["median"] for name in ("faccel", "accelerate")
    ]
    first = median("order", "first batch", "faccel 1e9, resumed at 99 %", "ms")
    kill = result("kill")
    lost = [f"{kill['lost'][name]} of {kill[name]['kills']}" for name in ("faccel", "accelerate")]
    ratios = [
        median(*tensors, name, "ratio to torch") for name in ("faccel", "accelerate", "fabric")
    ]
    recorded = [
        100 * median("meter", "1 ms", name, "part of the step")
        for name in ("meter, jsonl, logger", "Fabric: Throughput, CSVLogger")
    ]
    for cells in (
        f"{recorded[0]:.2f} % | | {recorded[1]:.2f} % (no logger)",
        " | ".join(f"{ratio:.2f}" for ratio in ratios),
        f"{window:.2f} | |",
        f"{saves[0]:.2f} | {saves[1]:.2f} (no fsync)",
        f"{loads[0]:.2f} | {loads[1]:.2f} (not verified)",
        " | ".join(lost),
        f"{first:.1f} ms, 3 MB",
        "; ".join(f"{ratio:.2f}" for ratio in digits),
        f"{ensemble:.2f} | |",
        f"{added[0]:.0f} ms | {added[1]:.0f} ms",
        f"{helps[0]:.0f} ms | {helps[1] / 1e3:.3g} s",
    ):
        assert f" | {cells} |" in text, cells


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]
