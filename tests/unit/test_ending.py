"""`sys.excepthook` with several contexts, and with hooks of other libraries."""

import json
import multiprocessing
import os
import resource
import signal
import sys

import pytest

import faccel
from faccel.launching import rank_process
from faccel.launching.command_end import ending_by_signals
from faccel.runtime.excepthook import ExceptHook

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def hooks():
    """An `ExceptHook`, and the exception types that reached the hook that it replaces."""
    previous, calls = sys.excepthook, []
    sys.excepthook = lambda error_type, error, traceback: calls.append(error_type)
    yield ExceptHook(), calls
    sys.excepthook = previous


def install_wrapping_hook():
    """Install a hook that calls the previous one, as torch and other libraries do."""
    previous = sys.excepthook
    sys.excepthook = lambda error_type, error, traceback: previous(error_type, error, traceback)


def raise_in_worker(pipe, calls):
    for error in (ConnectionResetError("by the rank"), ValueError("of the worker")):
        sys.excepthook(type(error), error, None)
    pipe.send(calls)


def test_a_forked_process_does_not_report_for_its_rank(hooks, tmp_path):
    hook, calls = hooks
    error_file = tmp_path / "error.json"
    hook.install(1, 0, 2, {"TORCHELASTIC_ERROR_FILE": str(error_file)})
    receiver, sender = FORK.Pipe(duplex=False)
    worker = FORK.Process(target=raise_in_worker, args=(sender, calls))
    worker.start()
    sender.close()
    worker.join()
    hook.uninstall(1, None)
    assert receiver.recv() == [ValueError]
    assert not error_file.exists()


def test_the_last_context_restores_the_previous_hook(hooks):
    hook, _ = hooks
    previous = sys.excepthook
    hook.install(1, 0, 1, {})
    hook.install(2, 0, 1, {})
    hook.uninstall(1, None)
    assert sys.excepthook is not previous
    hook.uninstall(2, None)
    assert sys.excepthook is previous


@pytest.mark.parametrize("error", [None, ValueError()])
def test_wrapped_hooks_never_call_each_other_in_a_circle(hooks, error):
    hook, calls = hooks
    for _ in range(3):
        hook.install(1, 0, 1, {})
        install_wrapping_hook()
        hook.install(2, 0, 1, {})
        hook.uninstall(1, error)
        install_wrapping_hook()
        hook.uninstall(2, error)
    hook.install(3, 0, 1, {})
    sys.excepthook(ValueError, ValueError(), None)
    assert calls == [ValueError]


def test_ctrl_c_in_a_single_process_prints_one_line_and_returns(hooks, capsys):
    hook, calls = hooks
    hook.install(1, 0, 1, {})
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "interrupted\n"
    assert calls == []
    hook.uninstall(1, None)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert calls == [KeyboardInterrupt]


def test_ctrl_c_while_a_context_closes_prints_one_line(hooks, capsys):
    def interrupt():
        raise KeyboardInterrupt

    _, calls = hooks
    ctx = faccel.init(env={})
    ctx.lifetime.on_close(interrupt)  # as a background save that `shutdown` waits for
    with pytest.raises(KeyboardInterrupt) as caught:
        faccel.shutdown(ctx)
    sys.excepthook(caught.type, caught.value, caught.tb)
    assert capsys.readouterr().err == "interrupted\n"
    assert calls == []


def test_the_command_line_leaves_an_ignored_signal_ignored_as_nohup_asks():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_by_signals(lambda: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGHUP, previous)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def hook_with_a_limit(path, num_bytes):
    """Report an error of 1000 characters while a file can have `num_bytes`, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.excepthook = lambda error_type, error, traceback: None
    ExceptHook().install(1, 0, 1, {"TORCHELASTIC_ERROR_FILE": path})
    sys.excepthook(ValueError, ValueError("x" * 1000), None)


def start_with_a_limit(path, num_bytes):
    """Start a command that does not exist, as `faccel launch` does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    words = ["-I", "-S", rank_process.__file__, str(os.getppid()), "missing/" + "x" * 200]
    os.execve(sys.executable, ["python", *words], {"TORCHELASTIC_ERROR_FILE": path})


@pytest.mark.parametrize("report", [hook_with_a_limit, start_with_a_limit])
def test_the_file_with_the_error_of_a_rank_is_complete_or_missing(tmp_path, report):
    for num_bytes in (0, 1, 100, 100_000):
        path = tmp_path / f"{num_bytes}.json"
        process = FORK.Process(target=report, args=(str(path), num_bytes))
        process.start()
        process.join()
        if path.exists():
            assert json.loads(path.read_text())["message"]
        assert path.exists() == (num_bytes == 100_000)
