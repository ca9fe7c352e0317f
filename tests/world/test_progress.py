"""Progress: what a terminal shows in the end, what a log has, and what the loop pays for it."""

import contextlib
import io
import itertools
import logging
import re
import sys
import time
import weakref

import nbclient
import nbformat
import pytest
import torch

import faccel
from faccel.errors import ConfigError
from faccel.testing import fake_context
from faccel.tracking import show
from faccel.tracking.progress_text import Status, details

MAIN = fake_context(0, 1)


class Terminal(io.StringIO):
    """A file that is a terminal, and what it shows."""

    def isatty(self):
        return True

    def shown(self):
        rows, row, column = [""], 0, 0
        for match in re.finditer(r"\x1b\[([0-9;]*)([A-Za-z])|(.)", self.getvalue(), re.S):
            count, command, character = match.groups()
            if command == "A":
                row -= int(count)
            elif command == "K":
                rows[row] = ""
            elif character == "\r":
                column = 0
            elif character == "\n":
                row, column = row + 1, 0
                rows += [""] * (row + 1 - len(rows))
            elif character is not None:
                rows[row] = rows[row][:column].ljust(column) + character + rows[row][column + 1 :]
                column += 1
        return [re.sub(" ?[━╸╺]+ ", " ", line) for line in rows]


def count_of(line):
    return re.search(r"\d+(/\d+)?", line)[0]


class CrashError(Exception):
    pass


def leave_by_break(bar):
    for item in bar:
        if item == 1:
            break


def leave_by_error(bar):
    with contextlib.suppress(CrashError):
        for item in bar:
            if item == 1:
                raise CrashError


def items_that_fail():
    yield 0
    raise CrashError


def leave_by_error_of_items(bar):
    with contextlib.suppress(CrashError):
        list(bar)


# items, options, how the loop ends -> the count that stays
ENDS = {
    "all items": (range(3), {}, list, "3/3"),
    "no items": ([], {}, list, "0/0"),
    "no length": (iter(range(3)), {}, list, "3"),
    "a total": (iter(range(3)), {"total": 3}, list, "3/3"),
    "fewer than the total": (range(3), {"total": 9}, list, "3/9"),
    "more than the total": (range(3), {"total": 2}, list, "3/2"),
    "resumed": (range(3), {"initial": 7}, list, "10/10"),
    "break": (range(5), {}, leave_by_break, "1/5"),
    "an error in the loop": (range(5), {}, leave_by_error, "1/5"),
    "an error of the items": (items_that_fail(), {}, leave_by_error_of_items, "1"),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_bar_leaves_one_line_with_the_items_that_are_done(name):
    items, options, leave, count = ENDS[name]
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal):
        bar = faccel.progress(items, MAIN, file=terminal, **options)
        leave(bar)
        assert sys.stdout is terminal
        print("after it")
    first, second, end = terminal.shown()
    assert count_of(first) == count
    assert (second, end) == ("after it", "")


def test_names_with_line_breaks_and_control_characters_are_one_line():
    terminal = Terminal()
    bar = faccel.progress(range(3), MAIN, description="a\nb\x1b[2J", file=terminal)
    for _ in bar:
        faccel.tracking.show({"lo\nss\r": "te\nxt\t"}, bar)
    shown = terminal.shown()
    assert len(shown) == 2 and shown[0].startswith(r"a\nb\x1b[2J")
    file = io.StringIO()
    list(faccel.progress(range(1), MAIN, description="a\nb", file=file))
    assert len(file.getvalue().splitlines()) == 1


class FullDisk(io.StringIO):
    """A log on a full disk, or a terminal that was closed."""

    def write(self, text):
        raise OSError(28, "No space left on device")


class ClosedTerminal(FullDisk):
    def isatty(self):
        return True


@pytest.mark.parametrize("file", [FullDisk(), ClosedTerminal()])
def test_a_bar_that_cannot_be_written_does_not_end_the_loop(file):
    bar = faccel.progress(range(30), MAIN, file=file)
    assert list(bar) == list(range(30))
    assert list(faccel.progress(range(3), MAIN, file=file)) == [0, 1, 2]


