"""A state of which each stage of a pipeline has a part: one description of all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from faccel.checkpoint.encode import Node


def merged(nodes: Sequence[Node]) -> Node:
    """Return the node of a whole state from those of the ranks of a pipeline.

    The entries of models and the states and groups of optimizers are joined; everything else is the first rank's.

    Examples:
        >>> a, b = ({"!": "module", "v": {name: {"!": "tensor"}}, "versions": {}} for name in ("x", "y"))
        >>> list(merged([{"model": a, "step": 3}, {"model": b, "step": 3}])["model"]["v"])
        ['x', 'y']
    """
    first = nodes[0]
    if isinstance(first, list):
        alike = all(isinstance(each, list) and len(each) == len(first) for each in nodes)
        return [merged(column) for column in zip(*nodes, strict=True)] if alike else first
    if not isinstance(first, dict):
        return first
    kind = first.get("!")
    if kind == "module":
        return first | {"v": _joined([each["v"] for each in nodes]),
                        "versions": _joined([each.get("versions", {}) for each in nodes])}  # fmt: skip
    if kind == "optimizer":
        return first | {"v": _optimizer([each["v"] for each in nodes])}
    if kind is None:
        return {key: merged([each[key] for each in nodes if key in each]) for key in first}
    return first


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            found.setdefault(key, value)
    return found


def _optimizer(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    groups: list[dict[str, Any]] = []
    for same in zip(*(part["param_groups"] for part in parts), strict=True):
        names = list(dict.fromkeys(name for group in same for name in group["params"]))
        groups.append(same[0] | {"params": names})
    return parts[0] | {"state": _joined([part["state"] for part in parts]), "param_groups": groups}
