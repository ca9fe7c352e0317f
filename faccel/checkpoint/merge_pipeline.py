"""Pipeline parallel: the nodes of all stages are merged into the node of the full state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from faccel.checkpoint.codec import Node, kind_of


def merge_stages(nodes: Sequence[Node]) -> Node:
    """Return the node of the full state from those of the ranks of a pipeline.

    Effects: pure. `nodes` are in the order of the stages. Entries of modules, and states and groups
    of optimizers are united. Any other value is the first rank's.

    Examples:
        >>> first = {"!": "module", "v": {"x": {"!": "tensor"}}, "versions": {}}
        >>> second = {"!": "module", "v": {"y": {"!": "tensor"}}, "versions": {}}
        >>> merged = merge_stages([{"model": first, "step": 3}, {"model": second, "step": 3}])
        >>> list(merged["model"]["v"])
        ['x', 'y']
    """
    merge = _MERGES.get(kind_of(nodes[0]))
    return nodes[0] if merge is None else merge(nodes)


def _merge_lists(nodes: Sequence[Node]) -> Node:
    first = nodes[0]
    if not all(isinstance(node, list) and len(node) == len(first) for node in nodes):
        return first
    return [merge_stages(items) for items in zip(*nodes, strict=True)]


def _merge_dicts(nodes: Sequence[Node]) -> Node:
    merged: dict[str, Node] = {}
    for key in nodes[0]:
        merged[key] = merge_stages([node[key] for node in nodes if key in node])
    return merged


def _merge_modules(nodes: Sequence[Node]) -> Node:
    entries = _union([node["v"] for node in nodes])
    versions = _union([node.get("versions", {}) for node in nodes])
    return nodes[0] | {"v": entries, "versions": versions}


def _merge_optimizers(nodes: Sequence[Node]) -> Node:
    contents = [node["v"] for node in nodes]
    groups: list[dict[str, Any]] = []
    for stages in zip(*(content["param_groups"] for content in contents), strict=True):
        names: dict[str, None] = {}  # a set that keeps the order
        for group in stages:
            names |= dict.fromkeys(group["params"])
        groups.append(stages[0] | {"params": list(names)})
    state = _union([content["state"] for content in contents])
    return nodes[0] | {"v": contents[0] | {"state": state, "param_groups": groups}}


def _union(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all entries; the first stage's of a tied parameter, which several stages have."""
    union: dict[str, Any] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            union.setdefault(key, value)
    return union


_MERGES = {
    "list": _merge_lists,
    "dict": _merge_dicts,
    "module": _merge_modules,
    "optimizer": _merge_optimizers,
}
