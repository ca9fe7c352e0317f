"""`launch` and `notebook_launch`: run a function in several processes from a script or notebook."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from faccel.checks import one_of
from faccel.config import Config
from faccel.config_file import find, read
from faccel.config_sources import resolve
from faccel.device_table import is_initialized, kind_of
from faccel.effects import AMBIENT, effectful
from faccel.errors import ConfigError, FaccelError, LaunchError, RankFailedError, short_repr
from faccel.launching.guard import guarded
from faccel.launching.loopback import loopback_variables
from faccel.launching.main_module import check_guarded, is_importable
from faccel.launching.rank_process import end_with_launcher
from faccel.launching.tpu import is_tpu, set_tpu_variables
from faccel.runtime.end_signals import END_SIGNALS
from faccel.runtime.excepthook import CONSEQUENCES, GRACE_S, write_error_file
from faccel.runtime.initialize import init
from faccel.runtime.private_folder import TemporaryFiles, private_folder
from faccel.runtime.user_traceback import hide_frames, shows_frames, uncaught_without_frames

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

    from faccel.config_file import ConfigFile

T = TypeVar("T")
# The signals for which PyTorch's agent installs handlers.
_AGENT_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"
_ConfigLike = Config | Mapping[str, Any] | str | None
_PLACES = ("local", "ray")


@effectful(AMBIENT)
def launch(
    fn: Callable[..., T],
    *args: Any,
    config: _ConfigLike = None,
    num_processes: int | None = None,
    on: str = "local",
    resources: Mapping[str, float] | None = None,
    max_restarts: int = 0,
) -> list[T]:
    """Run `fn(ctx, *args)` in several processes, and return the results by rank.

    On this node the processes are spawned and import the script again. Call `launch` below
    `if __name__ == "__main__":`, and define `fn` at the top level of a module. On Ray each rank
    is an actor, and `fn` may be defined anywhere.

    Effects: ambient. Starts processes with PyTorch's elastic launcher, or actors of Ray.

    Args:
        fn: Takes a `DistContext` first. The function, its arguments and results are pickled.
        *args: Further arguments of `fn`, the same for each rank.
        config: As for `init`.
        num_processes: Number of processes; None is `nproc` of the configuration file, else one per
            accelerator of this node or GPU of the Ray cluster, or one without them.
        on: `"local"`, this node, or `"ray"`, the Ray cluster that this process is connected to,
            else that of `RAY_ADDRESS`, else one that runs on this node, else a new one.
        resources: With `on="ray"`: Ray's resources of each rank. None is one CPU, and one GPU if
            `device` or the cluster has GPUs.
        max_restarts: With `on="ray"`: how often all ranks start again after one has failed. After
            `sys.exit(preempted.exit_code)` they always do.

    Raises:
        RankFailedError: A process failed. The message contains the traceback of the first one.
        ConfigError: The configuration is invalid; raised before a process starts.
        LaunchError: A launcher started this process, the function, an argument or a result
            cannot be pickled, or the Ray cluster lacks the resources.

    Examples:
        >>> launch(lambda ctx: ctx.world_size, num_processes=1)
        [1]
    """
    with uncaught_without_frames(os.environ):
        if one_of("on", on, _PLACES, LaunchError) == "ray":
            from faccel.launching.ray_launch import launch_on_ray

            resolved = _check(fn, config)
            count = _requested_count(num_processes, config)
            return launch_on_ray(fn, args, resolved, count, resources, max_restarts)
        _check_local(resources, max_restarts)
        return _run(fn, args, config, _count(num_processes, config), "spawn")


def _check_local(resources: object, max_restarts: object) -> None:
    """Raise for an option that only a launch on a cluster has."""
    if resources is not None:
        raise LaunchError(
            "`resources` are those of a Ray cluster",
            got=f'`resources={short_repr(resources)}` without `on="ray"`',
            fix='add `on="ray"`, or remove `resources`',
        )
    if max_restarts != 0:
        raise LaunchError(
            "`faccel.launch` on this node starts no rank again",
            got=f'`max_restarts={short_repr(max_restarts)}` without `on="ray"`',
            fix='add `on="ray"`, or run `faccel launch --max-restarts 1 train.py` in a shell',
        )


@effectful(AMBIENT)
def notebook_launch(
    fn: Callable[..., T], *args: Any, config: _ConfigLike = None, num_processes: int | None = None
) -> list[T]:
    """Run `fn(ctx, *args)` in several processes from a notebook, and return the results by rank.

    The processes are forked, because another process cannot import a function from a cell.

    Effects: ambient. Starts processes with PyTorch's elastic launcher.

    Args:
        fn: Takes a `DistContext` first. It may be defined in a cell.
        *args: Further arguments of `fn`, the same for each rank.
        config: As for `init`.
        num_processes: Number of processes; None is `nproc` of the configuration file, else one per
            accelerator, or one without them.

    Raises:
        LaunchError: This process has used the accelerator, so that a fork could not.
        RankFailedError: A process failed. The message contains the traceback of the first one.

    Examples:
        >>> notebook_launch(lambda ctx: ctx.rank, num_processes=1)
        [0]
    """
    num_threads = torch.get_num_threads()
    with uncaught_without_frames(os.environ), contextlib.ExitStack() as stack:
        count = _count(num_processes, config)
        if count > 1:
            _check_can_fork()
        stack.callback(torch.set_num_threads, num_threads)
        # A fork copies the state of the OpenMP pool but not its threads, so that the first
        # parallel region of a child would wait for them forever.
        torch.set_num_threads(1)
        return _run(fn, args, config, count, "fork")


def _check_can_fork() -> None:
    """Raise if a forked process could not use the accelerator of this node."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return
    device_type = accelerator.type
    if not kind_of(accelerator).can_fork:
        raise LaunchError(
            f"a forked process cannot use `{device_type}` devices",
            got="`faccel.notebook_launch` with several processes",
            fix="write a script, and start it with `faccel launch`",
        )
    if is_initialized(device_type):
        raise LaunchError(
            f"`{device_type}` is initialized in this notebook, and a forked process cannot use it",
            got=f"a tensor or model on the device, or a call of `torch.{device_type}`",
            fix="restart the kernel, and create tensors and models inside the launched function",
        )


