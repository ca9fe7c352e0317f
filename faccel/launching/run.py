"""Runs a launch with `torch.distributed.run` in this process, and reports the first failure."""

from __future__ import annotations

import ast
import errno
import functools
import os
import secrets
import shutil
import signal
import socket
import sys
import time
import tokenize
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from faccel.config import PREFIX
from faccel.errors import JoinError, LaunchError
from faccel.launching.command_end import CommandEnd, ending_by_signals
from faccel.launching.guard import guarded
from faccel.launching.hang_report import reporting_hangs
from faccel.launching.loopback import ADDRESS, loopback_variables
from faccel.launching.node_rendezvous import agree_on_run_id, join_nodes
from faccel.launching.rank_process import with_launcher
from faccel.launching.spec import (
    LaunchSpec,
    check_complete,
    environment_of,
    rendezvous_address,
    torchrun_arguments,
)
from faccel.observe.rank_file import FOLDER, LAUNCH_FILE, write
from faccel.runtime.excepthook import CONSEQUENCES
from faccel.runtime.listener import bind
from faccel.runtime.private_folder import private_folder
from faccel.small_file import kind_of

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from faccel.launching.agent import Failures

_RUN_DIR = f"{PREFIX}RUN_DIR"
_MAX_SCRIPT_BYTES = 10_000_000
_PYTHON: Mapping[str, tuple[str, ...]] = {
    "script": (sys.executable,),
    "module": (sys.executable, "-m"),
    "executable": (),
}


def run(spec: LaunchSpec, env: Mapping[str, str]) -> int:
    """Run the command of `spec` in its processes and return the exit code.

    A single process replaces this one.

    Effects: ambient. Starts processes.

    Returns:
        0, or the exit code of the process that failed first; 128 + signal if a signal ended it.

    Raises:
        LaunchError: The command does not exist, or its port is in use.
        JoinError: The nodes did not complete their rendezvous.
    """
    check_complete(spec)
    _check(spec)
    # A copy: the environment of the caller is an argument.
    env = {**env, **environment_of(spec, env, os.cpu_count() or 1)}
    if spec.is_single_process:
        _replace_process(spec, env)
    if spec.nnodes == "1":
        env |= loopback_variables(env)
    os.environ.update(env)  # the agent copies it for the ranks
    return _supervise(spec)


def _check(spec: LaunchSpec) -> None:
    """Raise once what each rank would raise."""
    command = spec.command[0]
    if spec.kind == "script":
        _check_script(command)
    # A module is not checked: importing its package would execute code.
    if spec.kind == "executable" and shutil.which(command) is None:
        raise LaunchError(
            "the executable does not exist", got=f"`{command}`", fix="name one on the PATH"
        )
    if spec.log_dir is not None:
        _check_log_dir(spec.log_dir)
    # only node 0 serves the port; on one node the rank is None
    if spec.main_port is not None and not spec.node_rank:
        host = ADDRESS
        if spec.nnodes != "1":
            host, _ = rendezvous_address(spec)
        _check_port(host, spec.main_port)


