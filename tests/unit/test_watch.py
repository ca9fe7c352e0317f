"""`faccel watch`: frames of hand-written runs, and of a run of this process."""

import io
import math

import pytest
from rich.console import Console

import faccel
from faccel.cli.watch_command import rendered, sparkline
from faccel.report.follower import Follower
from faccel.report.live import LiveRun
from faccel.report.live_ranks import LiveRanks, RankRow
from faccel.tracking import init_meter, init_trackers, log, tick
from tests import run_folders
from tests.command_line import run_command
from tests.run_folders import BEGAN_S, ended, event, minutes, start, write_journal, write_lines


class Clock:
    """A clock that a test sets."""

    def __init__(self, time_s):
        self.time_s = time_s

    def __call__(self):
        return self.time_s


def text_of(frame, width=100, max_rows=None):
    file = io.StringIO()
    console = Console(file=file, width=width, markup=False, highlight=False)
    console.print(rendered(frame, console, max_rows=max_rows))
    return file.getvalue()


def test_only_complete_new_lines_are_read(tmp_path):
    path = tmp_path / "a"
    follower = Follower(path)
    assert follower.lines() == []
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert follower.objects() == [{"a": 1}]
    with path.open("ab") as file:
        file.write(b"}\nno json\n[3]\n")
    assert follower.objects() == [{"a": 2}]
    assert follower.lines() == []
    path.write_bytes(b"4\n")  # another file
    assert follower.lines() == [b"4"]


def test_of_a_large_file_only_the_end_is_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"".join(b"%03d\n" % number for number in range(100)))
    follower = Follower(path, max_bytes=10)
    assert follower.lines() == [b"098", b"099"]  # the first one is cut
    with path.open("ab") as file:
        file.write(b"100\n")
    assert follower.lines() == [b"100"]


def test_the_speed_is_measured_over_the_last_frames(tmp_path):
    clock = Clock(BEGAN_S + 10)
    counts = {"useful_s": 8.0, "startup_s": 2.0}
    write_journal(tmp_path, 0, [start(), event("step", 10.0, num_steps=4, **counts)])
    live = LiveRun(str(tmp_path), clock)
    frame = live.frame()
    assert (frame.step, frame.steps_s, frame.state, frame.elapsed_s) == (4, None, "running", 10.0)
    clock.time_s += 5
    write_journal(tmp_path, 0, [start(), event("step", 15.0, num_steps=14, **counts)])
    frame = live.frame()
    assert (frame.step, frame.steps_s, frame.is_over) == (14, 2.0, False)
    assert "step 14  2 steps/s" in text_of(frame)
    write_journal(tmp_path, 0, [start(), event("end", 15.0, num_steps=14, **counts)])
    assert (live.frame().state, live.frame().is_over) == ("ended", True)


def test_a_line_of_blocks_has_values_whose_sums_and_differences_overflow():
    assert sparkline([-1.7e308, 0.0, 1.7e308], 3) == "▁▅█"
    assert sparkline([1.7e308, 1.7e308, -1.7e308, -1.7e308], 2) == "█▁"


