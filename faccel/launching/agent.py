"""torch's elastic agent, with signals that reach the ranks and failures that are told before a restart."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.launcher.api import LaunchConfig

from faccel.checkpoint.preemption import Preemption

_ENDS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
_PASSED_ON = tuple(
    getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
_TELL_TORCH = "TORCHELASTIC_SIGNALS_TO_HANDLE"

Failures = Mapping[int, Any]


def is_preemption(failures: Failures) -> bool:
    """Whether ranks ended because they were told to and had saved; the agent ends those that are a moment later.

    Effects: pure.
    """
    codes = {failure.exitcode for failure in failures.values()}
    return Preemption.exit_code in codes and codes <= {Preemption.exit_code, -signal.SIGTERM}


class Agent(LocalElasticAgent):
    """Passes signals on to its ranks and waits for them, however long they save; a second one ends them.

    torch's own ends all ranks 30 seconds after the first, says 128 + signal whatever they said, and dies of SIGUSR1.

    Args:
        spec: What torch's agent starts.
        tell: Called with the failures of an attempt that is followed by another one.
        **options: As torch's agent takes them.
    """

    def __init__(
        self, spec: WorkerSpec, tell: Callable[[Failures, int], None], **options: Any
    ) -> None:
        super().__init__(spec, **options)
        self.tell = tell
        self.asked: int | None = None

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:  # type: ignore[override]
        if (
            self.asked is not None and self._is_any_running()
        ):  # torch would end the rest with the first that has ended
            return RunResult(state=WorkerState.HEALTHY)
        result: RunResult = super()._monitor_workers(worker_group)  # type: ignore[call-arg, assignment]
        if result.state == WorkerState.FAILED:
            if self.asked is not None or is_preemption(result.failures):
                self._remaining_restarts = 0
            elif self._remaining_restarts > 0:
                self.tell(result.failures, self._remaining_restarts)
        return result

    def _is_any_running(self) -> bool:
        processes = getattr(self._pcontext, "subprocess_handlers", {}).values()
        return any(each.proc.poll() is None for each in processes)

    def on_signal(self, number: int, _: object) -> None:
        """Pass a signal on; the second that asks for the end, or one without ranks, ends the agent as well."""
        ranks = list(self._pcontext.pids().values()) if self._pcontext else []
        if number in _ENDS and (self.asked is not None or not ranks):
            raise SignalException(f"ended by signal {number}", sigval=signal.Signals(number))
        if number in _ENDS:
            self.asked = number
        for pid in ranks:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@contextmanager
def _handling(agent: Agent) -> Generator[None]:
    before = {number: signal.signal(number, agent.on_signal) for number in (*_ENDS, *_PASSED_ON)}
    told = os.environ.get(_TELL_TORCH)
    os.environ[_TELL_TORCH] = "SIGQUIT"
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.environ.pop(_TELL_TORCH)
        if told is not None:
            os.environ[_TELL_TORCH] = told


def supervise(
    config: LaunchConfig, entrypoint: Any, args: list[str], tell: Callable[[Failures, int], None]
) -> tuple[Failures, int | None]:
    """Start the ranks and wait for their end; return the failures by rank, and the signal that asked for the end.

    Effects: ambient. Starts processes; handles signals meanwhile.

    Raises:
        SignalException: A second signal, or one before there were ranks.
        RendezvousError: The machines did not come together.
    """
    host, _, port = config.rdzv_endpoint.rpartition(":")
    meeting = RendezvousParameters(
        backend=config.rdzv_backend,
        endpoint=config.rdzv_endpoint,
        run_id=config.run_id,
        min_nodes=config.min_nodes,
        max_nodes=config.max_nodes,
        local_addr=config.local_addr,
        **config.rdzv_configs,
    )
    is_static = config.rdzv_backend == "static"
    spec = WorkerSpec(
        role=config.role,
        local_world_size=config.nproc_per_node,
        entrypoint=entrypoint,
        args=tuple(args),
        rdzv_handler=get_rendezvous_handler(meeting),
        max_restarts=config.max_restarts,
        monitor_interval=config.monitor_interval,
        master_addr=host if is_static else None,
        master_port=int(port) if is_static else None,
        local_addr=config.local_addr,
    )
    agent = Agent(spec, tell, logs_specs=config.logs_specs, start_method=config.start_method)
    with _handling(agent):
        try:
            result: RunResult = agent.run()  # pyright: ignore[reportAssignmentType]
        except SignalException:
            raise  # the meeting place stays open: other machines may go on
        except BaseException:
            spec.rdzv_handler.shutdown()
            raise
        spec.rdzv_handler.shutdown()
    return result.failures, agent.asked