def test_nested_bars_leave_the_line_of_the_outer_one():
    terminal = Terminal()
    for _ in faccel.progress(range(2), MAIN, description="epochs", file=terminal):
        for _ in faccel.progress(range(3), MAIN, description="steps", file=terminal):
            shown = terminal.shown()
        assert [line.split()[0] for line in shown] == ["epochs", "steps"]
    line, end = terminal.shown()
    assert line.startswith("epochs 2/2, 100%")
    assert end == ""


def test_a_bar_that_outlasts_the_outer_one_can_be_drawn():
    terminal = Terminal()
    outer = iter(faccel.progress(range(2), MAIN, description="outer", file=terminal))
    inner = iter(faccel.progress(range(2), MAIN, description="inner", file=terminal))
    next(outer), next(inner)
    assert list(outer) == [1]
    assert list(inner) == [1]
    assert [line.split(",")[0] for line in terminal.shown()] == ["outer 2/2", "inner 2/2", ""]


def print_in_pieces():
    print("a", "line", "of", "pieces")
    print("begun", end="")
    print(", ended")
    return ["a line of pieces", "begun, ended"]


def print_with_faccel():
    faccel.print("with faccel", ctx=MAIN)
    return ["with faccel"]


def print_lines():
    sys.stderr.writelines(["one\n", "two\n"])
    return ["one", "two"]


PRINTS = {"print": print_in_pieces, "faccel.print": print_with_faccel, "writelines": print_lines}


@pytest.mark.parametrize("name", PRINTS)
def test_printed_lines_are_above_the_bar(name):
    terminal, lines = Terminal(), []
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        for _ in faccel.progress(range(2), MAIN):
            lines += PRINTS[name]()
            *above, bar = terminal.shown()
            assert above == lines
            assert count_of(bar) == "0/2"


def test_lines_of_a_logger_whose_handler_has_the_terminal_are_above_the_bar():
    terminal = Terminal()
    handler = logging.StreamHandler(terminal)
    logger = faccel.get_logger("faccel.test_progress", MAIN)
    logger.logger.addHandler(handler)
    try:
        for index in faccel.progress(range(3), MAIN, file=terminal):
            logger.warning("line %d", index)
    finally:
        logger.logger.removeHandler(handler)
    *above, bar, end = terminal.shown()
    assert above == ["line 0", "line 1", "line 2"]
    assert (count_of(bar), end) == ("3/3", "")


def test_a_file_gets_its_text_while_a_bar_is_in_a_terminal():
    terminal, file = Terminal(), io.StringIO()
    with contextlib.redirect_stdout(file):
        for _ in faccel.progress(range(1), MAIN, file=terminal):
            print("for the file")
    assert file.getvalue() == "for the file\n"
    assert "file" not in terminal.getvalue()


def test_a_terminal_without_control_sequences_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    list(faccel.progress(range(2), MAIN, file=terminal))
    assert "\x1b" not in terminal.getvalue()
    assert list(map(count_of, terminal.getvalue().splitlines())) == ["1/2", "2/2"]


# total, initial -> the counts that have a line
LINES = {
    "tenths": (20, 0, [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]),
    "rounded up": (15, 0, [2, 3, 5, 6, 8, 9, 11, 12, 14, 15]),
    "few": (3, 0, [1, 2, 3]),
    "resumed": (20, 15, [16, 18, 20]),
    "resumed at the end": (20, 20, []),
}


@pytest.mark.parametrize("name", LINES)
def test_a_log_has_a_line_after_each_tenth(name):
    total, initial, counts = LINES[name]
    out = io.StringIO()
    list(faccel.progress(range(initial, total), MAIN, initial=initial, file=out))
    assert [line.split(" in ")[0] for line in out.getvalue().splitlines()] == [
        f"{count}/{total}" for count in counts
    ]


class CountedReads(torch.Tensor):
    """A tensor that counts how often the host reads it."""

    num_reads = 0

    def item(self):
        CountedReads.num_reads += 1
        return super().item()


def test_tensors_are_read_only_when_a_line_is_due():
    CountedReads.num_reads = 0
    loss, out = torch.tensor(0.25).as_subclass(CountedReads), io.StringIO()
    bar = faccel.progress(range(1000), MAIN, file=out)
    for step in bar:
        show({"loss": loss, "step": step, "phase": "warm-up"}, bar)
    assert CountedReads.num_reads == 11  # ten lines, and the end
    assert out.getvalue().splitlines()[0].endswith("loss 0.25, step 99, phase warm-up")


