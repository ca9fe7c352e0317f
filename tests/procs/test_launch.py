"""`faccel launch` and `faccel test` with real processes: exit codes, signals, restarts and logs.

Most scripts here do not import torch, because the launcher is tested, and an import takes seconds.
"""

import json
import os
import signal
import socket
import sys

import pytest
from click.testing import CliRunner

from faccel.cli.commands import main
from tests.command_line import Command, run_command

# The first argument selects what the rank does.
SCRIPT = """
import os, signal, sys, time

def write(text):
    sys.stdout.write(text + "\\n")  # one write, because the lines of ranks must not mix
    sys.stdout.flush()

rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
action = sys.argv[1]
if action == "print":
    write(f"rank {rank} of {world_size}: {sys.argv[2:]} {os.environ['FACCEL_LAUNCH']}")
elif action == "exit" and rank == "1":
    sys.exit(7)
elif action == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
elif action in ("exit", "kill", "sleep"):
    try:
        write("waiting")
        time.sleep(600)
    except KeyboardInterrupt:  # as faccel's hook: no traceback, and the process ends by SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
elif action == "idle":
    write("waiting")
    time.sleep(600)
elif action == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: write("signal") if rank == "0" else None)
    write("waiting")
    while True:
        time.sleep(1)
elif action == "preempt":  # as a script that saves a checkpoint and exits
    requested = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: requested.append(1))
    write("waiting")
    while not requested:
        time.sleep(0.02)
    time.sleep(0.3 * int(rank))  # the agent must not end the rank that saves longer
    sys.exit(75)
"""

