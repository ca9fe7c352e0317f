"""What an executable of `tests.forked_python` does after its first line, which sets `SOCKET`.

It asks the server for a fork that has these arguments, forwards signals to the fork, and ends as
the fork has ended. It imports the standard library only, so that it takes milliseconds.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def forward(number, pid):
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, number)


def main(address):
    handled = [n for n in FORWARDED if signal.getsignal(n) is not signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, handled)  # until there is a fork that gets them
    server = socket.socket(socket.AF_UNIX)
    server.connect(address)
    request = {"args": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}
    request["ignored"] = [int(n) for n in set(FORWARDED) - set(handled)]
    text = json.dumps(request).encode()
    socket.send_fds(server, [struct.pack("i", len(text))], [0, 1, 2])
    server.sendall(text)
    (pid,) = struct.unpack("i", server.recv(4))
    for number in handled:
        signal.signal(number, lambda number, frame: forward(number, pid))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
    (status,) = struct.unpack("i", server.recv(4))
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the fork has written the core file
        if code != -signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(SOCKET)  # noqa: F821
