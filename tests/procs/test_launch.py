"""`faccel launch` as users call it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

SCRIPT = """
import os, signal, sys, time
import faccel, torch

def say(text):
    sys.stdout.write(text + "\\n")  # in one write: torchrun starts python unbuffered
    sys.stdout.flush()

with faccel.init() as ctx:
    say(f"rank {ctx.rank} of {ctx.world_size} on {ctx.device.type}: {ctx.config.seed} {sys.argv[1:]}")
    if "fail" in sys.argv and ctx.rank == 1:
        raise ValueError("bad sample")
    if "exit" in sys.argv and ctx.rank == 1:
        sys.exit(7)
    if "kill" in sys.argv and ctx.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if "wait" in sys.argv:
        told = faccel.preemption(ctx)
        say("waiting")
        while not faccel.agree(ctx, stop=told.requested).stop:
            time.sleep(0.05)
        sys.exit(told.exit_code)
    faccel.barrier(ctx)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def launch(*args, **env):
    command = [sys.executable, "-m", "faccel", "launch", *args]
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False, timeout=120)


def test_two_ranks_on_the_cpu_with_flags_over_the_environment(script):
    out = launch("--cpu", "--nproc", "2", "--seed", "5", script, "--seed", "x", FACCEL_SEED="4")
    assert out.returncode == 0, out.stderr
    lines = sorted(out.stdout.splitlines())
    assert lines == [f"rank {rank} of 2 on cpu: 5 ['--seed', 'x']" for rank in range(2)]
    assert out.stderr == ""


def test_a_single_process_a_module_and_a_program(script, tmp_path):
    assert launch("--cpu", script).stdout == "rank 0 of 1 on cpu: 0 []\n"
    assert launch("--cpu", "-m", "this").stdout.startswith("The Zen")
    assert launch("--cpu", "--no-python", "echo", "-n", "x").stdout == "x"
    both = launch("--cpu", "--nproc", "2", "--no-python", sys.executable, script)
    assert len(both.stdout.splitlines()) == 2, both.stderr


@pytest.mark.parametrize(("how", "code", "said"), [("fail", 1, "ValueError: bad sample"), ("exit", 7, "exit code 7"),
                                                  ("kill", 137, "signal 9")])  # fmt: skip
def test_the_first_failure_is_shown_once_and_gives_the_exit_code(script, how, code, said):
    out = launch("--cpu", "--nproc", "2", script, how)
    assert out.returncode == code, out.stderr
    assert out.stderr.count("failed first") == 1
    assert f"rank 1 on {socket.gethostname()} failed first" in out.stderr
    assert said in out.stderr
    assert out.stderr.count("Traceback") == (how == "fail")


def test_signals_reach_the_ranks_and_their_exit_code_comes_back(script):
    command = [sys.executable, "-m", "faccel", "launch", "--cpu", "--nproc", "2", script, "wait"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(4)]
    assert lines.count("waiting\n") == 2
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (75, 128 + signal.SIGTERM), errors
    assert time.monotonic() - began < 30


def test_a_port_that_is_taken_is_an_error_before_anything_starts(script):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        out = launch("--cpu", "--nproc", "2", "--main-port", str(other.getsockname()[1]), script)
    assert out.returncode == 2
    assert "port cannot be used" in out.stderr
    assert out.stdout == ""


def test_what_script_and_launcher_say_must_agree(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("import faccel\nprint(faccel.init(seed=1).config.seed)\n")
    assert launch("--cpu", "--seed", "1", str(path)).stdout == "1\n"
    out = launch("--cpu", "--seed", "2", str(path))
    assert out.returncode == 1
    assert "--seed 2, argument 1" in out.stderr


def test_logs_are_kept_and_printed_where_asked(script, tmp_path):
    out = launch("--cpu", "--nproc", "2", "--log-dir", str(tmp_path / "logs"), script)
    assert out.returncode == 0, out.stderr
    assert out.stdout == ""
    kept = [path.read_text() for path in (tmp_path / "logs").rglob("stdout.log")]
    assert sorted(text.split(" of")[0] for text in kept) == ["rank 0", "rank 1"]


def faccel_test(*args):
    command = [sys.executable, "-m", "faccel", "test", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_machine_is_tested_with_a_line_for_each_check_and_a_verdict():
    out = faccel_test("--cpu", "--nproc", "2")
    assert out.returncode == 0, out.stderr
    lines = out.stdout.splitlines()
    names = ["collectives", "data order", "training", "checkpoint", "bandwidth"]
    assert [line.split("  ")[0] for line in lines[:-1]] == names
    assert lines[-1] == "all checks passed on 2 ranks on cpu"
    told = json.loads(faccel_test("--cpu", "--json").stdout)
    assert told["failed"] == 0
    assert told["checks"]["checkpoint"]["passed"]
