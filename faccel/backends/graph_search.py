"""Search of an autograd graph for parameters."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import torch


def reaches(loss: torch.Tensor, param_ids: AbstractSet[int]) -> bool:
    """Return whether a backward of `loss` gives one of some parameters a gradient.

    Takes microseconds per operation of the graph.

    Args:
        loss: The root of the graph.
        param_ids: The `id` of each parameter.
    """
    # A loss that is a parameter itself has no node.
    if loss.grad_fn is None:
        return id(loss) in param_ids
    # A dict of nodes, because a node that has no reference gets another `id`.
    visited = {id(loss.grad_fn): loss.grad_fn}
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        # Only the node that accumulates a gradient has it.
        if id(getattr(node, "variable", None)) in param_ids:
            return True
        for child, _ in node.next_functions:
            # None where an input needs no gradient.
            if child is not None and id(child) not in visited:
                visited[id(child)] = child
                nodes.append(child)
    return False
