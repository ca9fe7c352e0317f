"""`faccel config` on a pseudo-terminal, as a user answers it."""

import os
import pty
import re
import select
import time

import yaml
from click.testing import CliRunner

from faccel.cli.commands import main
from tests.command_line import Command
from tests.ranks import TIMEOUT_S

ENTER = "\r"
BACKSPACE = "\x7f"
DOWN = "\x1b[B"
CTRL_C = "\x03"
NAMES = (
    "mixed_precision",
    "grad_accum",
    "seed",
    "device",
    "strategy",
    "zero",
    "mesh",
    "units",
    "run_dir",
    "timeout_s",
    "processes",
    "nodes",
)
# Asked only after some answers.
RARE = ("zero", "units")


class Terminal:
    """A command on a pseudo-terminal, whose output is read as text."""

    def __init__(self, env, *words):
        self._controller, terminal = pty.openpty()
        env = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **env}
        self._command = Command(*words, env=env, terminal=os.ttyname(terminal))
        # The command has its own descriptor only after this output, so the other one stays open.
        self._terminal = terminal
        self._text = ""

    def until(self, text):
        """Return the output before `text`, and drop both."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self._text:
            assert time.monotonic() < deadline, f"no {text!r} in {self._text!r}"
            if select.select([self._controller], [], [], 1)[0]:
                output = os.read(self._controller, 4096).decode()
                self._text += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
        before, _, self._text = self._text.partition(text)
        return before

    def type(self, text):
        os.write(self._controller, text.encode())

    def wait(self):
        """Return the exit code."""
        code, _, _ = self._command.wait()
        os.close(self._terminal)
        os.close(self._controller)
        return code


def answer(terminal, answers):
    """Answer each question, by default with an unchanged proposal."""
    for name in NAMES:
        if name in answers or (answers.get("all") and name not in RARE):
            terminal.until(f"? {name}")
            terminal.type(answers.get(name, "") + ENTER)


def test_answers_become_the_file_and_the_proposals_of_the_next_time(tmp_path):
    file = tmp_path / "config.yaml"
    env = {"FACCEL_CONFIG": str(file)}
    terminal = Terminal(env, "config")
    assert "bf16 roughly halves time and memory" in terminal.until("? mixed_precision")
    terminal.type(DOWN + ENTER)
    terminal.until("? grad_accum")
    terminal.type(BACKSPACE + "x" + ENTER)  # prints an error and waits for another answer
    terminal.until("invalid literal")
    terminal.type(BACKSPACE + "4" + ENTER)
    answers = {"seed": BACKSPACE + "7", "device": "cpu", "strategy": "", "mesh": "dp_replicate=2"}
    answer(terminal, answers | {"run_dir": "", "timeout_s": ""})
    terminal.until("? processes")
    terminal.type(BACKSPACE + "3" + ENTER)  # the proposal is 2, the ranks of the mesh
    terminal.until("`mesh` does not fit 3 processes")
    terminal.type(BACKSPACE + "2" + ENTER)
    answer(terminal, {"nodes": ""})
    terminal.until("start with: faccel launch script.py")
    assert terminal.wait() == 0
    values = {"mixed_precision": "bf16", "grad_accum": 4, "seed": 7, "device": "cpu"}
    values |= {"mesh": "dp_replicate=2", "nproc": 2}
    assert yaml.safe_load(file.read_text()) == values
    terminal = Terminal(env, "config")
    answer(terminal, {"all": True, "seed": BACKSPACE + "8"})
    terminal.until("start with: faccel launch script.py")
    assert terminal.wait() == 0
    assert yaml.safe_load(file.read_text()) == values | {"seed": 8}


def test_a_sharded_model_has_units_and_several_nodes_their_command(tmp_path):
    file = tmp_path / "config.yaml"
    terminal = Terminal({"FACCEL_CONFIG": str(file)}, "config")
    answers = {"mesh": "dp_shard=-1", "units": "Block", "nodes": BACKSPACE + "2"}
    answer(terminal, {name: "" for name in NAMES if name != "zero"} | answers)
    terminal.until("--nnodes 2 --node-rank RANK --main-address HOST script.py")
    assert terminal.wait() == 0
    values = {"mesh": "dp_shard=-1", "plan": {"units": "Block"}}
    assert yaml.safe_load(file.read_text()) == values | {"nproc": 1}


def test_deepspeed_has_a_stage_and_no_mesh(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("mesh: dp_shard=-1\n")
    terminal = Terminal({"FACCEL_CONFIG": str(file)}, "config")
    answers = {"strategy": DOWN, "zero": "3"}
    answer(terminal, {name: "" for name in NAMES if name not in ("mesh", "units")} | answers)
    terminal.until("start with: faccel launch script.py")
    assert terminal.wait() == 0
    assert yaml.safe_load(file.read_text()) == {"strategy": "deepspeed", "zero": 3, "nproc": 1}


def test_ctrl_c_writes_nothing(tmp_path):
    terminal = Terminal({"FACCEL_CONFIG": str(tmp_path / "config.yaml")}, "config")
    terminal.until("? mixed_precision")
    terminal.type(CTRL_C)
    terminal.until("interrupted; nothing was written")
    assert terminal.wait() == 1
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_the_error_names_the_commands_to_use(tmp_path):
    runner = CliRunner(env={"FACCEL_CONFIG": str(tmp_path / "config.yaml")})
    out = runner.invoke(main, ["config"])
    assert (out.exit_code, "Traceback" in out.stderr) == (2, False)
    assert "faccel config set key=value" in out.stderr


def test_a_terminal_gets_columns_and_a_pipe_plain_lines(tmp_path):
    env = {"FACCEL_CONFIG": "", "XDG_CONFIG_HOME": str(tmp_path)}
    terminal = Terminal(env, "config", "show")
    terminal.until("seed = 0")
    terminal.until("(default)")
    assert terminal.wait() == 0
    out = CliRunner(env=env).invoke(main, ["config", "show"])
    assert "seed = 0  (default)\n" in out.stdout
    assert "\x1b" not in out.stdout
