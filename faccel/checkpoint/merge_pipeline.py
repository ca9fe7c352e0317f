"""Pipeline parallel: the nodes of all stages are merged into the node of the full state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from faccel.checkpoint.codec import Node, kind_of


def merge_stages(nodes: Sequence[Node]) -> Node:
    """Return the node of the full state from those of the ranks of a pipeline.

    Effects: pure. `nodes` are in the order of the stages. Entries of modules and averages, and
    states and groups of optimizers are united. Any other value is the first rank's.

    Examples:
        >>> first = {"!": "module", "v": {"x": {"!": "tensor"}}, "versions": {}}
        >>> second = {"!": "module", "v": {"y": {"!": "tensor"}}, "versions": {}}
        >>> merged = merge_stages([{"model": first, "step": 3}, {"model": second, "step": 3}])
        >>> list(merged["model"]["v"])
        ['x', 'y']
    """
    merge = _MERGES.get(kind_of(nodes[0]))
    if merge is None:
        return nodes[0]
    return merge(nodes)


def _merge_lists(nodes: Sequence[Node]) -> Node:
    first = nodes[0]
    for node in nodes:
        if not isinstance(node, list) or len(node) != len(first):
            return first  # a list of values, such as a history: rank 0's is stored
    return list(map(merge_stages, zip(*nodes, strict=True)))


def _merge_dicts(nodes: Sequence[Node]) -> Node:
    merged: dict[str, Node] = {}
    for key in nodes[0]:
        merged[key] = merge_stages(_values(key, nodes))
    return merged


def _merge_averages(nodes: Sequence[Node]) -> Node:
    return nodes[0] | {"v": _union(_values("v", nodes))}


def _merge_modules(nodes: Sequence[Node]) -> Node:
    entries = _union(_values("v", nodes))
    versions = _union(_values("versions", nodes))
    merged: dict[str, Node] = nodes[0] | {"v": entries, "versions": versions}
    # Only some stages may have frozen parameters.
    if any(_values("trained_only", nodes)):
        merged["trained_only"] = True
    return merged


def _merge_optimizers(nodes: Sequence[Node]) -> Node:
    contents = _values("v", nodes)
    groups: list[dict[str, Any]] = []
    # Each stage has the same groups, with the parameters of its modules.
    for stages in zip(*_values("param_groups", contents), strict=True):
        names: dict[str, None] = {}  # a set that keeps the order
        for group in stages:
            names |= dict.fromkeys(group["params"])
        groups.append(stages[0] | {"params": list(names)})
    state = _union(_values("state", contents))
    return nodes[0] | {"v": contents[0] | {"state": state, "param_groups": groups}}


def _values(key: str, nodes: Sequence[Node]) -> list[Node]:
    return [node[key] for node in nodes if key in node]


def _union(mappings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all entries; the first stage's of a tied parameter, which several stages have."""
    union: dict[str, Any] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            union.setdefault(key, value)
    return union


# Nodes of all other kinds are values, which are equal on all ranks or rank 0's by definition.
_MERGES = {
    "list": _merge_lists,
    "dict": _merge_dicts,
    "module": _merge_modules,
    "optimizer": _merge_optimizers,
    "ema": _merge_averages,
}