def _requested_count(num_processes: int | None, config: _ConfigLike) -> int | None:
    """Return the number of processes of the call or the file; None if neither has one."""
    if num_processes is not None:
        return _positive_int(num_processes)
    file = _config_file(config)
    if file is None:
        return None
    return file.num_processes


def _count(num_processes: int | None, config: _ConfigLike) -> int:
    count = _requested_count(num_processes, config)
    if count is not None:
        return count
    if not torch.accelerator.is_available():
        return 1
    return max(1, torch.accelerator.device_count())


def _config_file(config: _ConfigLike) -> ConfigFile | None:
    """Return the file that `init(config)` reads in each process."""
    if isinstance(config, str):
        return read(config)
    reference = find(os.environ)
    if reference is None:
        return None
    return read(reference)


def _positive_int(value: object) -> int:
    # bool is a subclass of int, and `num_processes=True` is a mistake
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            "`num_processes` must be a positive int",
            got=short_repr(value),
            fix="write `num_processes=2`",
        )
    return value


def _run(
    fn: Callable[..., T],
    args: tuple[object, ...],
    config: _ConfigLike,
    num_processes: int,
    start_method: str,
) -> list[T]:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    from faccel.launching.agent import silence_loggers
    from faccel.launching.torch_rendezvous import ONE_NODE, register_one_node

    resolved = _check(fn, config)
    # No process, no pickling: a debugger works, and lambdas are allowed.
    if num_processes == 1:
        return [_call(fn, args, config)]
    if start_method == "spawn":
        check_guarded()
        _check_arguments(fn, args)
    silence_loggers()  # `_start` raises the first failure
    register_one_node()
    if is_tpu(resolved):
        set_tpu_variables(1, num_processes)
    with private_folder("faccel-launch-") as folder:
        spec = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            # Concurrent launches on this node must not share a rendezvous.
            run_id=uuid.uuid4().hex,
            rdzv_backend=ONE_NODE,
            max_restarts=0,
            start_method=start_method,
            # Required by the elastic launcher, which stores each rank's error file there.
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        # PyTorch names a temporary file for the error of each rank, and unpickles it. In a folder
        # of all users, another one could create it first.
        with guarded(folder), TemporaryFiles(folder) as files:
            spec.rdzv_configs["on_started"] = files.restore
            results = _start(spec, files.previous, fn, args, config)
    return [results[rank] for rank in range(num_processes)]


def _check(fn: Callable[..., object], config: _ConfigLike) -> Config:
    """Return the configuration; raise once, before a process starts, what each one would raise."""
    if not callable(fn):
        raise LaunchError(
            "`fn` must be a function",
            got=short_repr(fn),
            fix="write `faccel.launch(train, num_processes=2)`",
        )
    # Nested launches would start `n * n` processes, all with the rank of the outer one.
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise LaunchError(
            "`faccel.launch` was called in a process that a launcher started",
            got="`RANK` or `WORLD_SIZE` in the environment",
            fix="call the function directly: `fn(faccel.init())`",
        )
    # multiprocessing sets this attribute while a spawned process imports the main module
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise LaunchError(
            "a launched process calls `faccel.launch` again while it imports the script",
            got="`faccel.launch` at the top level",
            fix='put the call below `if __name__ == "__main__":`',
        )
    file = _config_file(config)
    if isinstance(config, str):  # the name of the file
        config = None
    return resolve(config, env=os.environ, file=file)