def test_metrics_are_followed_and_a_loss_that_is_nan_is_the_verdict(tmp_path):
    write_journal(tmp_path, 0, minutes(name="step"))
    lines = [{"step": step, "z": 1.0, "loss": 2.0 - step} for step in range(3)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    live = LiveRun(str(tmp_path), Clock(BEGAN_S + 410))
    first, second = live.frame().metrics
    assert (first.name, first.step, first.last, first.means) == ("loss", 2, 0.0, (2.0, 1.0, 0.0))
    assert second.name == "z"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": NaN}\n')
    frame = live.frame()
    assert frame.sentence == "`loss` is NaN at step 3"
    assert math.isnan(frame.metrics[0].last)
    assert "To fix: lower the learning rate" in text_of(frame)


def test_a_tracker_that_opens_after_the_first_frame_is_shown(tmp_path):
    run_folders.write_rank(tmp_path, end=ended())
    live = LiveRun(str(tmp_path))
    assert live.frame().metrics == []
    write_lines(tmp_path / "a" / "metrics.csv", ["step,name,value\n", "1,loss,2.5\n"])
    assert live.frame().metrics[0].last == 2.5


def test_metrics_of_event_files_are_followed(tmp_path):
    pytest.importorskip("tensorboard")
    with faccel.init(env={}, run_dir=str(tmp_path), device="cpu") as ctx:
        trackers = init_trackers("a", ctx, trackers=("tensorboard",))
        live = LiveRun(str(tmp_path))
        for step in range(2):
            log({"loss": 3.0 - step}, trackers, step=step)
            faccel.tracking.handle("tensorboard", trackers).flush()
            assert live.frame().metrics[0].last == 3.0 - step
        faccel.tracking.finish(trackers)


def test_the_ranks_of_a_run_are_asked_for_step_and_line(tmp_path):
    with faccel.init(env={}, run_dir=str(tmp_path), device="cpu") as ctx:
        meter = init_meter(ctx, run="a")
        for _ in range(3):
            meter = tick(meter)
        live = LiveRun(str(tmp_path))
        frame = live.frame()
        assert (frame.state, frame.step, frame.is_over) == ("running", 3, False)
        (row,) = frame.ranks
        assert row.label == "rank 0"
        assert "unit/test_watch.py:" in row.activity
        assert row.activity in text_of(frame)
    frame = live.frame()
    assert (frame.state, frame.is_over) == ("ended", True)
    assert frame.ranks == [RankRow("rank 0", None, "has closed its context")]


def test_ranks_are_asked_every_few_seconds_only(tmp_path):
    with faccel.init(env={}, run_dir=str(tmp_path), device="cpu"):
        clock = Clock(BEGAN_S)
        live = LiveRun(str(tmp_path), clock)
        first = live.frame().ranks
        clock.time_s += 1
        second = live.frame().ranks  # of another line, and with the answer before
        clock.time_s += 5
        third = live.frame().ranks
    assert first == second
    assert first != third


def test_a_failure_is_over_when_the_launcher_gives_up_or_after_a_while(tmp_path):
    run_folders.write_rank(tmp_path, end=ended("ValueError: no rows"))
    clock = Clock(BEGAN_S + 401)
    live = LiveRun(str(tmp_path), clock)
    frame = live.frame()
    assert (frame.state, frame.is_over) == ("failed", False)
    assert frame.sentence == "rank 0 failed: ValueError: no rows"
    clock.time_s += 20
    assert live.frame().is_over
    launch = {"rank": 0, "reason": "exit code 1", "time_s": BEGAN_S + 401}
    write_lines(tmp_path / ".faccel" / "launch.json", [launch])
    assert LiveRun(str(tmp_path), Clock(BEGAN_S + 402)).frame().is_over


def test_ranks_that_do_not_answer_are_no_problem_before_they_were_asked(tmp_path):
    assert LiveRanks(tmp_path).problem(is_silent=True) is None


def rank_frame(tmp_path, num_ranks):
    write_journal(tmp_path, 0, minutes(name="step"))
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "[bold]a long name of a metric": 1.0}])
    for rank in range(num_ranks):
        end = ended("" if rank else "ValueError: \x1b[2J")
        run_folders.write_rank(tmp_path, rank, num_ranks, end=end, start_s=BEGAN_S + rank)
    return LiveRun(str(tmp_path)).frame()


@pytest.mark.parametrize("width", [10, 20, 40, 200])
def test_a_narrow_terminal_has_no_longer_lines(tmp_path, width):
    text = text_of(rank_frame(tmp_path, 3), width=width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    # A rank has one line, so that the rows stay where they are.
    begin = next(index for index, line in enumerate(lines) if line.startswith("rank 0  "[:width]))
    assert all(line.startswith("rank") for line in lines[begin:])
    assert "\x1b" not in text


def test_a_metric_with_line_breaks_has_one_line(tmp_path):
    write_journal(tmp_path, 0, minutes())
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "a\nloss\x1b[2J": 1.0, "b": 2.0}])
    lines = text_of(LiveRun(str(tmp_path)).frame()).splitlines()
    begin = lines.index("a\\nloss\\x1b[2J          1  ▁")
    assert lines[begin + 1].split() == ["b", "2", "▁"]


def test_many_ranks_are_grouped_where_the_screen_is_small(tmp_path):
    frame = rank_frame(tmp_path, 64)
    text = text_of(frame, max_rows=24)
    assert len(text.splitlines()) <= 24
    assert "ranks 1-63" in text and "have closed" not in text.partition("ranks 1-63")[0]
    assert "[bold]a long" in text


def test_the_command_prints_one_frame_without_a_terminal(tmp_path):
    write_journal(tmp_path, 0, minutes())
    code, out, err = run_command("watch", str(tmp_path))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].endswith("ended  6 min 40 s")
    assert lines[1].startswith("training 80 %  data wait 10 %")
    assert "\x1b" not in out
    run_folders.write_rank(tmp_path, end=ended("ValueError: no rows"))
    code, out, _ = run_command("watch", str(tmp_path), "--once")
    assert code == 5 and "rank 0 failed: ValueError: no rows" in out
    code, _, err = run_command("watch", str(tmp_path / "missing"))
    assert code == 1 and "faccel watch DIR" in err


def test_a_terminal_without_unicode_gets_ascii(tmp_path):
    lines = [{"step": step, "loss": float(step)} for step in range(8)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")  # raises for other characters
    console = Console(file=file, width=80)
    console.print(rendered(LiveRun(str(tmp_path)).frame(), console, max_rows=None))
    file.seek(0)
    assert "_.-~=+*#" in file.read()