def test_a_bar_does_not_keep_the_graph_of_the_loss():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

    x = torch.ones(1, requires_grad=True)
    bar = faccel.progress(range(1), MAIN, file=io.StringIO())
    for _ in bar:
        loss = Square.apply(x)
        graph = weakref.ref(loss.grad_fn)
        show({"loss": loss}, bar)
        del loss
        assert graph() is None


def test_values_without_a_number_do_not_end_the_loop():
    out = io.StringIO()
    bar = faccel.progress(range(1), MAIN, file=out)
    for _ in bar:
        show({"images": torch.ones(2, 3), "nothing": None, "nan": float("nan")}, bar)
    assert out.getvalue().endswith("images float32[2, 3], nothing None, nan nan\n")


UNREADABLE = {
    "meta tensor": torch.ones((), device="meta"),
    "too many digits": 10**5000,
    "class": torch.Tensor,
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_values_whose_number_cannot_be_read_do_not_end_the_loop(kind):
    out = io.StringIO()
    bar = faccel.progress(range(2), MAIN, file=out)
    for _ in bar:
        show({"it": UNREADABLE[kind], "loss": 0.5}, bar)
    assert out.getvalue().endswith(", loss 0.5\n")


def test_other_ranks_iterate_over_the_items_themselves():
    items = iter([1, 2])
    bar = faccel.progress(items, fake_context(1, 2), file=Terminal())
    assert iter(bar) is items
    assert next(bar) == 1
    show({"loss": object()}, bar)
    assert list(bar) == [2]


def test_next_and_a_loop_continue_each_other():
    bar = faccel.progress([1, 2, 3], MAIN, file=io.StringIO())
    assert next(bar) == 1
    assert list(bar) == [2, 3]
    assert list(bar) == [1, 2, 3]  # a list can be iterated over again


def test_a_slow_terminal_is_drawn_to_rarely():
    class SlowTerminal(Terminal):
        num_writes = 0

        def write(self, text):
            self.num_writes += bool(text)
            time.sleep(0.01)
            return super().write(text)

    terminal = SlowTerminal()
    start_s = time.monotonic()
    for index in faccel.progress(itertools.count(), MAIN, file=terminal):
        if index % 1000 == 0 and time.monotonic() - start_s > 1:
            break
    duration_s = time.monotonic() - start_s
    # One at the start, one 0.1 s later, and one at the end; the others after 400 times 10 ms.
    assert terminal.num_writes <= 3 + duration_s / 4


def test_rate_and_time_left_are_arithmetic():
    status = Status("", 30, 90, "step", 10.0, 0.5, {}, 3 * 2**30)
    assert details(status) == ["2 s/step", "2:00 left", "3 GiB"]
    out = io.StringIO()
    for _ in faccel.progress(range(10), MAIN, unit="step", file=out):
        time.sleep(0.01)
    rate = float(re.search(r"([0-9.]+) step/s", out.getvalue().splitlines()[-1])[1])
    assert 0 < rate <= 100


NOTEBOOK = """
import faccel
from faccel.testing import fake_context
from faccel.tracking import show

for epoch in range(2):
    bar = faccel.progress(range(50), fake_context(0, 1), description="<train>")
    for step in bar:
        show({"loss": 0.5}, bar)
"""


@pytest.mark.slow
def test_a_notebook_has_one_output_per_loop_with_its_last_state():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert [output.output_type for output in outputs] == ["display_data"] * 2
    for output in outputs:
        assert output.data["text/plain"].startswith("<train>: 50/50 in ")
        assert output.data["text/plain"].endswith("loss 0.5")
        html = output.data["text/html"]
        assert html.startswith('<div>&lt;train&gt; <progress value="50" max="50"></progress> 50/50')


WRONG = {
    "`items` must be iterable": lambda: faccel.progress(3, MAIN),
    "`total` must be an int": lambda: faccel.progress([], MAIN, total=-1),
    "`initial` must be an int": lambda: faccel.progress([], MAIN, initial=1.5),
    r"faccel.progress\(items, ctx\)": lambda: faccel.progress([], 3),
    "`metrics` must be": lambda: show(0.5, faccel.progress([], MAIN)),
    "`bar` must be": lambda: show({}, [1]),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_of_progress_is_an_error(message):
    with pytest.raises(ConfigError, match=message):
        WRONG[message]()
