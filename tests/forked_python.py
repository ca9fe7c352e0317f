"""Helper: an executable that runs scripts as Python does, in forks of the server of `tests.ranks`.

A launcher starts it with `--no-python`. The forks have imported torch, so that a start takes
milliseconds of the CPU, and not seconds. A test that uses it for many ranks should run the script
once with Python itself: a fork does not find that a script lacks an import.
"""

import atexit
import functools
import importlib
import json
import multiprocessing
import os
import pathlib
import runpy
import selectors
import signal
import socket
import struct
import sys
import tempfile
import threading

import numpy as np
import torch

from tests import forked_python_client as client
from tests.ranks import SERVER


@functools.cache
def forked_python(*preload):
    """Return the path of the executable. Its forks have imported the modules `preload`, too."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path, address = pathlib.Path(folder.name, "python"), f"{folder.name}/socket"
    source = pathlib.Path(client.__file__).read_text()
    path.write_text(f"#!{sys.executable} -IS\nSOCKET = {address!r}\n{source}")
    path.chmod(0o700)
    receiver, sender = SERVER.Pipe(duplex=False)
    SERVER.Process(target=_serve, args=(address, preload, sender), daemon=True).start()
    sender.close()
    assert receiver.recv() == "ready"
    return str(path)


def faccel_launch(*options, preload=()):
    """Return the first words of a `faccel launch` of a script, whose ranks are forks, too."""
    python = forked_python(*preload)
    return [python, "-m", "faccel", "launch", "--cpu", *options, "--no-python", python]


def _serve(address, preload, pipe):
    """Fork for each client until the process of the tests ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal of the tests
    for name in preload:
        importlib.import_module(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, lambda: _Fork(listener, selector))
    selector.register(multiprocessing.parent_process().sentinel, selectors.EVENT_READ, sys.exit)
    pipe.send("ready")
    pipe.close()
    while True:
        for key, _ in selector.select():
            key.data()


class _Fork:
    """A fork that runs what a client asks for, as its server waits for it."""

    def __init__(self, listener, selector):
        self._client, _ = listener.accept()
        request, descriptors = _read(self._client)
        self._pid = os.fork()
        if self._pid == 0:
            _run(request, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        self._client.sendall(struct.pack("i", self._pid))
        self._descriptor = os.pidfd_open(self._pid)
        self._selector = selector
        selector.register(self._descriptor, selectors.EVENT_READ, self._end)
        selector.register(self._client, selectors.EVENT_READ, self._end)

    def _end(self):
        """Report the end of the fork to its client; end the fork if it is the client that ended."""
        if self._descriptor is None:  # both have ended
            return
        os.kill(self._pid, signal.SIGKILL)  # nothing, for one that has ended
        _, status = os.waitpid(self._pid, 0)
        self._selector.unregister(self._descriptor)
        self._selector.unregister(self._client)
        os.close(self._descriptor)
        self._descriptor = None
        self._client.send(struct.pack("i", status), socket.MSG_NOSIGNAL)
        self._client.close()


def _read(connection):
    """Return the request of a client, and its standard streams."""
    head, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    text = b""
    while len(text) < struct.unpack("i", head)[0]:
        text += connection.recv(1 << 16)
    return json.loads(text), descriptors


def _run(request, descriptors):
    """Become the process that a client asks for."""
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for number in client.FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    _become_main_process()
    code = _code_of(request["args"])
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _become_main_process():
    """Undo what distinguishes a process of the server of `tests.ranks` from one of a user."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    multiprocessing.process._parent_process = None
    process = multiprocessing.current_process()
    process.name = "MainProcess"
    process._config["daemon"] = False  # it may have children
    multiprocessing.set_start_method(None, force=True)  # the default of the system
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    np.random.seed()


def _code_of(args):
    """Run `script ...` or `-m module ...`; return the exit code."""
    try:
        if args[0] == "-m":
            sys.argv = args[1:]
            sys.path.insert(0, os.getcwd())
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = args
            sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])))
            runpy.run_path(args[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, int | None):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0
