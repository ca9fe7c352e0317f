"""Reports of hand-written run folders: what is read, the verdict, the charts and the page."""

import json
import math
import os
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

import faccel
from faccel.errors import ConfigError
from faccel.report.charts import Points, chart, sampled, smoothed
from faccel.report.findings import finding, shares
from faccel.report.page import page
from faccel.report.run_folder import find_run
from faccel.report.run_record import read_record
from faccel.run_facts import without_secrets
from faccel.testing import fake_context
from faccel.tracking import init_meter, init_trackers, log, rates, tick
from tests import run_folders
from tests.command_line import run_command
from tests.run_folders import BEGAN_S, ended, event, minutes, start, write_journal, write_lines


def record_of(path, now_s=BEGAN_S + 1e6):
    return read_record(find_run(str(path), "faccel report"), now_s=now_s)


def losses(values):
    return [{"step": step, "time": BEGAN_S, "loss": value} for step, value in enumerate(values)]


def test_a_run_is_the_run_folder_or_the_only_run_in_it(tmp_path):
    write_lines(tmp_path / "a" / "metrics.jsonl", losses([1.0]))
    (tmp_path / ".faccel").mkdir()
    for path in (tmp_path, tmp_path / "a"):
        folders = find_run(str(path), "faccel report")
        assert (folders.run_dir, folders.folder) == (tmp_path, tmp_path / "a")
        assert folders.path == path
    assert find_run(str(tmp_path), "faccel report").name == f"{tmp_path.name}/a"


def test_a_name_of_a_run_may_have_slashes(tmp_path):
    write_lines(tmp_path / "group" / "a" / "metrics.csv", ["step,name,value\n"])
    assert find_run(str(tmp_path), "faccel report").folder == tmp_path / "group" / "a"


def test_a_run_folder_without_a_tracker_or_a_meter_is_a_run(tmp_path):
    run_folders.write_rank(tmp_path, end=ended())
    record = record_of(tmp_path)
    assert (record.state, record.duration_s, record.world_size) == ("ended", 400.0, 1)
    assert finding(record).sentence == "6 min 40 s; nothing has measured how the time was spent"
    assert "init_meter" in finding(record).next_step


def test_no_run_and_several_runs_are_errors_that_name_what_to_write(tmp_path):
    with pytest.raises(ConfigError, match="has no run"):
        find_run(str(tmp_path), "faccel report")
    with pytest.raises(ConfigError, match="which is no folder"):
        find_run(str(tmp_path / "missing"), "faccel report")
    for name in ("b", "a"):
        write_lines(tmp_path / name / "metrics.csv", ["step,name,value\n"])
    with pytest.raises(ConfigError, match="several runs") as caught:
        find_run(str(tmp_path), "faccel watch")
    assert caught.value.got == "a, b"
    assert f"faccel watch {tmp_path / 'a'}" in caught.value.fix


BROKEN_LINES = [
    '{"step": 0, "loss": 3.0, "time": 1.0}\n',
    '{"step": 1, "loss": NaN, "text": "warm-up", "ok": true}\n',
    "[1, 2]\n",
    "of another program\n",
    '{"step": 1, "loss": 2.0}\n',  # again, after a resume
    '{"step": "two", "loss": 9.0}\n',
    '{"step": 3, "loss": Infinity, "nested": {"x": 1}}\n',
    '{"step": 4, "lo',  # cut by a kill
]


