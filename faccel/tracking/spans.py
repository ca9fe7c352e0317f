"""The spans of a step, by the names that PyTorch and faccel give to ranges of a trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SPANS = (
    *("data", "forward", "backward", "communication", "optimizer", "checkpoint", "evaluation"),
)
"""The names, in the order of a step."""

# The start of a name, and its span. PyTorch gives these names itself.
_PREFIXES: tuple[tuple[str, str], ...] = (
    ("enumerate(DataLoader)#", "data"),
    ("DistributedDataParallel.forward", "forward"),
    ("autograd::engine::evaluate_function", "backward"),
    ("Optimizer.step#", "optimizer"),
    ("Optimizer.zero_grad#", "optimizer"),
    # Ranges of a backend are as long as the collective; those of c10d include a wait of the host.
    ("gloo:", "communication"),
    ("nccl:", "communication"),
    ("xccl:", "communication"),
    ("hccl:", "communication"),
    ("ucc:", "communication"),
    ("mpi:", "communication"),
    ("c10d::", "communication"),
    ("ncclDevKernel", "communication"),
)
# The same ranges once more, as long as their kernels.
_DEVICE_RANGES = "gpu_user_annotation"
# Between two functions of one backward the engine is busy with itself.
_JOINED_US = {"backward": 100.0}

Interval = tuple[float, float]


def span_of(name: str, category: str) -> str:
    """Return the span that a range of a trace belongs to, or nothing.

    Effects: pure.

    Examples:
        >>> span_of("Optimizer.step#AdamW.step", "user_annotation"), span_of("aten::mm", "cpu_op")
        ('optimizer', '')
    """
    if category == _DEVICE_RANGES:
        return ""
    # faccel's ranges, and those of users who name a range in the same way.
    if name in SPANS:
        return name
    for prefix, span in _PREFIXES:
        if name.startswith(prefix):
            return span
    return ""


def intervals_of(events: Iterable[Mapping[str, Any]]) -> dict[str, list[Interval]]:
    """Return the start and end of each span in microseconds; those of one name do not overlap.

    Effects: pure.

    Args:
        events: Complete events of a Chrome trace.

    Examples:
        >>> step = {"name": "Optimizer.step#SGD.step", "cat": "user_annotation", "ts": 5, "dur": 2}
        >>> intervals_of([step, {"name": "optimizer", "ts": 4, "dur": 2}])
        {'optimizer': [(4, 7)]}
    """
    by_span: dict[str, list[Interval]] = {}
    for event in events:
        span = span_of(event["name"], event.get("cat", ""))
        if span:
            by_span.setdefault(span, []).append((event["ts"], event["ts"] + event["dur"]))
    return {span: _union(intervals, span) for span, intervals in by_span.items()}


def _union(intervals: list[Interval], span: str) -> list[Interval]:
    gap = _JOINED_US.get(span, 0.0)
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1] + gap:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


def seconds_of(intervals: Mapping[str, Iterable[Interval]]) -> dict[str, float]:
    """Return the seconds of each span; 0 for one that did not occur.

    Effects: pure.
    """
    seconds = dict.fromkeys(SPANS, 0.0)
    for span, pairs in intervals.items():
        seconds[span] = sum(end - start for start, end in pairs) / 1e6
    return seconds
