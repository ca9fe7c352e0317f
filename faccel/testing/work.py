"""The handles of asynchronous collectives in a simulated world."""

# pyright: reportCallIssue=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

from torch._C._distributed_c10d import Work  # pyright: ignore
from torch.futures import Future

from faccel.parallel.eager_code import methods_without_graphs


@methods_without_graphs
class SimulatedWork(Work):
    """A handle of an asynchronous collective. Waiting for it lets other ranks run.

    Args:
        wait: Returns when the collective is done.
        outputs: The value of its future.
    """

    def __init__(self, wait: Callable[[], None], outputs: object) -> None:
        super().__init__()
        self._wait = wait
        self._outputs = outputs
        # of a message that was received, in its group
        self.source_rank: int | None = None  # pyright: ignore[reportIncompatibleMethodOverride]

    def _source_rank(self) -> int:
        assert self.source_rank is not None
        return self.source_rank

    def is_success(self) -> bool:
        return True  # a collective that fails raises in `wait`

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._wait()
        return True

    def get_future(self) -> Future[object]:
        self._wait()
        # DDP's reducer reads the result from the future.
        future: Future[object] = Future()
        future.set_result(self._outputs)
        return future

    def is_completed(self) -> bool:
        # Only one rank runs at a time: a loop that polls would never let the others run.
        self._wait()
        return True


def join_works(works: Sequence[SimulatedWork], outputs: object) -> SimulatedWork:
    """Return a handle that waits for all `works`.

    Effects: pure.
    """

    def wait() -> None:
        for work in works:
            work.wait()

    return SimulatedWork(wait, outputs)
