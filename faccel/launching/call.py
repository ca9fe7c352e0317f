"""Running a function on every process, from inside of a script or a notebook."""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from faccel.config import Config
from faccel.effects import AMBIENT, effectful
from faccel.errors import ConfigError, LaunchError, RankFailedError
from faccel.runtime import init

T = TypeVar("T")
_ConfigLike = Config | Mapping[str, Any] | str | None


def _entry(fn: Callable[..., T], args: tuple[Any, ...], config: _ConfigLike) -> T:
    with init(config) as ctx:
        return fn(ctx, *args)


def _number(num_processes: int | None) -> int:
    if num_processes is None:
        return max(1, torch.accelerator.device_count()) if torch.accelerator.is_available() else 1
    if not isinstance(num_processes, int) or isinstance(num_processes, bool) or num_processes < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        saw = repr(num_processes)
        raise ConfigError("`num_processes` is a number of processes", saw=saw, fix="write `num_processes=2`")
    return num_processes


def _run(fn: Callable[..., T], args: tuple[Any, ...], config: _ConfigLike, count: int, method: str) -> list[T]:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        raise LaunchError(
            "this process is one of several already", saw="`RANK` in the environment", fix="call the function itself"
        )
    if count == 1:
        return [_entry(fn, args, config)]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is said below
    spec = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method=method,
    )
    try:
        results: dict[int, T] = elastic_launch(spec, _entry)(fn, args, config)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        told: Any = failure.message
        details = told.get("extraInfo", {}).get("py_callstack", "") if isinstance(told, dict) else str(told)
        saw = details.strip() or f"exit code {failure.exitcode}"
        raise RankFailedError(f"rank {rank} of {count} failed", saw=saw, fix="mend its error") from None
    return [results[rank] for rank in range(count)]


@effectful(AMBIENT)
def launch(fn: Callable[..., T], *args: Any, config: _ConfigLike = None, num_processes: int | None = None) -> list[T]:
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
        LaunchError: This process was started by a launcher itself.

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
            saw="a tensor or model on the GPU, or a call of `torch.cuda`",
            fix="restart the kernel, and make everything inside of the function that is launched",
        )
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)  # a fork has no threads but one, and would wait for those that computed before
        return _run(fn, args, config, count, "fork")
