"""`faccel config` as a person answers it, through a pseudo-terminal."""

import os
import pty
import re
import select
import subprocess
import sys
import time

import yaml

ENTER = "\r"


class Terminal:
    """A command in a pseudo-terminal, of which what it shows is read as text."""

    def __init__(self, env, *words):
        self.end, theirs = pty.openpty()
        env = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"} | env
        command = [sys.executable, "-m", "faccel", *words]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, close_fds=True
        )
        os.close(theirs)
        self.shown = ""

    def until(self, text, seconds=60):
        """Read until `text` is shown, and forget what came before it."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown!r}"
            if select.select([self.end], [], [], 1)[0]:
                try:
                    more = os.read(self.end, 4096).decode()
                except OSError:  # it has ended
                    more = ""
                assert more or text in self.shown, f"no {text!r} in {self.shown!r}"
                self.shown += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", more)
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text):
        os.write(self.end, text.encode())


def answer(terminal, given):
    for name in (
        "mixed_precision",
        "grad_accum",
        "seed",
        "device",
        "mesh",
        "run_dir",
        "timeout_s",
        "processes",
    ):
        terminal.until(f"? {name}")
        terminal.type(given.get(name, "") + ENTER)


def test_answers_make_the_file_and_the_next_time_they_are_proposed(tmp_path):
    file = tmp_path / "own.yaml"
    env = {"FACCEL_CONFIG": str(file)}
    terminal = Terminal(env, "config")
    explained = terminal.until("? mixed_precision")
    assert "bf16 halves time and memory" in explained
    down = "\x1b[B"
    terminal.type(down + ENTER)
    terminal.until("? grad_accum")
    terminal.type("\x7fx" + ENTER)  # not a number: it says so and waits for another
    terminal.until("invalid literal")
    terminal.type("\x7f4" + ENTER)
    for name, text in (("seed", "\x7f7"), ("device", "cpu"), ("mesh", "dp_replicate=2"), ("run_dir", ""),
                       ("timeout_s", ""), ("processes", "\x7f2")):  # fmt: skip
        terminal.until(f"? {name}")
        terminal.type(text + ENTER)
    terminal.until("start with: faccel launch --nproc 2 script.py")
    assert terminal.process.wait(timeout=30) == 0
    made = {
        "mixed_precision": "bf16",
        "grad_accum": 4,
        "seed": 7,
        "device": "cpu",
        "mesh": "dp_replicate=2",
    }
    assert yaml.safe_load(file.read_text()) == made
    again = Terminal(env, "config")
    answer(again, {"seed": "\x7f8"})
    again.until("start with: faccel launch script.py")
    assert again.process.wait(timeout=30) == 0
    assert yaml.safe_load(file.read_text()) == made | {"seed": 8}


def test_ctrl_c_writes_nothing_and_without_a_terminal_the_other_way_is_named(tmp_path):
    env = {"FACCEL_CONFIG": str(tmp_path / "own.yaml")}
    terminal = Terminal(env, "config")
    terminal.until("? mixed_precision")
    terminal.type("\x03")
    terminal.until("interrupted; nothing was written")
    assert terminal.process.wait(timeout=30) == 1
    assert list(tmp_path.iterdir()) == []
    command = [sys.executable, "-m", "faccel", "config"]
    out = subprocess.run(command, env=os.environ | env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                         check=False, timeout=60)  # fmt: skip
    assert (out.returncode, "Traceback" in out.stderr) == (2, False)
    assert "faccel config set key=value" in out.stderr


def test_a_terminal_gets_colours_and_columns_and_a_pipe_plain_lines(tmp_path):
    env = {"FACCEL_CONFIG": "", "XDG_CONFIG_HOME": str(tmp_path)}
    terminal = Terminal(env, "config", "show")
    terminal.until("seed = 0")
    assert terminal.process.wait(timeout=30) == 0
    command = [sys.executable, "-m", "faccel", "config", "show"]
    out = subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, check=True, timeout=60
    )
    assert "seed = 0  (default)\n" in out.stdout
    assert "\x1b" not in out.stdout
