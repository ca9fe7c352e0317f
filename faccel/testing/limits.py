"""The wall-time limit of simulations, which the pytest plugin sets. Imports nothing."""

from __future__ import annotations


class Limits:
    """Limits of all simulations of this process that do not set their own.

    Attributes:
        timeout_s: Seconds without progress after which `simulate` raises; `math.inf` is no limit.
    """

    def __init__(self) -> None:
        self.timeout_s = 30.0


LIMITS = Limits()