TRAINING = """
import os, sys
import faccel

with faccel.init() as ctx:
    seed, arguments = ctx.config.seed, sys.argv[1:]
    place = f"rank {ctx.rank} of {ctx.world_size} on {ctx.device.type}"
    sys.stdout.write(f"{place}: {seed} {arguments}\\n")
    sys.stdout.flush()
    if ctx.rank == 1 and ctx.topology.attempt == 0:
        raise ValueError("bad sample")
    if ctx.rank == 1:
        os._exit(7)
    faccel.barrier(ctx)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def test_two_ranks_get_arguments_and_flags_and_no_temporary_file_remains(script, tmp_path):
    folder = tmp_path / "temporary"
    folder.mkdir()
    words = ["launch", "--cpu", "--nproc", "2", "--seed", "5", script, "print", "--seed", "x"]
    code, out, errors = run_command(*words, FACCEL_SEED="4", TMPDIR=str(folder))
    assert (code, errors) == (0, "")
    flags = '{"seed": 5, "device": "cpu"}'
    expected = [f"rank {rank} of 2: ['--seed', 'x'] {flags}" for rank in range(2)]
    assert sorted(out.splitlines()) == expected
    assert list(folder.iterdir()) == []


def test_a_script_a_module_and_an_executable_run_as_a_single_process(script):
    code, out, _ = run_command("launch", "--cpu", script, "print")
    assert (code, out) == (0, 'rank 0 of 1: [] {"device": "cpu"}\n')
    assert run_command("launch", "--cpu", "-m", "this")[1].startswith("The Zen")
    assert run_command("launch", "--cpu", "--no-python", "echo", "-n", "x")[1] == "x"


def test_two_ranks_of_an_executable(script):
    words = ["--no-python", sys.executable, script, "print"]
    code, out, errors = run_command("launch", "--cpu", "--nproc", "2", *words)
    assert (code, len(out.splitlines())) == (0, 2), errors


@pytest.mark.parametrize(
    ("action", "code", "reason"), [("exit", 7, "exit code 7"), ("kill", 137, "signal 9")]
)
def test_the_first_failure_is_printed_once_and_determines_the_exit_code(
    script, action, code, reason
):
    exit_code, _, errors = run_command("launch", "--cpu", "--nproc", "2", script, action)
    assert exit_code == code, errors
    assert errors == f"\nrank 1 on {socket.gethostname()} failed first ({reason})\n"


@pytest.mark.slow
def test_a_failure_is_reported_before_a_restart_and_the_cause_of_the_last_failure_is_found(
    tmp_path,
):
    """Attempt 0 ends by an exception; in attempt 1 rank 0 fails because rank 1 left."""
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    logs = tmp_path / "logs"
    options = ["--cpu", "--nproc", "2", "--max-restarts", "1", "--log-dir", str(logs)]
    code, out, errors = run_command("launch", *options, "--seed", "5", str(script), "x")
    assert (code, out) == (7, ""), errors
    host = socket.gethostname()
    assert errors.count("Traceback") == errors.count("ValueError: bad sample") == 1
    assert f"rank 1 on {host} failed first (exit code 1)" in errors
    assert "restarting all ranks; restarts left: 0" in errors
    assert f"rank 1 on {host} failed first (exit code 7)" in errors
    stderr = "".join(path.read_text() for path in logs.rglob("stderr.log"))
    assert stderr.count("[rank1]: ValueError: bad sample") == 1
    stdout = "".join(path.read_text() for path in logs.rglob("stdout.log"))
    expected = sorted(2 * [f"rank {rank} of 2 on cpu: 5 ['x']" for rank in range(2)])
    assert sorted(stdout.splitlines()) == expected


def test_logs_are_written_and_printed_only_with_tee(script, tmp_path):
    for options, num_lines in (([], 0), (["--tee"], 2)):
        logs = tmp_path / f"logs{num_lines}"
        words = ["--cpu", "--nproc", "2", "--log-dir", str(logs), *options, script, "print"]
        code, out, errors = run_command("launch", *words)
        assert (code, len(out.splitlines())) == (0, num_lines), errors
        lines = [path.read_text() for path in logs.rglob("stdout.log")]
        assert sorted(line.split(" of")[0] for line in lines) == ["rank 0", "rank 1"]


@pytest.fixture
def start(script):
    """Starts two ranks that wait, with more options of the launcher."""
    commands = []

    def run(action, *options):
        command = Command("launch", "--cpu", "--nproc", "2", *options, script, action)
        commands.append(command)
        assert [command.stdout.readline() for _ in range(2)] == ["waiting\n"] * 2
        return command

    yield run
    for command in commands:
        command.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_which_save_and_are_not_restarted(start, number):
    command = start("preempt", "--max-restarts", "2")
    command.send_signal(number)
    message = "preempted: a checkpoint is saved; run the same command to resume (exit code 75)\n"
    assert command.wait() == (75, "", message)


LINES = {signal.SIGINT: "interrupted\n", signal.SIGHUP: "ended by SIGHUP\n"}


@pytest.mark.parametrize("number", LINES)
def test_a_signal_ends_ranks_without_a_context_and_prints_one_line(start, number):
    command = start("idle")
    command.send_signal(number)
    assert command.wait() == (128 + number, "", LINES[number])


@pytest.mark.slow  # PyTorch's agent waits 30 seconds before it kills a rank
def test_a_second_signal_ends_ranks_that_ignore_the_first(start):
    command = start("stubborn")
    command.send_signal(signal.SIGTERM)
    assert command.stdout.readline() == "signal\n"
    command.send_signal(signal.SIGTERM)
    code, _, errors = command.wait()
    assert (code, errors) == (128 + signal.SIGTERM, "ended by SIGTERM\n")


def test_an_executable_that_cannot_start_is_one_message(tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"\x00")
    program.chmod(0o755)
    for nproc in ("1", "2"):
        words = ["--cpu", "--nproc", nproc, "--no-python", str(program)]
        code, out, errors = run_command("launch", *words)
        assert (code, out, "Traceback" in errors) == (2, "", False), errors
        assert "Exec format error" in errors


def test_a_port_in_use_is_an_error_before_a_process_starts(script):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        words = ["launch", "--cpu", "--nproc", "2", "--main-port", port, script, "print"]
        out = CliRunner().invoke(main, words)
    assert (out.exit_code, out.stdout) == (2, "")
    assert "port is unavailable" in out.stderr


@pytest.mark.slow
def test_a_flag_that_contradicts_the_script_is_an_error(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import faccel\nprint(faccel.init(seed=1).config.seed)\n")
    assert run_command("launch", "--cpu", "--seed", "1", str(path))[1] == "1\n"
    code, _, errors = run_command("launch", "--cpu", "--seed", "2", str(path))
    assert code == 1
    assert "--seed 2, argument 1" in errors


@pytest.mark.slow
def test_faccel_test_reports_every_check():
    code, out, errors = run_command("test", "--cpu", "--nproc", "2", "--json")
    assert code == 0, errors
    report = json.loads(out)
    assert (report["failed"], report["where"]) == (0, "2 ranks on cpu")
    names = ["collectives", "data order", "training", "checkpoint", "bandwidth"]
    assert [name for name in names if report["checks"][name]["passed"]] == names


@pytest.mark.slow
def test_faccel_test_prints_a_line_for_each_check_and_a_summary():
    code, out, errors = run_command("test", "--cpu", "--nproc", "2")
    assert code == 0, errors
    lines = out.splitlines()
    names = ["collectives", "data order", "training", "checkpoint", "bandwidth"]
    assert [line.split("  ")[0] for line in lines[:-1]] == names
    assert lines[-1] == "all checks passed on 2 ranks on cpu"
    report = json.loads(run_command("test", "--cpu", "--json")[1])
    assert report["failed"] == 0


def test_the_environment_of_this_process_is_unchanged():
    assert "FACCEL_LAUNCH" not in os.environ
