"""Tests of user code: simulated worlds in one process, faults and assertions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from faccel.exports import lazy

if TYPE_CHECKING:
    from faccel.testing.assertions import assert_all_finite as assert_all_finite
    from faccel.testing.assertions import assert_pure as assert_pure
    from faccel.testing.assertions import assert_replicated as assert_replicated
    from faccel.testing.assertions import equal_to_single_process as equal_to_single_process
    from faccel.testing.simulation import Results as Results
    from faccel.testing.simulation import fake_context as fake_context
    from faccel.testing.simulation import simulate as simulate
    from faccel.testing.world import Fault as Fault
    from faccel.testing.world import InjectedError as InjectedError
    from faccel.testing.world import TraceEvent as TraceEvent

_NAMES = {
    "faccel.testing.assertions": (
        "assert_all_finite", "assert_pure", "assert_replicated", "equal_to_single_process",
    ),
    "faccel.testing.simulation": ("Results", "fake_context", "simulate"),
    "faccel.testing.world": ("Fault", "InjectedError", "TraceEvent"),
}  # fmt: skip
# pyright: reportUnsupportedDunderAll=false
__getattr__, __dir__, __all__ = lazy(__name__, _NAMES)
