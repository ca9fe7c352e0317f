"""Trackers, loggers and progress: what they write, and on which rank."""

import argparse
import csv
import dataclasses
import fractions
import io
import json
import logging
import pathlib
import types

import attrs
import numpy as np
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


def test_the_failure_of_a_custom_tracker_is_logged_once_and_does_not_stop_the_run(
    tmp_path, log_records
):
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
    assert [r.getMessage().count("the server is gone") for r in log_records()] == [1]
    assert len((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trackers": ("json",)}, "use `jsonl`"),
        ({"trackers": "jsonl"}, r"""trackers=\("jsonl",\)"""),
        ({"trackers": ("csv", "csv")}, "`csv` twice"),
        ({"config": 3}, "`config` must have named fields"),
        ({"config": dict}, "`config` must have named fields"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_an_error_on_every_rank(tmp_path, options, words):
    for rank in range(2):
        with pytest.raises(ConfigError, match=words):
            faccel.tracking.init_trackers("a", fake_context(rank, 2), **options)


def test_swapped_arguments_of_log_are_an_error_on_every_rank():
    empty = faccel.tracking.Trackers()
    for arguments in ((empty, {"x": 1}), (0.5, empty)):
        with pytest.raises(ConfigError, match=r"log\(.*trackers, step=step\)"):
            faccel.tracking.log(*arguments, step=0)


class WithoutText:
    """An object of a library whose text cannot be made."""

    def __str__(self):
        raise RuntimeError("no text")

    def __repr__(self):
        return "WithoutText()"


LEAF = torch.ones((), requires_grad=True)
CIRCLE = [1]
CIRCLE.append(CIRCLE)
META_TEXT = "tensor(..., device='meta', size=(1,))"
# A value, and what the file of `jsonl` and `csv` contains; ABSENT is left out and named once.
ABSENT = object()
LOGGED = {
    "int": (3, 3.0, "3.0"),
    "bool": (True, 1.0, "1.0"),
    "numpy number": (np.float32(0.5), 0.5, "0.5"),
    "fraction": (fractions.Fraction(1, 2), 0.5, "0.5"),
    "tensor": (torch.tensor(2), 2.0, "2.0"),
    "tensor of one element": (torch.tensor([[2.5]]), 2.5, "2.5"),
    "tensor with gradients": (LEAF * 2, 2.0, "2.0"),
    "array of one element": (np.array([2.5]), 2.5, "2.5"),
    "text": ("warm-up", "warm-up", "warm-up"),
    "text of a number": ("1", "1", "1"),
    "none": (None, None, ABSENT),
    "list": ([1, torch.tensor(2)], [1, 2], ABSENT),
    "several elements": (torch.arange(2.0), [0.0, 1.0], ABSENT),
    "dict": ({("a", 1): None}, {"('a', 1)": None}, ABSENT),
    "path": (pathlib.PurePosixPath("a/b"), "a/b", ABSENT),
    "complex": (1j, "1j", ABSENT),
    "a class in a dict": ({"dtype": np.float32}, {"dtype": "<class 'numpy.float32'>"}, ABSENT),
    "meta tensor in a dict": ({"x": torch.ones(1, device="meta")}, {"x": META_TEXT}, ABSENT),
    "without text": (WithoutText(), "WithoutText()", ABSENT),
    "a list in itself": (CIRCLE, "[1, [1, [1, [...]]]]", ABSENT),
    "an int of many digits in a list": ([10**5000], "[an int of 16610 bits]", ABSENT),
    "a byte of a file name": ("a\udcff", "a\udcff", "a\\udcff"),
    "huge int": (10**400, ABSENT, ABSENT),
    "meta tensor": (torch.ones((), device="meta"), ABSENT, ABSENT),
}


@pytest.mark.parametrize("kind", LOGGED)
@pytest.mark.filterwarnings("error")
def test_a_value_of_any_type_drops_no_other_value(kind, tmp_path, log_records):
    value, in_jsonl, in_csv = LOGGED[kind]
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
    trackers = faccel.tracking.init_trackers("run", ctx, trackers=("jsonl", "csv"))
    for step in range(3):
        faccel.tracking.log({"before": 0, "it": value, "loss": 0.5}, trackers, step=step)
    faccel.tracking.finish(trackers)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [(row["step"], row["name"], row["value"]) for row in csv.DictReader(file)]
    for step, line in enumerate(lines):
        values = json.loads(line)
        assert (values["step"], values["before"], values["loss"]) == (step, 0.0, 0.5)
        assert values.get("it", ABSENT) == in_jsonl
    expected = [("before", "0.0"), ("it", in_csv), ("loss", "0.5")]
    expected = [pair for pair in expected if pair[1] is not ABSENT]
    assert rows == [(str(step), *pair) for step in range(3) for pair in expected]
    assert len(lines) == 3
    assert len(log_records()) == (in_csv is ABSENT)
    assert all("`it`" in record.getMessage() for record in log_records())


@pytest.mark.parametrize("kind", LOGGED)
def test_a_configuration_of_any_value_is_stored(kind, tmp_path, log_records):
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
    config = {"it": LOGGED[kind][0], "lr": 0.1}
    faccel.tracking.finish(faccel.tracking.init_trackers("a", ctx, config=config))
    stored = json.loads((tmp_path / "a" / "config.json").read_text())
    assert stored["lr"] == 0.1
    assert json.loads((tmp_path / "a" / "faccel.json").read_text())["config"] == stored
    assert not log_records()


def test_metrics_with_the_names_of_fields_change_neither_the_step_nor_the_time(tmp_path):
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
    trackers = faccel.tracking.init_trackers("a", ctx)
    faccel.tracking.log({"step": 0.5, "time": 0.25, "loss": 2}, trackers, step=7)
    faccel.tracking.finish(trackers)
    (line,) = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line)
    assert values.pop("time") > 1e9
    assert values == {"step": 7, "values/step": 0.5, "values/time": 0.25, "loss": 2.0}


@pytest.mark.filterwarnings("ignore")  # from the imports of tensorboard
def test_tensorboard_records_text_next_to_numbers(tmp_path, log_records):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
    trackers = faccel.tracking.init_trackers("a", ctx, trackers=("tensorboard",))
    for step in range(2):
        values = {"phase": "warm-up", "none": None, "loss": 0.5}
        faccel.tracking.log(values, trackers, step=step)
    faccel.tracking.finish(trackers)
    events = EventAccumulator(str(tmp_path / "a"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == [0.5, 0.5]
    texts = events.Tensors("phase/text_summary")
    assert [text.tensor_proto.string_val[0] for text in texts] == [b"warm-up"] * 2
    assert [record.getMessage().count("`none`") for record in log_records()] == [1]


def test_a_sharded_value_is_left_out_because_its_number_needs_the_other_ranks(tmp_path, caplog):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    def fn(ctx):
        trackers = faccel.tracking.init_trackers("run", ctx)
        mesh = ctx.mesh.device_mesh
        values = {
            "replicated": DTensor.from_local(torch.tensor(0.5), mesh, [Replicate()]),
            "sharded": DTensor.from_local(torch.ones(1), mesh, [Shard(0)]),
        }
        faccel.tracking.log(values, trackers, step=0)
        faccel.tracking.finish(trackers)

    simulate(fn, 2, config={"run_dir": str(tmp_path), "mesh": "dp_shard=2"})
    values = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert (values["replicated"], "sharded" in values) == (0.5, False)
    assert "value.full_tensor()" in caplog.text


@dataclasses.dataclass
class Settings:
    lr: float
    path: pathlib.PurePosixPath


@attrs.frozen
class Record:
    lr: float
    path: pathlib.PurePosixPath


FIELDS = {"lr": 0.1, "path": pathlib.PurePosixPath("a/b")}


@pytest.mark.parametrize(
    "config",
    [
        FIELDS,
        types.MappingProxyType(FIELDS),
        argparse.Namespace(**FIELDS),
        types.SimpleNamespace(**FIELDS),
        Settings(**FIELDS),
        Record(**FIELDS),
        type("Arguments", (), {"__init__": lambda self: vars(self).update(FIELDS)})(),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.filterwarnings("ignore")  # from the imports of tensorboard
def test_a_config_of_any_type_with_fields_is_stored(config, tmp_path, log_records):
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
    for nested in (config, {"args": config}):
        names = ("jsonl", "csv", "tensorboard")
        trackers = faccel.tracking.init_trackers("run", ctx, trackers=names, config=nested)
        assert len(trackers.opened) == 3
        faccel.tracking.finish(trackers)
        stored = json.loads((tmp_path / "run" / "config.json").read_text())
        if isinstance(nested, dict) and "args" in nested:
            stored = stored["args"]
            if type(config).__name__ == "Arguments":  # not a record: its text below the top level
                continue
        assert stored == {"lr": 0.1, "path": "a/b"}
    assert not log_records()


def test_custom_trackers_have_different_names_and_each_failure_is_logged(tmp_path, caplog):
    def fail(state, values, step):
        raise OSError(state)

    def tracker(text):
        return faccel.tracking.Tracker(lambda folder, config: text, fail, lambda state: None)

    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
    custom = (tracker("first server"), "csv", tracker("second server"))
    trackers = faccel.tracking.init_trackers("b", ctx, trackers=custom)
    assert [name for name, _, _ in trackers.opened] == ["trackers[0]", "csv", "trackers[2]"]
    for step in range(2):
        faccel.tracking.log({"x": 1}, trackers, step=step)
    faccel.tracking.finish(trackers)
    for text in ("first server", "second server"):
        assert caplog.text.count(text) == 1


def test_a_custom_tracker_gets_values_of_its_types_only(tmp_path):
    seen = []
    custom = faccel.tracking.Tracker(
        lambda folder, config: config,
        lambda state, values, step: seen.append(values),
        lambda state: None,
        types=(float, list),
    )
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
    trackers = faccel.tracking.init_trackers("b", ctx, trackers=(custom,))
    faccel.tracking.log({"loss": LEAF, "table": [1, 2], "phase": "a"}, trackers, step=0)
    assert seen == [{"loss": 1.0, "table": [1, 2]}]


def test_a_logger_logs_on_rank_0_with_rank_and_step(caplog, log_records):
    caplog.set_level(logging.INFO)
    root = (logging.root.level, list(logging.root.handlers))

    def fn(ctx):
        log = faccel.get_logger("faccel.test", ctx)
        log.info("loss %.1f", 0.5, step=7)
        log.warning("here", every_rank=True)
        log.debug("not at this level", every_rank=True)

    simulate(fn, 2)
    assert [(r.getMessage(), r.rank, r.world_size, r.step) for r in log_records()] == [
        ("loss 0.5", 0, 2, 7),
        ("[rank 0] here", 0, 2, None),
        ("[rank 1] here", 1, 2, None),
    ]
    assert {r.filename for r in log_records()} == {"test_seeing.py"}
    assert (logging.root.level, list(logging.root.handlers)) == root


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
def test_a_record_has_the_line_of_its_call(level, log_records):
    logger = faccel.get_logger("faccel.line", fake_context(0, 1))
    logger.setLevel(logging.DEBUG)
    getattr(logger, level)("message")
    getattr(logger, level)("message", stacklevel=1)
    lines = [record.lineno for record in log_records()]
    assert lines[1] == lines[0] + 1
    assert {record.filename for record in log_records()} == {"test_seeing.py"}


def test_a_logger_without_a_context_logs_in_each_process_until_a_call_has_one(log_records):
    log = faccel.get_logger("faccel.test")
    log.warning("before")
    simulate(lambda ctx: log.warning("after", ctx=ctx), 2)
    log.warning("alone", in_order=True)  # there is no other rank to wait for
    records = [(r.getMessage(), r.rank, r.world_size) for r in log_records()]
    assert records == [("before", None, None), ("after", 0, 2), ("alone", None, None)]
    assert {r.filename for r in log_records()} == {"test_seeing.py"}


def test_a_message_is_logged_once_per_level_and_arguments(log_records):
    def fn(ctx):
        log = faccel.get_logger("faccel.test", ctx)
        for epoch in range(3):
            log.warning("missing %s", ["a"], once=True)
            log.warning("missing %s", ["b"], once=True)
            log.error("missing %s", ["a"], once=True, every_rank=True)
            log.warning("epoch %d", epoch)

    simulate(fn, 2)
    texts = sorted(r.getMessage() for r in log_records())
    assert texts == [
        *("[rank 0] missing ['a']", "[rank 1] missing ['a']"),
        *("epoch 0", "epoch 1", "epoch 2", "missing ['a']", "missing ['b']"),
    ]


def test_messages_that_differ_in_the_middle_of_a_long_argument_are_logged_once_each(log_records):
    log = faccel.get_logger("faccel.test", fake_context(0, 1))
    paths = ["/data/" * 50 + name + "/part" * 50 for name in ("a", "b", "a")]
    for path in paths:
        log.warning("missing %s", path, once=True)
        log.warning("missing %s", [0] * 50 + [path], once=True)
    assert [r.args[0] for r in log_records()] == [
        *(paths[0], [0] * 50 + [paths[0]]),
        *(paths[1], [0] * 50 + [paths[1]]),
    ]


def test_extra_may_be_none_as_in_the_standard_logger(log_records):
    log = faccel.get_logger("faccel.test", fake_context(0, 1))
    log.warning("message", extra=None)
    log.warning("message", extra={"run": "a"})
    with pytest.raises(KeyError, match="Attempt to overwrite 'name'"):
        log.warning("message", extra={"name": "a"})
    assert [(r.rank, getattr(r, "run", None)) for r in log_records()] == [(0, None), (0, "a")]


@pytest.mark.parametrize("seed", range(4))
def test_ranks_log_in_order_whatever_their_speed_and_level(seed, log_records):
    def fn(ctx):
        log = faccel.get_logger("faccel.test", ctx)
        log.warning("is %d", ctx.rank, in_order=True)
        log.debug("below the level", in_order=True)
        log.warning("again", in_order=True, once=True)
        log.warning("again", in_order=True, once=True)

    simulate(fn, 3, seed=seed)
    texts = [r.getMessage() for r in log_records()]
    assert texts[:3] == [f"[rank {rank}] is {rank}" for rank in range(3)]
    assert texts[3:] == [f"[rank {rank}] again" for rank in range(3)]
    assert {r.filename for r in log_records()} == {"test_seeing.py"}


def test_a_rank_that_logs_in_order_alone_is_named():
    def fn(ctx):
        if ctx.is_main:
            faccel.get_logger("faccel.test", ctx).warning("alone", in_order=True)

    with pytest.raises(faccel.errors.DesyncError, match="rank 0"):
        simulate(fn, 2)


LINES = {"json_lines": True}


def config_of(tmp_path):
    return {"run_dir": str(tmp_path)}


def lines_of(tmp_path, rank):
    text = (tmp_path / "logs" / f"rank{rank}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_each_rank_writes_its_records_as_json_lines(tmp_path, log_records):
    def fn(ctx):
        log = faccel.get_logger("faccel.test", ctx, json_lines=True)
        log.warning("loss %.1f", ctx.rank / 2, step=np.int64(7))
        log.debug("below the level")
        if not ctx.is_main:  # pytest raises if it cannot format a message that is printed
            log.warning("%d", "no number")

    for _ in range(2):  # a restart appends
        simulate(fn, 2, config={"run_dir": str(tmp_path)})
    for rank in range(2):
        text = (tmp_path / "logs" / f"rank{rank}.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert [(x["message"], x["rank"], x["level"], x["step"]) for x in lines] == 2 * [
            (f"loss {rank / 2}", rank, "WARNING", 7),
            *rank * [("%d", 1, "WARNING", None)],
        ]
        assert all(x["logger"] == "faccel.test" and x["time"] > 1e9 for x in lines)
    printed = [r.rank for r in log_records() if "loss" in str(r.msg)]
    assert printed == [0, 0]


def test_json_lines_of_a_rank_that_prints_nothing_have_its_exceptions(tmp_path):
    log = faccel.get_logger("faccel.test", fake_context(1, 2, config=config_of(tmp_path)), **LINES)
    try:
        raise OSError("broken pipe")
    except OSError as error:
        log.exception("a")
        caught = error
    log.error("b", exc_info=caught)
    log.error("c", exc_info=(OSError, caught, caught.__traceback__))
    log.exception("d")  # there is none
    log.error("e")
    log.error(WithoutText(), step=WithoutText())
    lines = lines_of(tmp_path, 1)
    for line in lines[:3]:
        assert line["exception"].splitlines()[-1] == "OSError: broken pipe"
        assert "test_seeing.py" in line["exception"]
    assert [line["message"] for line in lines] == ["a", "b", "c", "d", "e", "WithoutText()"]
    assert not any("exception" in line for line in lines[3:])


def test_a_full_disk_ends_the_json_lines_and_not_the_training(tmp_path, log_records):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank0.jsonl").symlink_to("/dev/full")
    log = faccel.get_logger("faccel.test", fake_context(0, 1, config=config_of(tmp_path)), **LINES)
    for number in range(3):
        log.warning("message %d", number)
    texts = [r.getMessage() for r in log_records()]
    assert "No space left" in texts[0]
    assert texts[1:] == ["message 0", "message 1", "message 2"]


def test_json_lines_need_a_context_and_a_writable_folder(tmp_path):
    with pytest.raises(faccel.errors.ConfigError, match="`json_lines` needs"):
        faccel.get_logger("faccel.test", json_lines=True)
    (tmp_path / "logs").write_text("a file is in the way")
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path)})
    with pytest.raises(faccel.errors.ConfigError, match="cannot be written in `run_dir`"):
        faccel.get_logger("faccel.test", ctx, json_lines=True)


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


def test_a_run_dir_in_which_no_folder_can_be_created_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    ctx = fake_context(0, 1, config={"run_dir": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match="cannot be created in `run_dir`") as caught:
        faccel.tracking.init_trackers("a", ctx)
    assert "Not a directory" in caught.value.got
