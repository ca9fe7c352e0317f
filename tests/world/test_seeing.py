"""Trackers, loggers and progress: what they write, and on which rank."""

import csv
import io
import json
import logging

import pytest
import torch

import faccel
from faccel.errors import ConfigError
from faccel.testing import fake_context, simulate


def track(ctx, **options):
    trackers = faccel.tracking.init_trackers("a", ctx, config={"lr": 0.1}, **options)
    for step in range(3):
        loss = faccel.reduce(torch.tensor(float(step + ctx.rank)), ctx, op="mean")
        faccel.tracking.log({"loss": loss, "rate": 0.5}, trackers, step=step)
    faccel.tracking.finish(trackers)
    return len(trackers.opened)


def test_rank_0_writes_what_was_logged_once(tmp_path):
    config = {"run_dir": str(tmp_path)}
    assert simulate(lambda ctx: track(ctx, trackers=("jsonl", "csv")), 2, config=config) == (2, 0)
    lines = [
        json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [(x["step"], x["loss"], x["rate"]) for x in lines] == [
        (0, 0.5, 0.5),
        (1, 1.5, 0.5),
        (2, 2.5, 0.5),
    ]
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == {"lr": 0.1}
    with (tmp_path / "a" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["step"], r["name"], float(r["value"])) for r in rows][:2] == [
        ("0", "loss", 0.5),
        ("0", "rate", 0.5),
    ]
    assert len(rows) == 6


def test_an_existing_run_is_continued(tmp_path):
    config = {"run_dir": str(tmp_path)}
    for _ in range(2):
        simulate(lambda ctx: track(ctx, trackers=("csv",)), 1, config=config)
    assert (tmp_path / "a" / "metrics.csv").read_text().count("step,name,value") == 1
    assert len((tmp_path / "a" / "metrics.csv").read_text().splitlines()) == 13


@pytest.mark.filterwarnings("ignore")  # from the imports of tensorboard
def test_tensorboard_reads_back_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    simulate(
        lambda ctx: track(ctx, trackers=("tensorboard",)), 2, config={"run_dir": str(tmp_path)}
    )
    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.5), (1, 1.5), (2, 2.5)]


def test_the_failure_of_a_custom_tracker_is_logged_once_and_does_not_stop_the_run(tmp_path, caplog):
    steps = []

    def fail(state, values, step):
        steps.append(step)
        raise OSError("the server is gone")

    custom = faccel.tracking.Tracker(lambda folder, config: folder, fail, lambda state: None)
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
    trackers = faccel.tracking.init_trackers("b", ctx, trackers=(custom, "jsonl"))
    for step in range(3):
        faccel.tracking.log({"x": 1}, trackers, step=step)
    faccel.tracking.finish(trackers)
    assert steps == [0, 1, 2]
    assert [r.getMessage().count("the server is gone") for r in caplog.records] == [1]
    assert len((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()) == 3


def test_an_unknown_tracker_is_an_error_on_every_rank(tmp_path):
    for rank in range(2):
        with pytest.raises(ConfigError, match="`jsonl`"):
            faccel.tracking.init_trackers("a", fake_context(rank, 2), trackers=("json",))


def test_a_logger_logs_on_rank_0_with_rank_and_step(caplog):
    caplog.set_level(logging.INFO)
    root = (logging.root.level, list(logging.root.handlers))

    def fn(ctx):
        log = faccel.get_logger("faccel.test", ctx)
        log.info("loss %.1f", 0.5, step=7)
        log.warning("here", every_rank=True)
        log.debug("not at this level", every_rank=True)

    simulate(fn, 2)
    assert [(r.getMessage(), r.rank, r.world_size, r.step) for r in caplog.records] == [
        ("loss 0.5", 0, 2, 7),
        ("[rank 0] here", 0, 2, None),
        ("[rank 1] here", 1, 2, None),
    ]
    assert {r.filename for r in caplog.records} == {"test_seeing.py"}
    assert (logging.root.level, list(logging.root.handlers)) == root


def test_progress_prints_lines_on_rank_0_without_a_terminal():
    outs = [io.StringIO() for _ in range(2)]
    simulate(
        lambda ctx: list(faccel.progress(range(20), ctx, description="read", file=outs[ctx.rank])),
        2,
    )
    lines = outs[0].getvalue().splitlines()
    assert [line.split(" in ")[0] for line in lines] == [f"read: {n}/20" for n in range(2, 21, 2)]
    assert outs[1].getvalue() == ""
    endless = io.StringIO()
    list(faccel.progress(iter(range(9)), fake_context(0, 1), file=endless))
    assert [line.split(" in ")[0] for line in endless.getvalue().splitlines()] == [
        "1",
        "2",
        "4",
        "8",
    ]


def test_progress_is_a_bar_in_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    assert list(faccel.progress([1, 2, 3], fake_context(0, 1), description="train", file=out)) == [
        1,
        2,
        3,
    ]
    assert "train" in out.getvalue()
    assert "100%" in out.getvalue()


def test_a_file_that_is_false_is_written_to():
    class Lines(list):
        """Keeps what is written; false as long as it is empty."""

        def write(self, text):
            self.append(text)

        def flush(self):
            pass

        def isatty(self):
            return False

    printed, progress = Lines(), Lines()
    ctx = fake_context(0, 1)
    faccel.print("x", ctx=ctx, file=printed)
    list(faccel.progress([1], ctx, file=progress))
    assert printed == ["x\n"]
    assert len(progress) == 1