def test_metrics_are_read_from_json_lines_with_lines_of_any_content(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", BROKEN_LINES)
    metrics = record_of(tmp_path).metrics
    assert list(metrics.series) == ["loss"]
    assert metrics.series["loss"].steps.tolist() == [0, 1, 3]
    assert metrics.series["loss"].values.tolist() == [3.0, 2.0, math.inf]
    assert metrics.texts == {"text": "warm-up"}


def test_metrics_are_read_from_csv(tmp_path):
    lines = ["step,name,value\r\n", "0,loss,3.0\r\n", '1,"a,b",2\r\n', "1,note,by hand\r\n"]
    lines += ['2,"cut', "\n", "3,loss,nan\r\n", "0,loss,4.0\r\n", "4,lo5,loss,1.0\r\n", "6,l"]
    write_lines(tmp_path / "metrics.csv", lines)
    metrics = record_of(tmp_path).metrics
    assert metrics.series["a,b"].values.tolist() == [2.0]
    assert metrics.series["loss"].steps.tolist() == [0, 3]
    assert metrics.series["loss"].values[0] == 4.0
    assert math.isnan(metrics.series["loss"].values[1])
    assert metrics.texts["note"] == "by hand"


def test_metrics_are_read_from_event_files_and_survive_a_cut(tmp_path):
    pytest.importorskip("tensorboard")
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
    trackers = init_trackers("a", ctx, trackers=("tensorboard",))
    for step in range(3):
        log({"loss": 0.5 * step}, trackers, step=step)
    faccel.tracking.finish(trackers)
    (path,) = (tmp_path / "a").glob("events*")
    assert record_of(tmp_path).metrics.series["loss"].values.tolist() == [0.0, 0.5, 1.0]
    path.write_bytes(path.read_bytes()[:-5])
    assert record_of(tmp_path).metrics.series["loss"].values.tolist() == [0.0, 0.5]


def test_trackers_and_meters_store_the_configuration_with_its_sources(tmp_path):
    ctx = faccel.init(env={"FACCEL_SEED": "7"}, run_dir=str(tmp_path), device="cpu")
    with ctx:
        config = {"lr": 0.1, "hf_token": "abc"}
        faccel.tracking.finish(init_trackers("a", ctx, trackers=("csv",), config=config))
        meter = init_meter(ctx, run="a", warmup=0)  # keeps the hyperparameters
        for samples in (4, 4):
            meter = tick(meter, samples=samples)
        result = rates(meter, ctx)
    record = record_of(tmp_path)
    assert record.fields["seed"] == ("7", "environment FACCEL_SEED, over default 0")
    assert record.fields["device"][1].startswith("argument")
    assert record.fields["debug"] == ("False", "default")
    assert record.config == {"lr": "0.1", "hf_token": "(hidden)"}
    assert (record.facts["world_size"], record.facts["device"]) == (1, "cpu")
    (row,) = record.rates
    assert row.pop("step") == 2
    assert row.pop("time") > BEGAN_S
    assert row == result.known()
    assert record.state == "ended"
    assert "abc" not in page(record)


def test_a_script_without_a_tracker_has_its_configuration_too(tmp_path):
    with faccel.init(env={}, run_dir=str(tmp_path), grad_accum=3, device="cpu"):
        record = record_of(tmp_path)
        assert record.state == "running"
    assert record.fields["grad_accum"][0] == "3"
    assert "torch" in record.facts["versions"]


SECRETS = {
    "tracker": {"api_key": "abc1", "wandb-token": "abc2", "user": "me"},
    "keys": {"secret_key": ["abc3"], "credentials": {"user": "abc4"}},
    "database": "postgresql://me:abc5@host/runs",
    "num_tokens": 12,
    "tokens": "words",
}


def test_secrets_of_nested_hyperparameters_are_hidden(tmp_path):
    write_lines(tmp_path / "a" / "faccel.json", [{"config": SECRETS}])
    record = record_of(tmp_path)
    assert "abc" not in page(record) + str(record.config)
    assert record.config["tracker.user"] == "me"
    assert record.config["database"] == "postgresql://me:(hidden)@host/runs"
    assert (record.config["num_tokens"], record.config["tokens"]) == ("12", "words")


def test_thousands_of_metrics_have_a_small_page_in_seconds(tmp_path):
    names = [f"m{number}" for number in range(3000)] + ["val/loss"]
    lines = [{"step": step, **dict.fromkeys(names, step)} for step in range(2)]
    write_lines(tmp_path / "a" / "metrics.jsonl", lines)
    record = record_of(tmp_path)
    begin_s = time.process_time()
    text = page(record)
    # Drawing each of them would take minutes.
    assert time.process_time() - begin_s < 30
    assert len(text) < 400_000
    assert "2,941" in text or "2941" in text
    assert text.index("val/loss") < text.index("m0")


def test_secrets_of_a_command_are_not_stored():
    words = [
        "train.py",
        "--api-key",
        "abc",
        "--num-tokens",
        "5",
        "--hf_token=x",
        "--secret",
        "--lr",
    ]
    hidden = ["train.py", "--api-key", "(hidden)", "--num-tokens", "5"]
    assert without_secrets(words) == [*hidden, "--hf_token=(hidden)", "--secret", "--lr"]


def test_the_time_of_all_ranks_is_the_verdict(tmp_path):
    write_journal(tmp_path, 0, minutes(data_wait_s=20.0))
    write_journal(tmp_path, 1, minutes(data_wait_s=100.0))
    record = record_of(tmp_path)
    # 340 s and 260 s of 400 s
    assert shares(record.times)["useful_s"] == pytest.approx(600 / 800)
    result = finding(record)
    assert result.sentence == (
        "6 min 40 s, 75 % of it training; the largest loss of time is data wait, 15 %"
    )
    assert result.kind == "warning"
    assert "num_workers" in result.next_step
    assert "rank 1 waited 1 min 40 s for data, the others 20.0 s" in result.evidence
    assert "rank 0 trained 100 steps: 5 min 40 s of 6 min 40 s" in result.evidence


def test_checkpoints_and_restarts(tmp_path):
    first = [
        start(),
        event("saved", 50.0, step=4, num_steps=4, checkpoint_s=3.0, useful_s=40.0),
        event("saved", 70.0, step=6, num_steps=6, checkpoint_s=5.0, useful_s=55.0),
        event("step", 90.0, num_steps=8, checkpoint_s=5.0, useful_s=75.0, startup_s=10.0),
    ]
    second = [
        start(100.0),
        event("loaded", 110.0, step=6, checkpoint_s=8.0),
        event("end", 200.0, num_steps=9, checkpoint_s=8.0, useful_s=80.0, startup_s=12.0),
    ]
    write_journal(tmp_path, 0, first + second)
    record = record_of(tmp_path)
    rows = [(c.event, c.step, c.time_s - BEGAN_S, c.wait_s) for c in record.checkpoints]
    assert rows == [
        ("saved", 4, 50.0, 3.0),
        ("saved", 6, 70.0, 2.0),
        ("loaded", 6, 110.0, 8.0),
    ]
    assert [restart_s - BEGAN_S for restart_s in record.restarts_s] == [100.0]
    # 20 s of two lost steps, and 10 s between the processes
    line = "1 restart, after which 2 steps were repeated; 30.0 s lost"
    assert line in finding(record).evidence
    assert "2 steps repeated; 20.0 s of steps and 10.0 s between processes were lost." in page(
        record
    )


def test_how_a_run_has_ended_is_the_verdict(tmp_path):
    write_journal(tmp_path / "a", 0, minutes())
    os.utime(tmp_path / "a" / "goodput" / "rank-00000.jsonl")
    run_folders.write_rank(tmp_path, end=ended("ValueError: no rows"))
    result = finding(record_of(tmp_path))
    assert result.sentence == (
        "failed after 6 min 40 s and 100 steps: rank 0 failed: ValueError: no rows"
    )
    assert result.kind == "bad"
    # A process that is gone, and has written no end, was killed.
    run_folders.write_rank(tmp_path, start_ticks=1)
    assert "rank 0 died without an error" in finding(record_of(tmp_path)).sentence
    run_folders.write_rank(tmp_path)
    record = record_of(tmp_path, now_s=BEGAN_S + 500.0)
    assert (record.state, record.duration_s) == ("running", 500.0)
    assert finding(record).sentence.startswith("running: 8 min 20 s, 80 % of it training")


def test_ranks_of_a_later_run_in_the_same_folder_are_not_this_runs(tmp_path):
    write_journal(tmp_path / "a", 0, minutes())
    os.utime(tmp_path / "a" / "goodput" / "rank-00000.jsonl", (BEGAN_S + 400, BEGAN_S + 400))
    run_folders.write_rank(tmp_path, start_s=BEGAN_S + 1000)
    record = record_of(tmp_path)
    assert (record.state, record.ranks) == ("ended", [])


def test_a_run_that_is_not_observed_runs_while_it_writes(tmp_path):
    write_journal(tmp_path, 0, minutes(name="step"))
    assert record_of(tmp_path, now_s=BEGAN_S + 410).state == "running"
    record = record_of(tmp_path, now_s=BEGAN_S + 1200)
    assert record.state == "stopped"
    assert finding(record).sentence.startswith("stopped without an end: 6 min 40 s, 80 %")


def test_a_loss_that_is_nan_or_has_risen_is_the_verdict(tmp_path):
    write_journal(tmp_path, 0, minutes())
    path = tmp_path / "metrics.jsonl"
    write_lines(path, losses([1.0, math.nan, 0.5, math.nan, math.inf, math.nan]))
    result = finding(record_of(tmp_path))
    assert result.sentence == "diverged: `loss` is NaN since step 3"
    assert "clip_norm" in result.next_step
    # Tenths of 2 values: the lowest mean is 1.0, and the last one 3.0 is above the first one 2.0.
    write_lines(path, losses([2.0] * 2 + [1.0] * 14 + [3.0] * 4))
    assert finding(record_of(tmp_path)).sentence == (
        "`loss` has risen from 1 to 3, above its start"
    )
    write_lines(path, losses([3.0] * 2 + [1.0] * 18))
    assert "6 min 40 s" in finding(record_of(tmp_path)).sentence


def test_rates_that_fall_and_a_slow_rank_are_evidence(tmp_path):
    write_journal(tmp_path, 0, minutes())
    rows = []
    for number in range(6):
        speed = 10.0 if number < 3 else 5.0
        rows.append({"time": BEGAN_S + number, "step": number, "steps_s": speed, "slowest_rank": 1})
    write_lines(tmp_path / "goodput" / "rates.jsonl", [*rows, '{"time": 1'])
    evidence = finding(record_of(tmp_path)).evidence
    assert "the run has slowed down from 10 to 5 steps/s" in evidence
    assert "rank 1 was the slowest in 6 of 6 measurements" in evidence


def test_warnings_of_all_ranks_are_counted_by_text(tmp_path):
    write_journal(tmp_path / "a", 0, minutes())
    warning = {"time": BEGAN_S + 5, "step": 3, "level": "WARNING", "message": "slow disk"}
    error = {**warning, "time": BEGAN_S + 1, "level": "ERROR", "message": "lost", "step": None}
    info = {**warning, "level": "INFO"}
    write_lines(tmp_path / "logs" / "rank0.jsonl", [warning, info, {**warning, "step": 9}, "cut"])
    write_lines(tmp_path / "logs" / "rank1.jsonl", [error, warning])
    first, second = record_of(tmp_path).warnings
    assert (first.message, first.count, first.ranks, first.step) == ("lost", 1, {1}, None)
    assert (second.message, second.count, second.ranks) == ("slow disk", 3, {0, 1})
    assert "4 warnings in the logs" in finding(record_of(tmp_path)).evidence


def points(y, x=None):
    y = np.array(y, dtype=np.float64)
    return Points("a", np.arange(len(y), dtype=np.float64) if x is None else np.array(x), y)


def num_subpaths(svg, variable):
    """Return how many separate lines of a colour a drawing has, and how many single points."""
    lines = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none; stroke: var\({variable}\)', svg)
    dots = re.findall(rf'<use [^>]*style="fill: var\({variable}\)', svg)
    return [line.count("M") for line in lines if line], len(dots)


def test_a_chart_has_gaps_where_values_are_not_finite():
    y = [0.0, 1.0, math.nan, 1.0, math.inf, 0.0, 1.0]
    result = chart("a", [points(y)], x_label="x")
    # The part between two gaps has one point, which is drawn as a dot.
    assert num_subpaths(result.svg, "--c0") == ([3], 1)
    (line,) = result.lines
    assert line.num_missing == 2
    assert (line.last, line.lowest, line.highest) == ("1", "0", "1")


def test_a_smoothed_line_has_the_gaps_of_its_values():
    y = np.ones(100)
    y[40:50] = math.nan
    assert np.array_equal(smoothed(y, is_log=False), y, equal_nan=True)
    result = chart("a", [points(y)], x_label="x")
    assert num_subpaths(result.svg, "--c0") == ([2, 2], 0)


def test_a_line_on_a_logarithmic_axis_is_smoothed_by_its_logarithms():
    y = np.where(np.arange(200) % 2, 100.0, 1.0)
    # Means over 11 values, of which 5 or 6 are 100.
    assert 10 ** (2 * 5 / 11) <= smoothed(y, is_log=True)[100] <= 10 ** (2 * 6 / 11)
    assert 46 <= smoothed(y, is_log=False)[100] <= 55


def test_a_chart_of_a_million_points_keeps_a_single_peak():
    y = np.sin(np.arange(1_000_000) / 1000.0)
    y[654_321] = 50.0
    x, values = sampled(np.arange(1_000_000.0), y)
    assert len(x) <= 600 and (np.diff(x) > 0).all()
    assert values.max() == 50.0 and x[values.argmax()] == 654_321
    assert len(chart("a", [points(y)], x_label="x").svg) < 40_000


@pytest.mark.parametrize(
    "y", [[], [math.nan], [1.0], [5.0, 5.0], [0.0, 0.0], [1e-320, 1e300], [-1e308, 1e308]]
)
@pytest.mark.parametrize("options", [{}, {"starts_at_zero": True, "unit": "bytes"}])
def test_a_chart_of_odd_values_has_finite_positions(y, options):
    svg = chart("a", [points(y)], x_label="x", **options).svg
    assert not re.search(r"\b(nan|inf)\b", svg)


def test_the_axis_of_values_over_orders_of_magnitude_is_logarithmic():
    result = chart("a", [points([1.0, 1000.0])], x_label="x")
    assert result.is_log
    assert re.findall(r">(1|10|100|1000)</text>", result.svg)[-4:] == ["1", "10", "100", "1000"]
    assert not chart("a", [points([0.0, 1000.0])], x_label="x").is_log


def test_ticks_of_bytes_are_powers_of_two():
    y = [2.5 * 2**30, 9.5 * 2**30]
    svg = chart("a", [points(y)], x_label="x", unit="bytes", starts_at_zero=True).svg
    assert re.findall(r">(\d+ G?i?B)</text>", svg) == [
        "0 B", "2 GiB", "4 GiB", "6 GiB", "8 GiB", "10 GiB"
    ]  # fmt: skip


def test_the_colours_and_fonts_of_a_chart_are_those_of_the_page():
    marks = [0.5]
    svg = chart("a", [points([1.0, 2.0]), points([2.0, 3.0])], x_label="x", marks=marks).svg
    colours = set(re.findall(r"(?:fill|stroke): ([^;\"]+)", svg)) - {"none"}
    assert colours == {f"var(--{name})" for name in ("c0", "c1", "soft", "grid", "line", "bad")}
    assert "font-family" not in svg and " id=" not in svg.replace('clipPath id="', "")


class _Tags(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


EVIL = '<script>alert("1")</script>'


def test_names_and_values_of_the_user_are_text(tmp_path):
    path = tmp_path / "a"
    lines = [{"step": step, EVIL: 1.0, f"x/{EVIL}": 2.0, "t": EVIL} for step in range(3)]
    write_lines(path / "metrics.jsonl", [*lines, {"step": 4, f"y{EVIL}": 1.0}])
    facts = {"config": {EVIL: EVIL}, "fields": {EVIL: {"value": EVIL, "source": EVIL}}}
    write_lines(path / "faccel.json", [{**facts, "command": [EVIL]}])
    warning = {"time": 1.0, "level": "ERROR", "message": EVIL}
    write_lines(tmp_path / "logs" / "rank0.jsonl", [warning])
    run_folders.write_rank(tmp_path, end=ended(f"ValueError: {EVIL}"))
    tags = _Tags(page(record_of(tmp_path)))
    assert "script" not in tags.tags
    assert sum(EVIL in text for text in tags.texts) >= 8
    assert not any(name.startswith("on") for name, _ in tags.attributes)


def test_a_page_has_no_address_of_a_resource(tmp_path):
    write_journal(tmp_path, 0, minutes())
    write_lines(tmp_path / "metrics.jsonl", losses([3.0, 2.0]))
    text = page(record_of(tmp_path))
    assert (
        "http://" not in text and "https://" not in text and "url(" not in text.replace("url(#", "")
    )
    tags = _Tags(text)
    assert {"script", "img", "iframe", "object"}.isdisjoint(tags.tags)
    assert [value for name, value in tags.attributes if name in ("src", "href")] == ["data:,"]


def test_the_sections_of_a_page(tmp_path):
    write_journal(tmp_path, 0, minutes())
    write_journal(tmp_path, 1, minutes())
    lines = [{"step": step, "train/loss": 1.0, "val/loss": 2.0, "lr": 0.1} for step in range(3)]
    write_lines(tmp_path / "metrics.jsonl", [*lines, {"step": 3, "accuracy": 0.9861}])
    row = {"time": BEGAN_S + 100, "step": 50, "steps_s": 0.25, "mfu": 0.41, "peak_bytes": 2**30}
    write_lines(tmp_path / "goodput" / "rates.jsonl", [row, {**row, "time": BEGAN_S + 200}])
    text = page(record_of(tmp_path))
    sections = re.findall(r'<section[^>]*id="(\w+)"', text)
    assert sections == [
        *("verdict", "time", "curves", "throughput", "memory", "checkpoints", "restarts"),
        *("warnings", "configuration"),
    ]
    titles = [title.strip() for title in re.findall(r"<figcaption>(.*?)[<\n]", text)]
    # The two losses have one chart, and the accuracy, which has one value, has a row.
    assert titles == [
        *("loss", "lr"),
        *("steps per second", "model FLOPs utilization", "peak of the largest rank"),
    ]
    assert "0.9861" in text and "1 GiB" in text and "41 %" in text
    # 80 % useful, 10 % data, 2.5 % checkpoint, 7.5 % start-up of each rank
    assert re.findall(r"width:([\d.]+)%", text) == 2 * ["80.0", "10.0", "2.5", "7.5"]


def test_the_command_writes_the_page_and_prints_its_path(tmp_path):
    write_journal(tmp_path, 0, minutes())
    code, out, err = run_command("report", str(tmp_path))
    path = tmp_path / "report.html"
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == str(path)
    assert out.splitlines()[1].startswith("6 min 40 s, 80 % of it training")
    assert path.read_text().startswith("<!DOCTYPE html>")
    code, out, _ = run_command("report", str(tmp_path), "--out", str(tmp_path / "b.html"), "--json")
    document = json.loads(out)
    assert (code, document["path"], document["state"]) == (0, str(tmp_path / "b.html"), "ended")
    code, _, err = run_command("report", str(tmp_path / "report.html"))
    assert code == 1 and "which is no folder" in err
    code, _, err = run_command("report", str(tmp_path), "--out", str(tmp_path / "no" / "b.html"))
    assert code == 1 and "No such file" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.html", "goodput", "report.html"]


def test_rates_that_cannot_be_stored_are_logged_once_and_do_not_stop_training(tmp_path, caplog):
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
    meter = tick(init_meter(ctx, run="a", warmup=0))
    (tmp_path / "a" / "goodput" / "rates.jsonl").mkdir()
    for _ in range(2):
        assert rates(meter, ctx).num_steps == 1
    assert sum("rates of the run are not stored" in text for text in caplog.messages) == 1
    ctx.lifetime.close()
