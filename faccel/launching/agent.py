"""PyTorch's elastic agent, extended: forwards signals to the ranks and reports each failure.

PyTorch's agent ends all ranks 30 seconds after the first one ends, exits with 128 + signal
whatever the exit codes of the ranks were, and terminates on SIGUSR1.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler
from torch.distributed.launcher.api import LaunchConfig

from faccel.checkpoint.preemption import Preemption
from faccel.runtime.end_signals import END_SIGNALS, context_file

_NAMES = ("SIGUSR1", "SIGUSR2")
# Windows has no user signals.
_USER_SIGNALS = tuple(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__)
# PyTorch's agent waits 30 seconds for ranks after a second signal.
_SECOND_SIGNAL_WAIT_S = 3
_TORCH_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"

Failures = Mapping[int, ProcessFailure]
"""The failure of each rank that failed, by its rank in the world."""
OnRestart = Callable[[Failures, int], None]
"""`on_restart(failures, num_restarts_left)`, called before all ranks are restarted."""
OnEnd = Callable[[int, FrameType | None], NoReturn]
"""The handler of a signal that ends the process."""


def silence_loggers() -> None:
    """Turn off the log of PyTorch's agent: a table for each failure, a line for a second signal.

    faccel prints or raises the first failure instead.

    Effects: ambient. Sets the levels of loggers.
    """
    for parent in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(parent).setLevel(logging.CRITICAL)
        # Some modules set the level of their logger, and then that of its parent has no effect.
        for name in logging.root.manager.loggerDict:
            if name.startswith(f"{parent}."):
                logging.getLogger(name).setLevel(logging.CRITICAL)


def is_preemption(failures: Failures) -> bool:
    """Whether ranks saved a checkpoint and exited because a signal asked them to.

    Effects: pure.
    """
    codes = {failure.exitcode for failure in failures.values()}
    # The agent sends SIGTERM to ranks that end a moment after the first one.
    return Preemption.exit_code in codes and codes <= {Preemption.exit_code, -signal.SIGTERM}


class Agent(LocalElasticAgent):
    """Forwards signals to its ranks, and waits for them while they save.

    A second signal of the kind that ends a process ends the ranks immediately.

    Args:
        spec: What to start.
        logs_specs: Where the output of the ranks goes.
        start_method: `"spawn"` or `"fork"`, for functions.
        on_restart: Called with the failures of an attempt before the next one starts.
        on_end: Called at a signal that ends the launch while no rank runs.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: LogsSpecs,
        start_method: str,
        on_restart: OnRestart,
        on_end: OnEnd,
    ) -> None:
        super().__init__(
            spec,
            logs_specs=logs_specs,
            start_method=start_method,
            shutdown_timeout=_SECOND_SIGNAL_WAIT_S,
        )
        self._on_restart = on_restart
        self._on_end = on_end
        # The first signal that asked the launch to end; read by `_exit_code`.
        self.end_signal: int | None = None
        # Signals that arrived while the ranks were starting; None at any other time.
        self._delayed: list[int] | None = None

    def _start_workers(  # type: ignore[override]
        self, worker_group: WorkerGroup
    ) -> dict[int, Any]:
        if self.end_signal is not None:
            self._on_end(self.end_signal, None)  # it arrived between two attempts
        # PyTorch's agent refers to the ranks when all have started: an exception before, or the end
        # of this process, would leave them running.
        self._delayed = []
        try:
            ids: dict[int, Any] = super()._start_workers(worker_group)  # type: ignore[call-arg]
        finally:
            delayed, self._delayed = self._delayed, None
        for number in delayed:
            self.on_signal(number, None)
        return ids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # type: ignore[override]
        # After a signal the first exit is not a failure: the other ranks may still be saving.
        if self.end_signal is not None and self._is_any_running():
            return RunResult(state=WorkerState.HEALTHY)
        result = super()._monitor_workers(worker_group)  # type: ignore[call-arg]
        if result.state != WorkerState.FAILED:
            return result
        if self.end_signal is not None or is_preemption(result.failures):
            # A restart would run the script again although it was asked to end.
            self._remaining_restarts = 0
        elif self._remaining_restarts > 0:
            self._on_restart(result.failures, self._remaining_restarts - 1)
        return result

    def _is_any_running(self) -> bool:
        return bool(self._running())

    def _running(self) -> dict[int, subprocess.Popen[bytes]]:
        """Return the processes that run, by their local rank."""
        # Before the rendezvous is complete there is no process context. Contexts of functions
        # (`start_processes` with spawn) have no handlers.
        handlers = getattr(self._pcontext, "subprocess_handlers", {})
        running: dict[int, subprocess.Popen[bytes]] = {}
        for local_rank, handler in handlers.items():
            if handler.proc.poll() is None:
                running[local_rank] = handler.proc
        return running

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Forward a signal to the ranks.

        Raises:
            SignalException: This is the second signal that ends a process.
        """
        if self._delayed is not None:
            self._delayed.append(number)
            return
        running = self._running()
        if number in END_SIGNALS:
            if not running:
                self._on_end(number, frame)
            if self.end_signal is not None:
                raise SignalException(f"ended by signal {number}", sigval=signal.Signals(number))
            self.end_signal = number
        for local_rank, process in running.items():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, self._forwarded(number, local_rank))

    def _forwarded(self, number: int, local_rank: int) -> int:
        """Return the signal for a rank: SIGTERM for a Ctrl-C if the rank has no context.

        Outside of a context there is nothing to save. Python would print a traceback of an import,
        or do nothing while the rank waits in C++.
        """
        assert self._pcontext is not None
        if number == signal.SIGINT:
            error_file = self._pcontext.error_files[local_rank]
            if not os.path.exists(context_file(error_file)):
                return signal.SIGTERM
        return number


@contextmanager
def _signal_handlers(agent: Agent) -> Generator[None]:
    """Handle signals in the body by `agent.on_signal`. Ignored ones stay so, as with `nohup`."""
    previous: dict[int, Any] = {}
    for number in (*END_SIGNALS, *_USER_SIGNALS):
        if signal.getsignal(number) is not signal.SIG_IGN:
            previous[number] = signal.signal(number, agent.on_signal)
    # PyTorch's agent installs handlers for the signals in this variable. SIGQUIT is one that
    # `on_signal` does not handle, so that none of the handlers above is replaced.
    torch_signals = os.environ.get(_TORCH_SIGNALS)
    os.environ[_TORCH_SIGNALS] = "SIGQUIT"
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        del os.environ[_TORCH_SIGNALS]
        if torch_signals is not None:
            os.environ[_TORCH_SIGNALS] = torch_signals


def supervise(
    config: LaunchConfig,
    entrypoint: Callable[..., object] | str,
    args: list[str],
    on_restart: OnRestart,
    rendezvous: RendezvousHandler,
    on_end: OnEnd,
) -> tuple[Failures, int | None]:
    """Start the ranks and wait until all have ended.

    Effects: ambient. Starts processes, and handles signals until they end.

    Args:
        config: Number of processes, restarts and logs.
        entrypoint: A function, or the path of an executable.
        args: Arguments of the entry point.
        on_restart: Called with the failures of an attempt before the next one starts.
        rendezvous: Of the agents of all nodes. It is shut down at the end.
        on_end: Called at a signal that ends the launch while no rank runs.

    Returns:
        The failures by rank, and the signal that ended the launch, if one did.

    Raises:
        SignalException: A second signal.
        RendezvousError: The nodes lost each other.
    """
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=tuple(args),
        rdzv_handler=rendezvous,
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        local_addr=config.local_addr,
    )
    assert config.logs_specs is not None
    agent = Agent(spec, config.logs_specs, config.start_method, on_restart, on_end)
    with _signal_handlers(agent):
        try:
            result: RunResult = agent.run()  # pyright: ignore[reportAssignmentType]
        except SignalException:
            raise  # the rendezvous stays open: the other nodes may continue
        except BaseException:
            rendezvous.shutdown()
            raise
        rendezvous.shutdown()
    return result.failures, agent.end_signal
