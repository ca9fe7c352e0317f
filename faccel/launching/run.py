"""Running a launch: by torch.distributed.run, in this process; the first failure is shown once."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from faccel.errors import JoinError, LaunchError
from faccel.launching.joining import join
from faccel.launching.spec import LaunchSpec, additions, arguments


def run(spec: LaunchSpec, env: Mapping[str, str]) -> int:
    """Run the command of `spec` on every process that it asks for; return the exit code.

    Effects: ambient. Starts processes. The code is that of the first process that failed, 128 and the signal where one
    ended it. Where there is a single process, it takes the place of this one.

    Raises:
        LaunchError: The command is not there, or its port is taken.
        JoinError: Several machines did not come together.
    """
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
        raise LaunchError("the script is not there", saw=f"`{first}`", fix=fix)
    if spec.kind == "executable" and shutil.which(first) is None:
        raise LaunchError("the program is not there", saw=f"`{first}`", fix="name one that is on the PATH")
    if spec.main_port is not None and not spec.node_rank:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", spec.main_port))
            except OSError as error:
                saw = f"--main-port {spec.main_port}: {error.strerror}"
                raise LaunchError(
                    "the port cannot be used", saw=saw, fix="name another, or none on one machine"
                ) from None


def _become(spec: LaunchSpec, env: Mapping[str, str]) -> NoReturn:
    prefix = {"script": [sys.executable], "module": [sys.executable, "-m"], "executable": []}[spec.kind]
    words = [*prefix, *spec.command]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(words[0], words, dict(env))


def _supervise(spec: LaunchSpec) -> int:
    import torch.distributed.run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is said below
    given = torchrun.parse_args(arguments(spec))
    if given.standalone:
        given.rdzv_backend, given.rdzv_endpoint, given.rdzv_id = "c10d", "localhost:0", f"faccel-{os.getpid()}"
    config, command, rest = torchrun.config_from_args(given)
    meeting = join(spec) if spec.nnodes != "1" else None  # kept: this may be the machine that all meet at
    try:
        elastic_launch(config=config, entrypoint=command)(*rest)
    except ChildFailedError as error:
        return _report(error)
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousError as error:
        saw, fix = f"{type(error).__name__}: {error}", "look at the other machines, and start again"
        raise JoinError("the machines lost each other", saw=saw, fix=fix) from None
    finally:
        del meeting
    return 0


def _follows(failure: Any) -> bool:
    """Whether a process failed because another one had."""
    told = failure.message
    return isinstance(told, dict) and str(told.get("message", "")).startswith("RankFailedError")


def _report(error: Any) -> int:
    """Show the first failure above everything that follows from it; return its exit code."""
    from faccel.checkpoint.preemption import Preemption

    rank, failure = min(error.failures.items(), key=lambda each: (_follows(each[1]), each[1].timestamp))
    if all(each.exitcode == Preemption.exit_code for each in error.failures.values()):
        sys.stderr.write("preempted; what was saved is whole, and the same command goes on from there (exit code 75)\n")
        return Preemption.exit_code
    code = failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    how = f"exit code {code}" if failure.exitcode >= 0 else f"signal {-failure.exitcode}"
    told = failure.message
    details = told.get("extraInfo", {}).get("py_callstack", "") if isinstance(told, dict) else ""
    text = f"\nrank {rank} on {socket.gethostname()} failed first ({how})\n{details}"
    sys.stderr.write(text.rstrip("\n") + "\n")
    return code
