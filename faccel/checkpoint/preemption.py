"""Preemption: a signal that announces the end of a run sets a flag, and the ranks agree on it."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, ClassVar

import attrs

from faccel.context import DistContext, require_context
from faccel.effects import AMBIENT, effectful

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Launchers and clusters send SIGTERM. SLURM sends SIGUSR1 with `#SBATCH --signal=USR1@120`."""


@attrs.frozen(eq=False)
class Preemption:
    """Whether this process has received a signal to end; returned by `preemption`.

    A script that has saved exits with `Preemption.exit_code`, 75 (EX_TEMPFAIL): run the same
    command again to resume.

    Args:
        received: The numbers of the signals received so far.
    """

    exit_code: ClassVar[int] = 75

    received: list[int] = attrs.field(factory=list)
    # `signal.getsignal` returns a function, a number or None
    _previous_handlers: dict[signal.Signals, Any] = attrs.field(
        factory=dict, init=False, repr=False
    )

    @property
    def requested(self) -> bool:
        """Whether this rank has received one.

        Ranks receive signals at different times: `faccel.agree(ctx, stop=preempted.requested)`.
        """
        return bool(self.received)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Record a signal: a save in progress is not interrupted.

        Raises:
            KeyboardInterrupt: This is the second Ctrl-C.
        """
        is_second_interrupt = number == signal.SIGINT and number in self.received
        self.received.append(number)
        # A person who presses it twice does not want to wait for the save.
        if is_second_interrupt:
            raise KeyboardInterrupt

    def install(self, *, interrupt: bool = False) -> None:
        """Install the signal handlers. Effects: ambient; on the main thread."""
        signals = SIGNALS
        if interrupt:
            signals = (*SIGNALS, signal.SIGINT)
        for number in signals:
            self._previous_handlers[number] = signal.signal(number, self.handle)

    def close(self) -> None:
        """Restore the previous signal handlers. Effects: ambient."""
        for number, handler in self._previous_handlers.items():
            if signal.getsignal(number) != self.handle:
                continue  # replaced since by the user
            # None is a handler that was not installed from Python: it cannot be restored
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous_handlers.clear()


@effectful(AMBIENT)
def preemption(ctx: DistContext, *, interrupt: bool = False) -> Preemption:
    """Handle SIGTERM and SIGUSR1 from now on, until the context is shut down.

    Effects: ambient. Installs handlers of the signals, which only record them. Python allows that
    on the main thread only. On other threads, as in a simulated world, a test appends to
    `received` instead.

    Args:
        ctx: `shutdown` of this context restores the previous handlers.
        interrupt: Whether Ctrl-C (SIGINT) is recorded, too, so that the run can save. The second
            one raises `KeyboardInterrupt`.

    Examples:
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> preempted = preemption(ctx)
        >>> preempted.requested, preempted.exit_code
        (False, 75)
        >>> preempted.close()
    """
    require_context(ctx, "faccel.preemption(ctx)")
    preempted = Preemption()
    if threading.current_thread() is threading.main_thread():
        preempted.install(interrupt=interrupt)
        ctx.lifetime.on_close(preempted.close)
    return preempted
