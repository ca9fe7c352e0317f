"""`faccel launch` as users call it."""

import json
import os
import signal
import socket
import subprocess
import sys

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
    if "leave" in sys.argv and ctx.rank == 1:
        os._exit(7)
    if "once" in sys.argv and ctx.rank == 1 and ctx.topology.attempt == 0:
        raise ValueError("bad sample")
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: say("told") if ctx.rank == 0 else None)
        say("waiting")
        while True:
            time.sleep(1)
    if "sleep" in sys.argv:
        say("waiting")
        time.sleep(100)
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
    return subprocess.run(
        command, env=os.environ | env, capture_output=True, text=True, check=False, timeout=120
    )


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


@pytest.fixture
def waiting(script):
    """Two ranks that wait until they are told to end, started with more options."""
    started = []

    def start(*options, how="wait"):
        command = [
            sys.executable,
            "-m",
            "faccel",
            "launch",
            "--cpu",
            "--nproc",
            "2",
            *options,
            script,
            how,
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines.count("waiting\n") == 2
        return process

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_reach_the_ranks_which_save_and_are_not_started_again(waiting, sent):
    process = waiting("--max-restarts", "2")
    process.send_signal(sent)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, ""), errors
    assert (
        errors
        == "preempted: a checkpoint is saved; run the same command to resume (exit code 75)\n"
    )


@pytest.mark.slow
def test_a_second_signal_ends_ranks_that_do_not_end(waiting):
    process = waiting(how="stubborn")
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "told\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


def test_ctrl_c_is_passed_on_and_is_one_line(waiting):
    process = waiting(how="sleep")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted\n")


def test_a_rank_that_leaves_is_named_and_not_the_one_that_waited_for_it(script):
    out = launch("--cpu", "--nproc", "2", script, "leave")
    assert out.returncode == 7, out.stderr
    assert f"rank 1 on {socket.gethostname()} failed first (exit code 7)" in out.stderr
    assert "Traceback" not in out.stderr


def test_a_failure_before_a_restart_is_told_and_is_in_the_log(script, tmp_path):
    out = launch(
        "--cpu",
        "--nproc",
        "2",
        "--max-restarts",
        "1",
        "--log-dir",
        str(tmp_path / "logs"),
        script,
        "once",
    )
    assert out.returncode == 0, out.stderr
    assert out.stderr.count("ValueError: bad sample") == 1
    assert "failed first (exit code 1)" in out.stderr
    assert "restarting all ranks; restarts left: 0" in out.stderr
    kept = "".join(path.read_text() for path in (tmp_path / "logs").rglob("stderr.log"))
    assert kept.count("[rank1]: ValueError: bad sample") == 1


def test_what_cannot_be_started_is_one_message(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1\nif x\n")
    program = tmp_path / "program"
    program.write_bytes(b"\x00")
    program.chmod(0o755)
    for words, said in (
        (["--nproc", "2", str(bad)], "bad.py:2"),
        (["--nproc", "2", "--log-dir", "/proc/none", __file__], "--log-dir /proc/none"),
        (["--nproc", "2", "--no-python", str(program)], "Exec format error"),
        (["--nproc", "1", "--no-python", str(program)], "Exec format error"),
        (["--nproc", "2", "--tee", __file__], "add `--log-dir DIR`"),
        (["--nproc", "2", "--device", "cuda", __file__], "no accelerator"),
        (["--nproc", "2", "--mesh", "dp_shard=3", __file__], "start 3 processes"),
        (["--config", "none.yaml", __file__], "cannot be read"),
    ):
        out = launch("--cpu", *words) if "--device" not in words else launch(*words)
        assert (out.returncode, out.stdout, "Traceback" in out.stderr) == (2, "", False), out.stderr
        assert said in out.stderr
    for env in ({"FACCEL_SED": "1"}, {"FACCEL_SEED": "x"}, {"FACCEL_CONFIG": "none.yaml"}):
        out = launch("--cpu", "--nproc", "2", __file__, **env)
        assert (out.returncode, out.stdout, "Traceback" in out.stderr) == (2, "", False), (
            env,
            out.stderr,
        )


def test_nothing_is_left_in_the_folder_of_temporary_files(script, tmp_path):
    out = launch("--cpu", "--nproc", "2", script, TMPDIR=str(tmp_path))
    assert out.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


def test_a_port_that_is_taken_is_an_error_before_anything_starts(script):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        out = launch("--cpu", "--nproc", "2", "--main-port", str(other.getsockname()[1]), script)
    assert out.returncode == 2
    assert "port is unavailable" in out.stderr
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