def _check_log_dir(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise LaunchError(
            "the folder for logs cannot be created",
            got=f"--log-dir {path}: {error.strerror}",
            fix="name a folder in a writable place",
        ) from None


def _check_port(host: str, port: int) -> None:
    try:
        bind(host, port).close()
    except OSError as error:
        # `join_nodes` reports an address that is not one of this node.
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            return
        raise LaunchError(
            "the port is unavailable",
            got=f"--main-port {port}: {error.strerror}",
            fix="name another port; on one node, remove `--main-port`",
        ) from None


def _check_script(script: str) -> None:
    fix = "name a script, `-m` and a module, or `--no-python` and an executable"
    if not os.path.exists(script):
        raise LaunchError("the script does not exist", got=f"`{script}`", fix=fix)
    # A device or a FIFO may have no end, and each rank would read it again.
    kind = kind_of(script)
    if kind is not None:
        raise LaunchError("the script must be a regular file", got=f"`{script}`, {kind}", fix=fix)
    num_bytes = os.path.getsize(script)
    if num_bytes > _MAX_SCRIPT_BYTES:
        raise LaunchError(
            f"the script is larger than {_MAX_SCRIPT_BYTES // 10**6} MB",
            got=f"`{script}` of {num_bytes // 10**6} MB",
            fix=fix,
        )
    _check_syntax(script)


def _check_syntax(script: str) -> None:
    try:
        with tokenize.open(script) as file:  # decodes as Python does
            ast.parse(file.read(), script)
    except SyntaxError as error:
        raise LaunchError(
            "the script has a syntax error",
            got=f"{error.msg} at {error.filename or script}:{error.lineno}",
            fix="fix that line",
        ) from None
    except OSError as error:
        raise LaunchError(
            "the script cannot be read",
            got=f"`{script}`: {error.strerror}",
            fix="check its path and permissions",
        ) from None


def _replace_process(spec: LaunchSpec, env: Mapping[str, str]) -> NoReturn:
    words = [*_PYTHON[spec.kind], *spec.command]
    sys.stdout.flush()  # `exec` drops buffered output
    sys.stderr.flush()
    try:
        os.execvpe(words[0], words, dict(env))
    except OSError as error:
        raise _start_error(spec, error) from None


def _start_error(spec: LaunchSpec, error: OSError) -> LaunchError:
    return LaunchError(
        "the command cannot be started",
        got=f"`{spec.command[0]}`: {error.strerror}",
        fix="check that the file is executable on this node",
    )


def _supervise(spec: LaunchSpec) -> int:
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError

    from faccel.launching.agent import silence_loggers, supervise
    from faccel.launching.torch_rendezvous import (
        OneNodeRendezvous,
        elastic_rendezvous,
        static_rendezvous,
    )

    silence_loggers()  # `_exit_code` prints the first failure
    arguments = torchrun.parse_args(torchrun_arguments(spec))
    with ExitStack() as stack:
        folder = None
        if arguments.log_dir is None:
            # torchrun would leave its temporary folder
            folder = arguments.log_dir = stack.enter_context(private_folder("faccel-launch-"))
        end = stack.enter_context(ending_by_signals(functools.partial(_remove, folder)))
        config, command, args = torchrun.config_from_args(arguments)
        assert isinstance(command, str)  # not a function
        command, args = with_launcher(command, args)
        store, run_id = None, secrets.token_hex(16)
        if spec.nnodes == "1":
            rendezvous = OneNodeRendezvous(run_id, spec.main_port or 0)
        else:
            store = join_nodes(spec)
            run_id = agree_on_run_id(spec, store, run_id)
            if spec.rdzv_endpoint is None:
                rendezvous = static_rendezvous(config, run_id)
            else:
                rendezvous = elastic_rendezvous(config, run_id, store)
        stack.enter_context(guarded(folder))
        run_dir = spec.flags.get("run_dir") or os.environ.get(_RUN_DIR)
        stack.enter_context(reporting_hangs(spec, run_dir))
        try:
            # Returns when all ranks have ended.
            failures, end_signal = supervise(
                config, command, args, _report_restart, rendezvous, end.handle
            )
            _check_started(failures)
        except SignalException as error:
            return end.report(error.sigval)
        except OSError as error:
            raise _start_error(spec, error) from None
        # After `join_nodes`: a node has ended, or restarts without this one.
        except RendezvousError as error:
            raise JoinError(
                "the nodes lost each other",
                got=f"{type(error).__name__}: {error}",
                fix="read the output of the other nodes, and start all nodes again",
            ) from None
        finally:
            del store  # until here: this node may serve the rendezvous
        if end_signal is not None and failures and _is_end(failures, end_signal):
            return end.report(end_signal)
        _record_first(failures, run_dir)
        return _exit_code(failures, end, is_single_node=spec.nnodes == "1")


def _record_first(failures: Failures, run_dir: object) -> None:
    """Write the first failure into an observed run folder, for `faccel why`."""
    # A rank that was killed has written nothing, and those that the agent ended neither.
    folder = Path(str(run_dir)) / FOLDER
    if not failures or run_dir is None or not folder.is_dir():
        return
    rank = _first(failures)
    failure = failures[rank]
    reason = f"exit code {failure.exitcode}"
    if failure.exitcode < 0:
        reason = f"signal {-failure.exitcode}"
    document = {"rank": rank, "reason": reason, "time_s": time.time()}
    with suppress(OSError):  # a full disk must not hide the failure
        write(folder / LAUNCH_FILE, document)


def _remove(folder: str | None) -> None:
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _is_end(failures: Failures, end_signal: int) -> bool:
    """Whether all failures come from the signal that ended the launch."""
    # A rank without a context gets SIGTERM, whatever the signal was.
    codes = {-end_signal, 128 + end_signal, -signal.SIGTERM}
    for failure in failures.values():
        if failure.exitcode not in codes and not _is_consequence(failure):
            return False
    return True


def _check_started(failures: Failures) -> None:
    """Raise the error of a rank that could not become its command."""
    for failure in failures.values():
        # PyTorch's annotation is `str`, and its error file has a dict.
        message: Any = failure.message
        if isinstance(message, dict) and "errno" in message:
            number = int(message["errno"])
            raise OSError(number, os.strerror(number))


def _exit_code(failures: Failures, end: CommandEnd, *, is_single_node: bool) -> int:
    """Return the exit code, and print the reason if it is not 0."""
    from faccel.launching.agent import is_preemption

    # The usual case prints nothing.
    if not failures:
        return 0
    end.restore_terminal()
    codes = {failure.exitcode for failure in failures.values()}
    if is_preemption(failures):
        code = max(codes)  # the other codes are negative: signals of the agent
        sys.stderr.write(
            f"preempted: a checkpoint is saved; run the same command to resume (exit code {code})\n"
        )
        return code
    text, code = _describe_first(failures, is_single_node=is_single_node)
    sys.stderr.write(f"\n{text}\n")
    return code


def _report_restart(failures: Failures, num_restarts_left: int) -> None:
    text, _ = _describe_first(failures, is_single_node=False)
    sys.stderr.write(f"\n{text}\nrestarting all ranks; restarts left: {num_restarts_left}\n")


def _is_consequence(failure: ProcessFailure) -> bool:
    """Whether a process failed because another one had failed."""
    if failure.exitcode == -signal.SIGTERM:  # sent by the agent
        return True
    message: object = failure.message
    if not isinstance(message, dict):
        return False
    return CONSEQUENCES.search(str(message.get("message", ""))) is not None


def _first(failures: Failures) -> int:
    """Return the rank whose failure caused the others."""
    # Causes before consequences, then the earliest. Clocks of one node are comparable.
    return min(failures, key=lambda r: (_is_consequence(failures[r]), failures[r].timestamp))


def _describe_first(failures: Failures, *, is_single_node: bool) -> tuple[str, int]:
    """Return a report of the failure that caused the others, and its exit code."""
    rank = _first(failures)
    failure = failures[rank]
    code, reason = failure.exitcode, f"exit code {failure.exitcode}"
    if code < 0:
        # as a shell reports it
        code, reason = 128 - failure.exitcode, f"signal {-failure.exitcode}"
    order = "failed first"
    if not is_single_node and _is_consequence(failure):
        order = "failed after a rank of another node"
    message: object = failure.message
    # A process that was killed, or an executable, leaves no traceback.
    traceback = ""
    if isinstance(message, dict):
        traceback = message.get("extraInfo", {}).get("py_callstack", "")
    report = f"rank {rank} on {socket.gethostname()} {order} ({reason})\n{traceback}"
    return report.rstrip("\n"), code
