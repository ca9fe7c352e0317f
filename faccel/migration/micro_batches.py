"""Whether Accelerate counts one micro-batch for each batch of a loop.

Accelerate counts the blocks `with accelerator.accumulate(model):` that are entered, and faccel the
batches. They are the same numbers if each batch enters one block.
"""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst

from faccel.migration.facts import Facts
from faccel.migration.syntax import children_of, text_of

NOTE = (
    "each batch is one micro-batch, while Accelerate counts how often `accumulate` was entered; "
    "see docs/accumulation.md"
)


def has_windows(body: cst.CSTNode, facts: Facts) -> bool:
    """Return whether the batches of a loop are micro-batches.

    They are not if an inner loop enters `accumulate`, for the parts of a batch.

    Effects: pure.
    """
    places = [event for event in _events(body, "batch", facts) if event != "skip"]
    return bool(places) and "loop" not in places


def may_count_others(body: cst.CSTNode, facts: Facts) -> bool:
    """Return whether a batch of a loop with windows may enter no block, or several.

    Effects: pure.
    """
    if facts.is_created and not facts.has_steps:
        return False  # each micro-batch is an update
    events = list(_events(body, "batch", facts))
    return events[:1] == ["skip"] or "branch" in events or events.count("batch") > 1


def _events(node: cst.CSTNode, place: str, facts: Facts) -> Iterator[str]:
    """Yield where each `accumulate` is, and "skip" for each `continue`, in order."""
    for child in children_of(node):
        if isinstance(child, cst.FunctionDef | cst.ClassDef | cst.Lambda):
            continue
        # A loop over another loader has its batches.
        if isinstance(child, cst.For) and facts.has_kind(text_of(child.iter), "loader"):
            continue
        if isinstance(child, cst.Continue) and place != "loop":
            yield "skip"
        if isinstance(child, cst.WithItem) and facts.member_call(child.item) == "accumulate":
            yield place
        inner = place
        if isinstance(child, cst.For | cst.While):
            inner = "loop"
        if isinstance(child, cst.If) and place == "batch":
            inner = "branch"
        yield from _events(child, inner, facts)
