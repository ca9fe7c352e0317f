"""Helper: runs `faccel ...` in a real process, forked from the server of `tests.ranks`.

It behaves as `python -m faccel ...`, without the seconds that importing torch takes.
"""

import os
import sys
import threading

from tests.ranks import SERVER, TIMEOUT_S


def _run_command(arguments, env, stdout, stderr, terminal):
    from faccel.__main__ import main

    os.environ.clear()
    os.environ.update(env)
    if terminal is None:
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
    else:
        os.setsid()  # so that the terminal becomes the controlling one, which sends Ctrl-C
        descriptor = os.open(terminal, os.O_RDWR)
        for number in range(3):
            os.dup2(descriptor, number)
        # multiprocessing has replaced it by /dev/null
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    # The former output may have been a file, which is seekable; a pipe or terminal is not.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["faccel", *arguments]
    code = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Command:
    """A running command. `stdout` is a text file; `wait()` returns the exit code and both outputs.

    Args:
        arguments: The words after `faccel`.
        env: Additions to the environment.
        terminal: Path of a pseudo-terminal to use instead of pipes.
    """

    def __init__(self, *arguments, env=None, terminal=None):
        receivers, senders = [], []
        for _ in range(2):
            receiver, sender = SERVER.Pipe(duplex=False)
            receivers.append(receiver)
            senders.append(sender)
        self._process = SERVER.Process(
            target=_run_command,
            args=([*arguments], {**os.environ, **(env or {})}, *senders, terminal),
        )
        self._process.start()
        for sender in senders:
            sender.close()
        self.stdout, self._stderr = (os.fdopen(os.dup(r.fileno())) for r in receivers)
        self._errors = []
        # Read in the background: a full pipe would block the command.
        self._reader = threading.Thread(target=lambda: self._errors.append(self._stderr.read()))
        self._reader.start()

    @property
    def pid(self):
        return self._process.pid

    def is_running(self):
        """Return whether the command has not ended."""
        return self._process.is_alive()

    def send_signal(self, number):
        """Send a signal to the command, not to its ranks."""
        os.kill(self._process.pid, number)

    def wait(self):
        """Return exit code, the rest of the output, and the errors."""
        output = self.stdout.read()
        self._process.join(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        self.stdout.close()
        self._stderr.close()
        assert self._process.exitcode is not None, "the command has not ended"
        return self._process.exitcode, output, "".join(self._errors)

    def kill(self):
        """End the command, if it still runs."""
        self._process.kill()


def run_command(*arguments, **env):
    """Run `faccel` with these arguments; return exit code, output and errors."""
    return Command(*arguments, env=env).wait()
