"""Functions of `torch.distributed` whose names differ between versions of PyTorch."""

from __future__ import annotations

import torch.distributed as dist

# PyTorch 2.13 renamed it and warns about the old name, which is the only one in 2.9
_name = "all_gather_single"
if not hasattr(dist, _name):
    _name = "all_gather_into_tensor"
all_gather_single = getattr(dist, _name)
