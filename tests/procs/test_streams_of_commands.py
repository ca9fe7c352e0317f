"""Commands with closed standard streams, or whose output cannot be written."""

import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import faccel
from faccel.cli.commands import main
from faccel.testing import fake_context
from tests.ranks import TIMEOUT_S

# `$0` is Python.
CASES = {
    "a full disk": ('"$0" -m faccel config show >/dev/full', 1),
    "no standard output": ('"$0" -m faccel config show >&-', 0),
    "no standard streams, and an error": ('"$0" -m faccel config check x <&- >&- 2>&-', 1),
    "no standard streams, and an error of a launch": (
        '"$0" -m faccel launch --nproc 2 missing.py <&- >&- 2>&-',
        2,
    ),
    "a reader that has ended": ('"$0" -m faccel config show 2>&1 | true', 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_command_ends_without_a_traceback_whatever_its_streams_are(name):
    line, code = CASES[name]
    # Buffered: the output is written at the end only.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    result = subprocess.run(
        ["sh", "-c", line, sys.executable],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=env,
        check=False,
    )
    expected = ""
    if name == "a full disk":
        expected = "Error: [Errno 28] No space left on device\n"
    assert (result.returncode, result.stderr) == (code, expected)


def test_files_that_are_opened_later_do_not_get_the_number_of_a_closed_stream():
    program = (
        "import os\n"
        "from faccel.launching.command_end import open_standard_streams\n"
        "open_standard_streams()\n"
        "assert os.open('/dev/zero', os.O_RDONLY) > 2\n"
        "for number in range(3):\n"
        "    assert os.path.samefile(f'/proc/self/fd/{number}', os.devnull)\n"
        "print('lost', end='')\n"
    )
    line = f'"$0" -c "{program}" <&- >&- 2>&-; exit $?'
    assert subprocess.run(["sh", "-c", line, sys.executable], check=False).returncode == 0


def test_an_error_of_any_command_is_a_message(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # neither a file nor a folder for the parser of the command line
    for words in (["checkpoints", str(pipe)], ["merge", str(pipe), str(tmp_path / "out")]):
        result = CliRunner().invoke(main, words)
        assert isinstance(result.exception, SystemExit)
        assert result.output.startswith("Error: ")


def test_names_in_a_file_cannot_control_the_terminal(tmp_path):
    name = "x\x1b[2J\x9b\r\u202e"
    one, net = fake_context(0, 1), torch.nn.Linear(1, 1)
    save_file({**net.state_dict(), name: torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(faccel.errors.CheckpointError) as caught:
        faccel.checkpoint.load_model(net, tmp_path, one)
    error = faccel.errors.CheckpointError("a", got=f"{name}\n\t", fix=name)
    for text in (caught.value.got, str(caught.value), str(error)):
        assert not set(text) & set("\x1b\x9b\r\u202e"), text
    assert str(error).count("\n") == 2
    assert error.got == f"{name}\n\t"
