"""Running a launch: by torch.distributed.run, in this process; the first failure is shown once."""

from __future__ import annotations

import ast
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import tokenize
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NoReturn

from faccel.errors import JoinError, LaunchError
from faccel.launching.node_rendezvous import join
from faccel.launching.spec import LaunchSpec, additions, arguments, check_meeting


def run(spec: LaunchSpec, env: Mapping[str, str]) -> int:
    """Run the command of `spec` on every process that it asks for; return the exit code.

    Effects: ambient. Starts processes. The code is that of the first process that failed, 128 and the signal where one
    ended it. Where there is a single process, it takes the place of this one.

    Raises:
        LaunchError: The command is not there, or its port is taken.
        JoinError: Several machines did not come together.
    """
    check_meeting(spec)
    _check(spec)
    env = {**env, **additions(spec, env, os.cpu_count() or 1)}
    if spec.is_single_process:
        _become(spec, env)
    os.environ.update(env)
    return _supervise(spec)


def _check(spec: LaunchSpec) -> None:
    first = spec.command[0]
    if spec.kind == "script" and not os.path.isfile(first):
        fix = "name a script, `-m` and a module, or `--no-python` and a program"
        raise LaunchError("the script is not there", got=f"`{first}`", fix=fix)
    if spec.kind == "script":
        _check_parses(first)
    if spec.kind == "executable" and shutil.which(first) is None:
        raise LaunchError(
            "the program is not there", got=f"`{first}`", fix="name one that is on the PATH"
        )
    if spec.log_dir is not None:
        try:
            os.makedirs(spec.log_dir, exist_ok=True)
        except OSError as error:
            got = f"--log-dir {spec.log_dir}: {error.strerror}"
            raise LaunchError(
                "logs cannot be kept there", got=got, fix="name a folder that can be made"
            ) from None
    if spec.main_port is not None and not spec.node_rank:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", spec.main_port))
            except OSError as error:
                got = f"--main-port {spec.main_port}: {error.strerror}"
                raise LaunchError(
                    "the port cannot be used", got=got, fix="name another, or none on one machine"
                ) from None


def _check_parses(script: str) -> None:
    """Refuse a script that python cannot read, once instead of on every rank."""
    try:
        with tokenize.open(script) as file:
            ast.parse(file.read(), script)
    except SyntaxError as error:
        got = f"{error.msg} at {error.filename or script}:{error.lineno}"
        raise LaunchError("the script is not Python", got=got, fix="mend that line") from None
    except OSError as error:
        raise LaunchError(
            "the script cannot be read", got=f"`{script}`: {error.strerror}", fix="name another"
        ) from None


def _become(spec: LaunchSpec, env: Mapping[str, str]) -> NoReturn:
    prefix = {"script": [sys.executable], "module": [sys.executable, "-m"], "executable": []}[
        spec.kind
    ]
    words = [*prefix, *spec.command]
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(words[0], words, dict(env))
    except OSError as error:
        raise _cannot_start(spec, error) from None


def _cannot_start(spec: LaunchSpec, error: OSError) -> LaunchError:
    return LaunchError(
        "it cannot be started", got=f"`{spec.command[0]}`: {error.strerror}", fix="mend the program"
    )


def _supervise(spec: LaunchSpec) -> int:
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.rendezvous import RendezvousError

    from faccel.launching.agent import supervise

    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # what it says is said below
    given = torchrun.parse_args(arguments(spec))
    if given.standalone:
        given.rdzv_backend, given.rdzv_endpoint, given.rdzv_id = (
            "c10d",
            "localhost:0",
            f"faccel-{os.getpid()}",
        )
    with ExitStack() as stack:
        if given.log_dir is None:
            given.log_dir = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="faccel-launch-")
            )
        config, command, rest = torchrun.config_from_args(given)
        meeting = (
            join(spec) if spec.nnodes != "1" else None
        )  # kept: this may be the machine that all meet at
        try:
            failures, asked = supervise(config, command, rest, _tell)
        except SignalException as error:
            return 128 + int(error.sigval)
        except OSError as error:
            raise _cannot_start(spec, error) from None
        except RendezvousError as error:
            got, fix = (
                f"{type(error).__name__}: {error}",
                "look at the other machines, and start again",
            )
            raise JoinError("the machines lost each other", got=got, fix=fix) from None
        finally:
            del meeting
        return _verdict(failures, asked, is_alone=spec.nnodes == "1")


def _verdict(failures: Mapping[int, Any], asked: int | None, *, is_alone: bool) -> int:
    """Say how it ended where that was not well; return the exit code."""
    from faccel.launching.agent import is_preemption

    if not failures:
        return 0
    if is_preemption(failures):
        code = next(each.exitcode for each in failures.values() if each.exitcode > 0)
        sys.stderr.write(
            f"preempted; what was saved is whole, and the same command goes on (exit code {code})\n"
        )
        return code
    if asked is not None and all(
        each.exitcode in (-asked, 128 + asked) for each in failures.values()
    ):
        return 128 + asked
    text, code = _first(failures, is_alone=is_alone)
    sys.stderr.write(f"\n{text}\n")
    return code


def _tell(failures: Mapping[int, Any], num_left: int) -> None:
    text, _ = _first(failures, is_alone=False)
    sys.stderr.write(f"\n{text}\nstarting again; {num_left - 1} more restarts are left\n")


_FOLLOWS = re.compile(
    "RankFailedError|gloo/transport|Dist(Network|Store|Backend)Error|nccl(Remote|System)Error"
)


def _follows(failure: Any) -> bool:
    """Whether a process failed because another one had."""
    told = failure.message
    is_ended = failure.exitcode == -signal.SIGTERM  # by the agent
    return is_ended or (
        isinstance(told, dict) and bool(_FOLLOWS.search(str(told.get("message", ""))))
    )


def _first(failures: Mapping[int, Any], *, is_alone: bool) -> tuple[str, int]:
    """Return what to say of the failure that the others follow from, and its exit code."""
    rank, failure = min(failures.items(), key=lambda each: (_follows(each[1]), each[1].timestamp))
    code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    how = f"exit code {code}" if failure.exitcode >= 0 else f"signal {-failure.exitcode}"
    told = failure.message
    details = told.get("extraInfo", {}).get("py_callstack", "") if isinstance(told, dict) else ""
    order = (
        "failed first"
        if is_alone or not _follows(failure)
        else "failed after a rank of another machine"
    )
    return f"rank {rank} on {socket.gethostname()} {order} ({how})\n{details}".rstrip("\n"), code
