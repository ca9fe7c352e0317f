"""`faccel compare`: what differs between two hand-written runs."""

import contextlib
import io
import json
import math
import re

import pytest

from faccel.cli.compare_command import compare as compare_command
from faccel.report.comparison import compare
from faccel.report.run_folder import find_run
from faccel.report.run_record import read_record
from tests.command_line import run_command
from tests.run_folders import BEGAN_S, minutes, write_journal, write_lines


def facts(seed, lr, **more):
    fields = {
        "seed": {"value": str(seed), "source": "default" if seed == 0 else "argument"},
        "debug": {"value": "False", "source": "default"},
        "run_dir": {"value": f"/runs/{seed}", "source": "argument"},
    }
    return {"fields": fields, "config": {"lr": lr, "model": {"width": 8}, **more}, "world_size": 2}


def metrics(*lines):
    return [{"time": BEGAN_S, **line} for line in lines]


@pytest.fixture
def runs(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    write_journal(first, 0, minutes())
    write_journal(second, 0, minutes(data_wait_s=80.0))
    write_lines(first / "faccel.json", [facts(0, 0.1)])
    write_lines(second / "faccel.json", [facts(1, 0.2, warmup=5)])
    losses = [{"step": step, "loss": 4.0 - step} for step in range(4)]
    write_lines(first / "metrics.jsonl", metrics(*losses, {"step": 3, "accuracy": 0.5}))
    other = [{"step": step, "loss": 5.0 - step} for step in (0, 2, 4)]
    write_lines(second / "metrics.jsonl", metrics(*other, {"step": 4, "bleu": math.nan}))
    for folder, speeds in ((first, (1.0, 2.0, 9.0)), (second, (3.0, 3.0))):
        rows = [{"time": BEGAN_S, "step": 1, "steps_s": s, "peak_bytes": 2**20} for s in speeds]
        write_lines(folder / "goodput" / "rates.jsonl", rows)
    return first, second


def comparison(runs):
    return compare(*(read_record(find_run(str(run), "faccel compare")) for run in runs))


def test_settings_that_differ_have_their_sources(runs):
    result = comparison(runs)
    settings = {setting.name: (setting.values, setting.sources) for setting in result.settings}
    assert settings == {
        "config.lr": (("0.1", "0.2"), ("", "")),
        "config.warmup": (("-", "5"), ("", "")),
        "seed": (("0", "1"), ("default", "argument")),
    }
    assert result.num_equal == 3  # the width, debug and the number of ranks


def test_speeds_are_medians_and_times_are_parts(runs):
    result = comparison(runs)
    speeds = {measure.name: (measure.values, measure.ratio) for measure in result.speeds}
    assert speeds["steps_s"] == ((2.0, 3.0), 1.5)
    assert speeds["peak_bytes"] == ((2**20, 2**20), 1.0)
    assert speeds["duration_s"] == ((400.0, 400.0), 1.0)
    times = {measure.name: measure.values for measure in result.times}
    assert times["data wait"] == (0.1, 0.2)
    assert times["training"] == (0.8, 0.7)


def test_without_rates_the_meter_gives_the_speed(runs):
    for run in runs:
        (run / "goodput" / "rates.jsonl").unlink()
    speeds = {measure.name: measure.values for measure in comparison(runs).speeds}
    # 100 steps in the 320 + 40 s of steps and of waits for data
    assert speeds["steps_s"] == pytest.approx((100 / 360, 100 / 360))


def test_curves_are_compared_at_the_last_common_step(runs):
    result = comparison(runs)
    (curve,) = result.curves
    assert (curve.name, curve.last, curve.lowest) == ("loss", (1.0, 1.0), (1.0, 1.0))
    assert curve.highest == (4.0, 5.0)
    assert (curve.common_step, curve.at_common_step) == (2, (2.0, 3.0))
    assert result.only == (("accuracy",), ("bleu",))


def test_the_sentence_has_speed_loss_and_settings(runs):
    assert comparison(runs).sentence == (
        "the second run has 1.5 times the speed of the first (2 and 3 steps/s); "
        "`loss` at step 2 is 2 and 3; 3 settings differ: config.lr, config.warmup, seed"
    )
    result = comparison((runs[0], runs[0]))
    assert result.sentence.startswith("both runs are equally fast")
    assert result.sentence.endswith("no setting differs")


def test_runs_without_anything_in_common_are_compared(tmp_path):
    write_lines(tmp_path / "a" / "metrics.jsonl", metrics({"step": 1, "x": math.nan}))
    write_lines(tmp_path / "b" / "metrics.jsonl", metrics({"step": 2, "x": 1.0}))
    result = comparison((tmp_path / "a", tmp_path / "b"))
    (curve,) = result.curves
    assert (curve.common_step, curve.lowest) == (None, (None, 1.0))


def test_the_command_prints_tables_and_json(runs):
    first, second = map(str, runs)
    code, out, err = run_command("compare", first, second)
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith("the second run has 1.5 times")
    assert "seed 0 1 default argument" in lines
    assert "3 settings equal" in lines
    assert "steps_s 2 3 1.5" in lines
    assert "data wait 10 % 20 %" in lines
    assert "loss, at step 2 2 3" in lines
    assert [line for line in lines if line.startswith("only")][1].endswith("b has bleu")
    for run in runs:
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 9, "unknown": NaN}\n')
    code, out, _ = run_command("compare", first, second, "--json")
    document = json.loads(out, parse_constant=pytest.fail)
    assert document["speeds"][0]["ratio"] == 1.5
    assert document["curves"][0]["at_common_step"] == [2.0, 3.0]
    code, _, err = run_command("compare", first, f"{second}x")
    assert code == 1 and "faccel compare DIR" in err


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_names_and_values_with_control_sequences_are_one_printable_line(kind, runs):
    odd = "a\nb\x1b[2J"
    write_lines(runs[0] / "faccel.json", [facts(0, 0.1, **{odd: odd})])
    for run in runs:
        write_lines(run / "metrics.jsonl", metrics({"step": 1, f"loss {odd}": 1.0, str(run): 1}))
    with contextlib.redirect_stdout(kind()) as out:
        compare_command.callback(*map(str, runs), as_json=False)
    text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())  # colours of headings
    assert "\x1b" not in text
    assert not [line for line in text.splitlines() if line.lstrip().startswith("b\\x1b")]
    assert "a\\nb\\x1b[2J" in text
