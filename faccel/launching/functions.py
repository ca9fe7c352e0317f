"""Running a function on every process, from inside of a script or a notebook."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import tempfile
import uuid
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch

from faccel.config import Config, resolve
from faccel.config_file import find, read
from faccel.effects import AMBIENT, effectful
from faccel.errors import ConfigError, LaunchError, RankFailedError
from faccel.runtime.initialize import init

T = TypeVar("T")
_ConfigLike = Config | Mapping[str, Any] | str | None


def _entry(fn: Callable[..., T], args: tuple[Any, ...], config: _ConfigLike) -> T | None:
    try:
        with init(config) as ctx:
            result = fn(ctx, *args)
            if ctx.world_size > 1:
                _check_travels(
                    result,
                    f"the result of rank {ctx.rank}",
                    "return tensors, numbers, text, lists or dicts",
                )
            return result
    except SystemExit as ended:
        if ended.code in (None, 0):
            return None
        raise RankFailedError(
            "the function called `sys.exit`", got=f"`sys.exit({ended.code!r})`"
        ) from None


def _check_travels(value: object, what: str, fix: str) -> None:
    """Refuse what cannot be sent to another process."""
    try:
        ForkingPickler.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise LaunchError(
            f"{what} cannot be sent to another process", got=str(error), fix=fix
        ) from None


def _check(fn: Callable[..., T], args: tuple[Any, ...], config: _ConfigLike, method: str) -> None:
    """Find here what would fail in every process."""
    if not callable(fn):
        raise LaunchError(
            "a function is launched",
            got=repr(fn),
            fix="write `faccel.launch(train, num_processes=2)`",
        )
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise LaunchError(
            "this process is one of several already",
            got="`RANK` in the environment",
            fix="call the function itself",
        )
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise LaunchError(
            "a launched process would launch again while it imports the script",
            got="`faccel.launch` at the top level",
            fix='put the call below `if __name__ == "__main__":`',
        )
    if method == "spawn":
        _check_travels(
            (fn, args),
            "the function or one of its arguments",
            "define it at the top level of a module",
        )
    reference = config if isinstance(config, str) else find(os.environ)
    file = None if reference is None else read(reference)
    resolve(None if isinstance(config, str) else config, env=os.environ, file=file)


def _number(num_processes: int | None) -> int:
    if num_processes is None:
        return max(1, torch.accelerator.device_count()) if torch.accelerator.is_available() else 1
    if not isinstance(num_processes, int) or isinstance(num_processes, bool) or num_processes < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        got = repr(num_processes)
        raise ConfigError(
            "`num_processes` is a number of processes", got=got, fix="write `num_processes=2`"
        )
    return num_processes


def _run(
    fn: Callable[..., T], args: tuple[Any, ...], config: _ConfigLike, count: int, method: str
) -> list[T]:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    _check(fn, args, config, "fork" if count == 1 else method)
    if count == 1:
        return [_entry(fn, args, config)]  # type: ignore[list-item]
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what they say is said below
    with tempfile.TemporaryDirectory(prefix="faccel-launch-") as folder:
        spec = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            start_method=method,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        results = _start(spec, fn, args, config)
    return [results[rank] for rank in range(count)]


def _start(
    spec: Any, fn: Callable[..., T], args: tuple[Any, ...], config: _ConfigLike
) -> dict[int, T]:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    try:
        return elastic_launch(spec, _entry)(fn, args, config)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        told: Any = failure.message
        details = (
            told.get("extraInfo", {}).get("py_callstack", "") if isinstance(told, dict) else ""
        )
        got = details.strip() or f"exit code {failure.exitcode}"
        what = f"rank {rank} of {spec.nproc_per_node} failed"
        raise RankFailedError(what, got=got, fix="mend its error") from None


@effectful(AMBIENT)
def launch(
    fn: Callable[..., T], *args: Any, config: _ConfigLike = None, num_processes: int | None = None
) -> list[T]:
    """Run `fn(ctx, *args)` on every process of a world on this machine, and return the results by rank.

    Effects: ambient. Starts processes, by torch's elastic launcher. They import the script again, so that the call
    belongs under `if __name__ == "__main__":`, and `fn` to a module.

    Args:
        fn: Takes a `DistContext` first. It, its arguments and results are pickled.
        *args: Passed on.
        config: As for `init`.
        num_processes: How many; None is one per accelerator, else one.

    Raises:
        RankFailedError: A process failed; holds the first one's traceback.
        ConfigError: The configuration is wrong; found before anything starts.
        LaunchError: This process was started by a launcher itself, or the function, an argument or a result cannot be
            sent to another process.

    Examples:
        >>> launch(lambda ctx: ctx.world_size, num_processes=1)
        [1]
    """
    return _run(fn, args, config, _number(num_processes), "spawn")


@effectful(AMBIENT)
def notebook_launch(
    fn: Callable[..., T], *args: Any, config: _ConfigLike = None, num_processes: int | None = None
) -> list[T]:
    """Do what `launch` does from a notebook, whose functions no other process can import: processes are forked.

    Effects: ambient.

    Args:
        fn: Takes a `DistContext` first; a function of a cell will do.
        *args: Passed on.
        config: As for `init`.
        num_processes: How many; None is one per accelerator, else one.

    Raises:
        LaunchError: CUDA is initialised already: a forked process could not use it.
        RankFailedError: A process failed; holds the first one's traceback.

    Examples:
        >>> notebook_launch(lambda ctx: ctx.rank, num_processes=1)
        [0]
    """
    count = _number(num_processes)
    if count > 1 and torch.cuda.is_initialized():
        raise LaunchError(
            "CUDA is initialised in this notebook, and a forked process could not use it",
            got="a tensor or model on the GPU, or a call of `torch.cuda`",
            fix="restart the kernel, and make everything inside of the function that is launched",
        )
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(
            1
        )  # a fork has no threads but one, and would wait for those that computed before
        return _run(fn, args, config, count, "fork")
