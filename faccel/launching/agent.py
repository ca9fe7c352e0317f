"""PyTorch's elastic agent, extended: forwards signals to the ranks and reports each failure.

PyTorch's agent ends all ranks 30 seconds after the first one ends, exits with 128 + signal
whatever the exit codes of the ranks were, and terminates on SIGUSR1.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType

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


def _existing(*names: str) -> tuple[signal.Signals, ...]:
    return tuple(signal.Signals[name] for name in names if name in signal.Signals.__members__)


# Windows has neither SIGHUP nor the two user signals.
_END_SIGNALS = _existing("SIGTERM", "SIGINT", "SIGHUP")
_USER_SIGNALS = _existing("SIGUSR1", "SIGUSR2")
_TORCH_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"

Failures = Mapping[int, ProcessFailure]
"""The failure of each rank that failed, by its rank in the world."""
OnRestart = Callable[[Failures, int], None]
"""`on_restart(failures, num_restarts_left)`, called before all ranks are restarted."""


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
    """

    def __init__(
        self, spec: WorkerSpec, logs_specs: LogsSpecs, start_method: str, on_restart: OnRestart
    ) -> None:
        super().__init__(spec, logs_specs=logs_specs, start_method=start_method)
        self._on_restart = on_restart
        # The first signal that asked the launch to end; read by `_exit_code`.
        self.end_signal: int | None = None

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
        # Contexts of functions (`start_processes` with spawn) have no handlers.
        processes = getattr(self._pcontext, "subprocess_handlers", {}).values()
        return any(process.proc.poll() is None for process in processes)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Forward a signal to the ranks.

        Raises:
            SignalException: This is the second signal that ends a process, or no rank runs.
        """
        # Before the rendezvous is complete there is no process context.
        pids: list[int] = []
        if self._pcontext:
            pids = list(self._pcontext.pids().values())
        if number in _END_SIGNALS:
            if self.end_signal is not None or not pids:
                raise SignalException(f"ended by signal {number}", sigval=signal.Signals(number))
            self.end_signal = number
        for pid in pids:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, number)


@contextmanager
def _signal_handlers(agent: Agent) -> Generator[None]:
    """Handle signals in the body by `agent.on_signal`."""
    previous = {
        number: signal.signal(number, agent.on_signal) for number in (*_END_SIGNALS, *_USER_SIGNALS)
    }
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
) -> tuple[Failures, int | None]:
    """Start the ranks and wait until all have ended.

    Effects: ambient. Starts processes, and handles signals until they end.

    Args:
        config: Number of processes, restarts and logs.
        entrypoint: A function, or the path of an executable.
        args: Arguments of the entry point.
        on_restart: Called with the failures of an attempt before the next one starts.
        rendezvous: Of the agents of all nodes. It is shut down at the end.

    Returns:
        The failures by rank, and the signal that ended the launch, if one did.

    Raises:
        SignalException: A second signal, or one before the ranks started.
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
    agent = Agent(spec, config.logs_specs, config.start_method, on_restart)
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
