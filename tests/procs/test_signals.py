"""Signals at random moments of a launch: each process ends, with one line and the right exit code.

`NUM_SIGNALS=60 pytest -m slow tests/procs/test_signals.py` tries as many moments.
"""

import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid

import attrs
import pytest

from tests.ranks import TIMEOUT_S

NUM_MOMENTS = int(os.environ.get("NUM_SIGNALS", "5"))
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
TARGETS = ("launcher", "group", "rank 0", "rank 1")
LIMIT_S = 5
# Names the processes of one launch in their environment.
VARIABLE = "TEST_LAUNCH"

SCRIPT = """
import sys, time
import torch, faccel

def write(text):
    sys.stdout.write(text + "\\n")  # one write, because the lines of ranks must not mix
    sys.stdout.flush()

write("imported")
with faccel.init() as ctx:
    model = faccel.wrap(torch.nn.Linear(4, 1), ctx)
    opt = faccel.wrap_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, ctx)
    scaler = faccel.init_scaler(ctx)
    write("training")
    end_s = time.monotonic() + 1
    while not faccel.agree(ctx, end=time.monotonic() > end_s).end:
        scaler = faccel.scaled_backward(model(torch.randn(8, 4)).mean(), scaler, ctx)
        _, scaler = faccel.optimizer_step(opt, scaler, ctx)
    write("closing")
write("closed")
"""


@attrs.frozen
class Moment:
    """A signal, its target, and when it is sent: after a state of the launch, and a delay."""

    signal: signal.Signals
    target: str
    after: str
    delay_s: float


def draw(number):
    """Return the moment of this number, always the same one."""
    generator = random.Random(number)
    # Seconds that each state lasts without other load.
    state, duration_s = generator.choice(
        [("started", 4.0), ("imported", 0.5), ("training", 1.0), ("closing", 0.2)]
    )
    target = generator.choice(TARGETS)
    return Moment(SIGNALS[number % len(SIGNALS)], target, state, generator.random() * duration_s)


def processes_of(name):
    """Return the processes of a launch that run, by their command."""
    processes = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended
            continue
        if f"{VARIABLE}={name}".encode() in environment and state != "Z":
            processes[int(folder.name)] = (environment, command)
    return processes


class Launch:
    """Two ranks below `faccel launch`, whose output is read in the background."""

    def __init__(self, script, folder):
        self.name = uuid.uuid4().hex
        self._folder = folder
        env = {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder), VARIABLE: self.name}
        command = [sys.executable, "-m", "faccel", "launch", "--cpu", "--nproc", "2", str(script)]
        self.process = subprocess.Popen(
            command,
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines, self.errors = [], []
        self._has_changed = threading.Condition()
        self._num_ended = 0
        self._readers = [
            threading.Thread(target=self._read, args=arguments)
            for arguments in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream, lines):
        with stream:
            for line in stream:
                with self._has_changed:
                    lines.append(line)
                    self._has_changed.notify()
        with self._has_changed:
            self._num_ended += 1
            self._has_changed.notify()

    def wait_for(self, state):
        """Return when a rank has printed the state, or the launcher handles signals."""
        if state != "started":
            with self._has_changed:
                self._has_changed.wait_for(lambda: self._has_printed(state), TIMEOUT_S)
            assert f"{state}\n" in self.lines, self.errors
            return
        while not self._handles_signals():
            assert self.process.poll() is None, self.errors

    def _has_printed(self, state):
        return self._num_ended == 2 or f"{state}\n" in self.lines

    def _handles_signals(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    def send(self, moment):
        """Send the signal; return whether the target existed."""
        try:
            if moment.target == "launcher":
                os.kill(self.process.pid, moment.signal)
            elif moment.target == "group":
                os.killpg(self.process.pid, moment.signal)
            else:
                os.kill(self._pid_of(moment.target.split()[1]), moment.signal)
        except ProcessLookupError:
            return False
        return True

    def _pid_of(self, rank):
        deadline = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            for pid, (environment, _) in processes_of(self.name).items():
                if f"\0RANK={rank}\0".encode() in environment:
                    return pid
        raise ProcessLookupError

    def wait_until_gone(self, timeout_s):
        """Return the commands that still run after the timeout."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.process.poll()
            remaining = processes_of(self.name)
            if not remaining:
                break
            threading.Event().wait(0.05)
        for pid in remaining:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for reader in self._readers:
            reader.join()
        return [command for _, command in remaining.values()]


def check(moment, launch, sent):
    code = launch.process.returncode
    errors = "".join(launch.errors)
    if code == 0:  # all ranks had ended
        assert not sent or launch.lines.count("closed\n") == 2, launch.lines
        return
    number = moment.signal
    line = "interrupted\n"
    if number != signal.SIGINT:
        line = f"ended by {number.name}\n"
    expected_code = 128 + number
    if moment.target.startswith("rank"):
        reason = f"signal {int(number)}"
        line = f"\n{moment.target} on {socket.gethostname()} failed first ({reason})\n"
        if number == signal.SIGINT and "training\n" not in launch.lines:
            # Only one rank got it, without a launcher's help: Python prints what was imported.
            errors = re.sub(r"^Traceback.*?^KeyboardInterrupt\n", "", errors, flags=re.S | re.M)
    elif number == signal.SIGKILL:
        line, expected_code = "", -number
    assert (code, errors) == (expected_code, line), launch.lines


@pytest.mark.slow
@pytest.mark.parametrize("number", range(NUM_MOMENTS))
def test_a_signal_at_a_random_moment_ends_every_process(tmp_path, number):
    script, folder = tmp_path / "train.py", tmp_path / "temporary"
    script.write_text(SCRIPT)
    folder.mkdir()
    moment = draw(number)
    launch = Launch(script, folder)
    launch.wait_for(moment.after)
    threading.Event().wait(moment.delay_s)
    sent = launch.send(moment)
    started_s = time.monotonic()
    remaining = launch.wait_until_gone(LIMIT_S * 4)
    duration_s = time.monotonic() - started_s
    print(moment, f"{duration_s:.1f} s", launch.process.returncode, launch.errors, launch.lines)
    assert not remaining
    if moment.signal != signal.SIGKILL:
        assert not list(folder.glob("faccel-launch-*"))
    check(moment, launch, sent)
