"""Being told that the run is to end: a flag, which the ranks look at together when they are ready to save."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, ClassVar

import attrs

from faccel.context import DistContext
from faccel.effects import AMBIENT, effectful

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What launchers and clusters send: SIGTERM; SIGUSR1 where SLURM is asked for it (`#SBATCH --signal=USR1@120`)."""


@attrs.frozen(eq=False)
class Preemption:
    """Whether this process was told to end; made by `preemption`.

    A script that has saved exits with `Preemption.exit_code`, 75 (EX_TEMPFAIL): the same command goes on.

    Args:
        heard: The signals that have come so far.
    """

    exit_code: ClassVar[int] = 75

    heard: list[int] = attrs.field(factory=list)
    _before: dict[signal.Signals, Any] = attrs.field(factory=dict, init=False, repr=False)

    @property
    def requested(self) -> bool:
        """Whether one has. Ranks hear at different times: `faccel.agree(ctx, preempted=told.requested)`."""
        return bool(self.heard)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.heard.append(number)  # and nothing else: whatever was going on goes on

    def _listen(self) -> None:
        self._before.update({each: signal.signal(each, self._note) for each in SIGNALS})

    def close(self) -> None:
        """Put the handlers back that were there before."""
        for each, before in self._before.items():
            if signal.getsignal(each) == self._note:
                signal.signal(each, signal.SIG_DFL if before is None else before)
        self._before.clear()


@effectful(AMBIENT)
def preemption(ctx: DistContext) -> Preemption:
    """Listen for SIGTERM and SIGUSR1 from now on, until the context is shut down.

    Effects: ambient. Sets the handlers of the two signals, which only note that one has come. Off the main thread, as
    in a simulated world, there is nothing to set: a test appends to `heard`.

    Args:
        ctx: Whose end puts the handlers back.

    Examples:
        >>> from faccel.testing import fake_context
        >>> ctx = fake_context(0, 1)
        >>> told = preemption(ctx)
        >>> told.requested, told.exit_code
        (False, 75)
        >>> told.close()
    """
    told = Preemption()
    if threading.current_thread() is threading.main_thread():
        told._listen()  # pyright: ignore[reportPrivateUsage]
        ctx.lifetime.on_close(told.close)
    return told