def _check_arguments(fn: Callable[..., object], args: tuple[object, ...]) -> None:
    """Raise if a spawned process could not get the function and its arguments."""
    fix = "define the function at the top level of a module"
    data = _pickled((fn, args), "the function or one of its arguments", fix)
    # A pickle refers to a function or class by the name of its module.
    if b"__main__" in data and not is_importable():
        name = getattr(fn, "__name__", "train")
        raise LaunchError(
            "the function, or a class of an argument, is defined in a notebook or at a prompt, "
            "which a new process cannot import",
            got=f"`faccel.launch({name}, ...)`",
            fix=f"write `faccel.notebook_launch({name}, ...)`",
        )


def _pickled(value: object, description: str, fix: str) -> bytes:
    try:
        return bytes(ForkingPickler.dumps(value))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise LaunchError(f"{description} cannot be pickled", got=str(error), fix=fix) from None


def _call_as_rank(
    launcher: int,
    temporary: str | None,
    fn: Callable[..., T],
    args: tuple[object, ...],
    config: _ConfigLike,
) -> T:
    """Run the function in a launched process, of which this is the entry point."""
    end_with_launcher(launcher)
    tempfile.tempdir = temporary  # a forked process has that of the launch
    os.environ.update(loopback_variables(os.environ))
    try:
        return _call(fn, args, config)
    except FaccelError as error:
        error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if error_file is None or shows_frames(os.environ):
            raise
        # PyTorch would write the file itself, with the frames of this function.
        hide_frames(error)
        write_error_file(error, error_file)
        sys.exit(1)


def _call(fn: Callable[..., T], args: tuple[object, ...], config: _ConfigLike) -> T:
    """Run the function in this process."""
    try:
        with init(config) as ctx:
            result = fn(ctx, *args)
            if ctx.world_size > 1:
                # Checked here, because a pickling error in the agent's pipe names no rank.
                description = f"the result of rank {ctx.rank}"
                _pickled(result, description, "return tensors, numbers, text, lists or dicts")
            return result
    except Exception as error:
        # The rank that caused this error ends first, and then the agent ends this one: the agent
        # reports the first process that it sees ended.
        if CONSEQUENCES.search(f"{type(error).__name__}: {error}"):
            time.sleep(GRACE_S)
        raise
    # `sys.exit()` in a script is a normal end; with a code it is a failure of the rank.
    except SystemExit as exit:
        if exit.code in (None, 0):
            return None  # type: ignore[return-value]  # the function ended without a result
        raise RankFailedError(
            "the function called `sys.exit`", got=f"`sys.exit({short_repr(exit.code)})`"
        ) from None


def _start(
    spec: LaunchConfig,
    temporary: str | None,
    fn: Callable[..., T],
    args: tuple[object, ...],
    config: _ConfigLike,
) -> dict[int, T]:
    """Start the processes, and return the results by rank or raise the first failure."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    try:
        with _signals_of_agent(spec):
            return elastic_launch(spec, _call_as_rank)(os.getpid(), temporary, fn, args, config)
    except SignalException as error:
        number = error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message: object = failure.message
        got = f"exit code {failure.exitcode}, without a traceback"
        # As it is, for example, for an error while the process imports the script.
        fix = "read the output of the process above; each one runs the top level of the script"
        if isinstance(message, dict):
            got = message.get("extraInfo", {}).get("py_callstack", "").strip()
            fix = "fix the error in the traceback above"
        raise RankFailedError(
            f"rank {rank} of {spec.nproc_per_node} failed", got=got, fix=fix
        ) from None
    # The ranks have ended. Now the script gets the signal, as without a launch: Ctrl-C raises
    # KeyboardInterrupt, and SIGTERM ends this process.
    signal.raise_signal(number)
    raise RankFailedError(
        "a signal ended the ranks",
        got=number.name,
        fix="end the program in the handler of this signal",
    )


@contextmanager
def _signals_of_agent(spec: LaunchConfig) -> Generator[None]:
    """Restore the signal handlers of the script, which PyTorch's agent replaces and leaves."""
    handlers: dict[int, Any] = {}
    for number in END_SIGNALS:
        handler = signal.getsignal(number)
        # An ignored signal stays ignored, as `nohup` asks.
        if handler is not signal.SIG_IGN:
            handlers[number] = handler
    previous = os.environ.get(_AGENT_SIGNALS)
    # The agent writes them to its variable, also over the user's.
    spec.signals_to_handle = ",".join(signal.Signals(number).name for number in handlers)
    try:
        yield
    finally:
        # Python allows it on the main thread only, and so does the agent.
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
        os.environ.pop(_AGENT_SIGNALS, None)
        if previous is not None:
            os.environ[_AGENT_SIGNALS] = previous
