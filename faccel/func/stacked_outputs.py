"""Outputs of several micro-batches, stacked."""

from __future__ import annotations

import torch

from faccel.tree import Tree, flatten


def stack_outputs(outputs: list[Tree]) -> Tree:
    """Return one tree for those of several micro-batches.

    Tensors are stacked along a new dim 0, all other leaves are collected in lists.
    """
    # All micro-batches return the same structure: it is the same function.
    _, rebuild = flatten(outputs[0])
    all_leaves = [flatten(output)[0] for output in outputs]
    stacked: list[Tree] = []
    for leaves in zip(*all_leaves, strict=True):
        if isinstance(leaves[0], torch.Tensor):
            stacked.append(torch.stack(leaves))
        else:
            stacked.append(list(leaves))
    return rebuild(stacked)
