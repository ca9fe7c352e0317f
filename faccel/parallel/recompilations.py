"""Counts how often a function with a graph is compiled again, and logs it."""

from __future__ import annotations

import logging
from typing import Any

from faccel.effects import AMBIENT, effectful

_logger = logging.getLogger("faccel")


class _Counter:
    """The recompilations of this process, which has one compiler."""

    def __init__(self) -> None:
        self.num_recompilations = 0

    def start(self) -> None:
        """Count from now on."""
        from torch._dynamo.callback import callback_handler  # takes a second to import

        # `torch._dynamo.reset` has removed it.
        if self._count not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(self._count)

    def _count(self, args: Any) -> None:
        # "3/1": the second compilation of frame 3. Later stages of it have other triggers.
        _, _, attempt = str(args.compile_id).partition("/")
        if args.callback_trigger.name != "DYNAMO" or attempt.partition("_")[0] in ("", "0"):
            return
        self.num_recompilations += 1
        # At 1, 2, 4, 8, ...: a model that is compiled in every step must not fill the log.
        if self.num_recompilations.bit_count() == 1:
            _logger.warning(
                "the compiler has compiled a function again, %d times so far in this process. "
                "`TORCH_LOGS=recompiles` logs the reasons. For changing shapes use "
                "`Compile(dynamic=True)`, or batches of one shape: `faccel.shard(..., tail=...)`",
                self.num_recompilations,
            )


_COUNTER = _Counter()
start_counting = _COUNTER.start


@effectful(AMBIENT)
def num_recompilations() -> int:
    """Return how often this process has compiled a function again, since the first compiled model.

    Effects: ambient.

    A function is compiled again if an input has another shape, dtype or `requires_grad`, or if
    something else that its graph depends on has changed. Each time is also logged as a warning, at
    1, 2, 4, 8, ... times. Compilations of `torch.compile` outside of a `Plan` count, too.

    Examples:
        >>> num_recompilations() >= 0
        True
    """
    return _COUNTER.num_recompilations
