"""Functions of PyTorch whose names differ between its versions, 2.11 and later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

# PyTorch 2.13 renamed it and warns about the old name.
_name = "all_gather_single"
if not hasattr(dist, _name):
    _name = "all_gather_into_tensor"
all_gather_single = getattr(dist, _name)

# PyTorch 2.12 added it.
_foreach_clone = getattr(cast("Any", torch), "_foreach_clone", None)


def clone_all(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return a copy of each tensor, in one call where PyTorch has it.

    Effects: pure.
    """
    if _foreach_clone is None:
        return [tensor.clone() for tensor in tensors]
    return list(_foreach_clone(list(tensors)))
